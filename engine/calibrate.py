"""``longtake calibrate``: the table of a model's heads, from what its attention is given while it renders.

Shots are rendered from their prompts alone over a history in bfloat16, and summed up for each layer and head:

    x = [k | v]   the covariance within a block, as its clean pass commits it (k normed, before RoPE)
    W             what an error of x costs the layer's output, in the mean over queries t and the keys j that they read:
                  of k, (p[t, j] |Wo (v[j] - o[t])|)^2 / D times the outer square of the query, turned back to where
                  the key stands before RoPE; of v, p[t, j]^2 times Wo^T Wo
                  p: the attention's weight, o: its output, Wo: the head's part of the layer's output projection

With C the covariance, A = W^(1/2) U, where U are the eigenvectors of W^(1/2) C W^(1/2): components do not go together,
and an error of any of them costs the same (the Karhunen-Loeve transform under a weighted norm). A share of the plain
norm in W keeps what these queries did not look at, and components that are much smaller than the largest are made
larger, by as much at most. They are dealt in turn to two tensors, the largest first.

Shape legend: L layers, H heads, T tokens of a block, S queries that are looked at, X rows of keys, D head dim, E = 2 D.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longtake.engine.config import Precision, ShotConfig
from longtake.engine.model import Attention, CausalWan
from longtake.engine.prompts import make_prompts
from longtake.engine.rollout import Rollout, open_cache
from longtake.engine.text import TextEncoder
from longtake.engine.weights import load_transformer
from longtake.kernels.attention_path import DensePath
from longtake.kernels.codec import Codec, Rates
from longtake.kernels.principal import BITS
from longtake.kernels.rotary import HeadRotary, Rotary, Turns, rotate_pairs

QUERIES = 16  # of a pass that are looked at
PLAIN_SHARE = 0.03  # of the plain norm in what an error costs
TINY = 1e-30
LEAST = 2.0**-6.5  # of the largest component's size: so far down reach the exponents that `tc` stores, 2^-7.5


class HeadMoments:
    """What is summed up of every layer and head, in float64.

    Args:
        model: with its weights.
    """

    def __init__(self, model: CausalWan) -> None:
        config, device = model.config, model.proj_out.weight.device
        heads, dim = (config.num_layers, config.num_heads), config.head_dim
        self.joint_LHEE = torch.zeros((*heads, 2 * dim, 2 * dim), dtype=torch.float64, device=device)
        self.queries_LHDD = torch.zeros((*heads, dim, dim), dtype=torch.float64, device=device)
        self.weight_LH = torch.zeros(heads, dtype=torch.float64, device=device)
        self.output_LHDD = torch.zeros_like(self.queries_LHDD)
        for layer, block in enumerate(model.blocks):
            attention = block.attn1
            assert isinstance(attention, Attention)
            out_MHD = attention.to_out.get_parameter("0.weight").double().view(-1, config.num_heads, dim)
            self.output_LHDD[layer] = torch.einsum("mhd,mhe->hde", out_MHD, out_MHD)

    def add_block(self, layer: int, k_THD: Tensor, v_THD: Tensor) -> None:
        """Count a committed block's keys and values."""
        x_THE = torch.cat((k_THD, v_THD), dim=-1).float()
        x_HTE = (x_THE - x_THE.mean(0)).double().transpose(0, 1)
        self.joint_LHEE[layer] += x_HTE.mT @ x_HTE

    def add_queries(self, layer: int, head: int, q_SD: Tensor, k_XD: Tensor, v_XD: Tensor, turns: list[Rotary]) -> None:
        """Count queries of one head.

        Args:
            layer, head: of the model.
            q_SD: turned to their positions.
            k_XD, v_XD: all that they attend, keys turned.
            turns: tables of the keys, in their order.
        """
        q_SD, k_XD, v_XD = q_SD.float(), k_XD.float(), v_XD.float()
        weight_SX = torch.softmax(q_SD @ k_XD.T / q_SD.shape[1] ** 0.5, dim=-1)
        self.weight_LH[layer, head] += weight_SX.square().sum()
        root_DD = root(self.output_LHDD[layer, head]).float()
        apart_SX = torch.cdist(weight_SX @ v_XD @ root_DD, v_XD @ root_DD)
        rows_SXD = q_SD.unsqueeze(1) * (weight_SX * apart_SX / q_SD.shape[1] ** 0.5).unsqueeze(-1)
        first = 0
        for rotary in turns:
            back = _back(rotary)
            for row_XD in rows_SXD[:, first : first + rotary.num_tokens]:
                back_XD = rotate_pairs(row_XD, back)
                self.queries_LHDD[layer, head] += (back_XD.T @ back_XD).double()
            first += rotary.num_tokens

    def basis(self) -> tuple[Tensor, Rates]:
        """The table: bfloat16 [L, H, E, E], and rates."""
        cost_LHEE = torch.zeros_like(self.joint_LHEE)
        dim = self.output_LHDD.shape[-1]
        cost_LHEE[..., :dim, :dim] = with_plain(self.queries_LHDD)
        cost_LHEE[..., dim:, dim:] = with_plain(self.weight_LH[..., None, None] * self.output_LHDD)
        scale_LH = cost_LHEE.diagonal(dim1=-2, dim2=-1).mean(-1)
        turn_LHEE = turn(cost_LHEE / scale_LH[..., None, None], self.joint_LHEE)
        rates = tuple((int(4 * bits),) * len(turn_LHEE) for bits in BITS.values())
        return torch.cat((turn_LHEE[..., 0::2], turn_LHEE[..., 1::2]), dim=-1).to(torch.bfloat16), rates


def _back(rotary: Rotary) -> Rotary:
    """Tables that turn the other way."""
    mirror = torch.tensor([1.0, -1.0], device=rotary.temporal_YP2.device)
    return Rotary(temporal_YP2=rotary.temporal_YP2 * mirror, spatial_SQ2=rotary.spatial_SQ2 * mirror)


def root(cost_DD: Tensor) -> Tensor:
    """The symmetric square root of matrices [..., D, D] that are no less than zero."""
    power, vectors_DD = torch.linalg.eigh(cost_DD)
    root_DD: Tensor = (vectors_DD * power.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors_DD.mT
    return root_DD


def with_plain(cost_DD: Tensor) -> Tensor:
    """Costs [..., D, D] with a share of the plain norm, of the same mean."""
    mean = cost_DD.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    plain = torch.eye(cost_DD.shape[-1], dtype=cost_DD.dtype, device=cost_DD.device)
    return (1 - PLAIN_SHARE) * cost_DD + PLAIN_SHARE * mean * plain


def turn(cost_DD: Tensor, covariance_DD: Tensor) -> Tensor:
    """A of the module's docstring, the largest component first: float64 [..., D, D].

    None is below LEAST of it but for those that hardly are: an estimate of next to nothing is not blown up.

    Args:
        cost_DD: W.
        covariance_DD: C, whatever its scale.
    """
    root_DD = root(cost_DD)
    power_D, vectors_DD = torch.linalg.eigh(root_DD @ covariance_DD @ root_DD)
    most = power_D[..., -1:].clamp(min=TINY)
    larger_D = (LEAST * (most / power_D.maximum(LEAST**4 * most)).sqrt()).clamp(min=1)
    turn_DD: Tensor = root_DD @ (vectors_DD * larger_D.unsqueeze(-2)).flip(-1)
    return turn_DD


class WatchedPath(DensePath):
    """Dense attention that shows what it is given. Layers come in turn, from the first.

    Args:
        moments: told of queries.
        codec, num_rows, dtype: as for DensePath.

    Attributes:
        latest: keys and values [T, H, D] of the last pass, by layer.
    """

    def __init__(self, moments: HeadMoments, codec: Codec, num_rows: int, dtype: torch.dtype) -> None:
        num_layers, num_heads = moments.weight_LH.shape
        super().__init__(codec, num_heads, num_rows, dtype, moments.weight_LH.device)
        self._moments, self._num_layers = moments, num_layers
        self._passes, self._layer = 0, -1
        self._turns: list[Turns] = []
        self._own_turns: Turns | None = None
        self.latest: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, rotary: Turns) -> None:
        self._layer = (self._layer + 1) % self._num_layers
        self._passes += self._layer == 0
        self._own_turns = rotary
        self.latest[self._layer] = k_THD, v_THD
        super().begin(q_THD, k_THD, v_THD, rotary)

    def write_history(
        self, pages_GHP: Tensor, slots_N: Tensor, rotary: Turns, *, codec: Codec | None = None, row: int = 0
    ) -> None:
        self._turns.append(rotary)
        super().write_history(pages_GHP, slots_N, rotary, codec=codec, row=row)

    def write_own(self, row: int) -> None:
        assert self._own_turns is not None, "begin() comes first"
        self._turns.append(self._own_turns)
        super().write_own(row)

    def attend(self, num_rows: int) -> tuple[Tensor, Tensor]:
        q_HTD = self._begun()[0]
        stride = max(1, q_HTD.shape[1] // QUERIES)
        for head, q_TD in enumerate(q_HTD):
            k_XD, v_XD = self.k_HXD[head, :num_rows], self.v_HXD[head, :num_rows]
            turns = [one.heads[head] if isinstance(one, HeadRotary) else one for one in self._turns]
            q_SD = q_TD[self._passes % stride :: stride]
            self._moments.add_queries(self._layer, head, q_SD, k_XD, v_XD, turns)
        self._turns.clear()
        return super().attend(num_rows)


def watch(rollout: Rollout, moments: HeadMoments) -> Callable[[], None]:
    """Let a rollout's attention show what it is given; call what comes back after every step."""
    path = WatchedPath(moments, rollout.codec, rollout.path.num_rows, rollout.dtype)
    rollout.path = path

    def count() -> None:
        """A step's last pass is the one that commits."""
        for layer, (k_THD, v_THD) in path.latest.items():
            moments.add_block(layer, k_THD, v_THD)

    return count


@torch.inference_mode()
def calibrate(
    shots: Sequence[ShotConfig], num_blocks: int, device: torch.device, report: Callable[[str], None]
) -> tuple[Tensor, Rates]:
    """Make the table of a model.

    Args:
        shots: of one model, each rendered from its prompts alone.
        num_blocks: of each shot, from its first.
        device: where the model runs.
        report: told of every shot that begins.

    Returns:
        bfloat16 [L, H, E, E], and rates.
    """
    spec = shots[0].model
    spec = dataclasses.replace(spec, weights=dataclasses.replace(spec.weights, precision=Precision.MODEL))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    encoder = TextEncoder(spec.path, text_len=spec.text_len)
    embeds = encoder.encode_all(beat.prompt for shot in shots for beat in shot.beats)
    model = load_transformer(spec, device, dtype)
    moments = HeadMoments(model)
    for shot in shots:
        blocks = min(num_blocks, shot.num_blocks)
        report(f"{shot.name}: {blocks} blocks")
        num_frames = shot.frames_of_latents(blocks * spec.block_frames)
        beats = tuple(beat for beat in shot.beats if beat.at_s * shot.fps < num_frames)
        shot = dataclasses.replace(shot, model=spec, num_frames=num_frames, beats=beats)
        prompts = make_prompts(shot, model, [embeds[beat.prompt] for beat in shot.beats])
        with (
            contextlib.closing(open_cache(shot, device)) as cache,
            contextlib.closing(Rollout(shot, model, prompts, cache, graphs=False)) as rollout,
        ):
            count = watch(rollout, moments)
            for _ in range(blocks):
                rollout.step()
                count()
    return moments.basis()
