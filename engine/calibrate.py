"""``longtake calibrate``: the table of a model's heads and the rates of its layers, from what it makes of a film.

Shots are rendered from their prompts alone over a history in bfloat16, and summed up for each layer and head:

    x = [k | v]   of a token of the history, k normed, before RoPE
    C             covariance of x within a block
    W             what an error of x costs: the sum of g g' over tokens, steps, and random directions of the clean
                  estimate that a step makes, g the slope of the estimate in that direction by x (engine/sensitivity.py)

So an error e of a token moves the whole model's estimate by e' W e, in the mean and as far as errors are small,
whatever layers lie in between. A = W^(1/2) U, where U are the eigenvectors of W^(1/2) C W^(1/2): components do not go
together, and an error of any of them costs the same (the Karhunen-Loeve transform under a weighted norm). A share of
the plain norm in W keeps what these films did not show, and components that are much smaller than the largest are made
larger, by as much at most. They are dealt in turn to two tensors, the largest first.

Rates: a few blocks are stored at some rates and read again, and what their errors cost is summed up for each layer.
Quarters of a bit then go, one after the other, where they take away most, until the bytes that are stored of such
blocks are those of 2.33, 3 and 4 bits.

Shape legend: L layers, H heads, T tokens of a block, X rows of history, D head dim, E = 2 D, R rates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.engine.config import ModelConfig, Precision, ShotConfig
from longtake.engine.prompts import make_prompts
from longtake.engine.rollout import Rollout, open_cache
from longtake.engine.sensitivity import still, watch
from longtake.engine.text import TextEncoder
from longtake.engine.weights import load_transformer
from longtake.kernels.codec import BlockGeometry, Rates
from longtake.kernels.errors import ConfigError
from longtake.kernels.principal import BITS, LEAST_QUARTERS, MOST_QUARTERS, HistoryBasis, PrincipalCodec
from longtake.kernels.rotary import rotary_table

PROBES = 2  # random directions of each pass
MOST_SAMPLES = 4  # blocks that are kept to measure rates by
MEASURED = (2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24)  # quarters; between them costs fall evenly by factors
PLAIN_SHARE = 0.03  # of the plain norm in what an error costs
TINY = 1e-30
LEAST = 2.0**-6.5  # of the largest component's size: so far down reach the exponents that `tc` stores, 2^-7.5
DEEP, WHOLE = 16, 4  # from so many layers on quarters are a multiple of so many: chunks on the disk divide them


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """One block of a history: keys before RoPE and values [H, T, E] by layer, on the CPU."""

    geometry: BlockGeometry
    layers: tuple[Tensor, ...]


class HistoryCost:
    """What is summed up of every layer and head, in float64.

    Args:
        config: of the model.
        device: of the sums.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        shape = (config.num_layers, config.num_heads, 2 * config.head_dim, 2 * config.head_dim)
        self.cost_LHEE, self.covariance_LHEE = (
            torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2)
        )
        self._samples: list[_Sample] = []
        self._num_seen = 0
        self._generator = torch.Generator().manual_seed(0)

    def see_history(self, geometry: BlockGeometry, layers: list[tuple[Tensor, Tensor]]) -> None:
        """Count the blocks of a history, and keep one of them for rates, or not: each history's alike likely."""
        num_blocks = layers[0][0].shape[1] // geometry.num_tokens
        block, place = (self._draw(most) for most in (num_blocks, self._num_seen + 1))
        self._num_seen += 1
        kept = []
        for layer, (k_HXD, v_HXD) in enumerate(layers):
            x_HNTE = torch.cat((k_HXD, v_HXD), dim=-1).unflatten(1, (num_blocks, -1))
            kept.append(x_HNTE[:, block].cpu())
            apart_HXE = (x_HNTE.float() - x_HNTE.float().mean(2, keepdim=True)).flatten(1, 2)
            self.covariance_LHEE[layer] += (apart_HXE.mT @ apart_HXE).double()
        sample = _Sample(geometry=geometry, layers=tuple(kept))
        if len(self._samples) < MOST_SAMPLES:
            self._samples.append(sample)
        elif place < MOST_SAMPLES:
            self._samples[place] = sample

    def see_slopes(self, layer: int, dk_HXD: Tensor, dv_HXD: Tensor) -> None:
        """Count slopes of one direction."""
        slope_HXE = torch.cat((dk_HXD, dv_HXD), dim=-1).float()
        self.cost_LHEE[layer] += (slope_HXE.mT @ slope_HXE).double()

    def table(self) -> tuple[Tensor, Rates]:
        """The matrices, bfloat16 [L, H, E, E], and quarters by layer for each of pc2, pc3 and pc4.

        Raises:
            ConfigError: no block had a history.
        """
        if not self._samples:
            raise ConfigError("no block of the film had a history; let its shots be longer, or give more --blocks")
        turn_LHEE = turn(with_plain(self.cost_LHEE), self.covariance_LHEE)
        turn_LHEE = torch.cat((turn_LHEE[..., 0::2], turn_LHEE[..., 1::2]), dim=-1).to(torch.bfloat16)
        costs_LR = self._costs(HistoryBasis(turn_LHEE))
        num_layers = len(costs_LR)
        whole = WHOLE if num_layers >= DEEP else 1
        rates = []
        for name, bits in BITS.items():
            fitting = (most_units(name, sample.geometry, bits * num_layers) for sample in self._samples)
            rates.append(share_out(costs_LR, min(fitting) // whole * whole))
        return turn_LHEE, tuple(rates)

    def _draw(self, most: int) -> int:
        return int(torch.randint(most, (), generator=self._generator))

    def _costs(self, basis: HistoryBasis) -> Tensor:
        """What errors of the samples cost with LEAST_QUARTERS and more: float64 [L, R], on the CPU."""
        costs_LR = torch.zeros(len(self.cost_LHEE), len(MEASURED), dtype=torch.float64)
        for sample in self._samples:
            codec = PrincipalCodec("pc2", sample.geometry)
            for layer, x_HTE in enumerate(sample.layers):
                bound = codec.of_layer(basis, layer)
                x_HTE = x_HTE.to(self.cost_LHEE.device)
                for index, quarters in enumerate(MEASURED):
                    error_HTE = (stored(bound.at_rate(quarters), x_HTE) - x_HTE.float()).double()
                    costs_LR[layer, index] += float(((error_HTE @ self.cost_LHEE[layer]) * error_HTE).sum())
        return between(costs_LR)


def most_units(name: str, geometry: BlockGeometry, bits: float) -> int:
    """Units of a head's payloads that so many bits an element hold, all layers together."""
    unit_bytes = PrincipalCodec(name, geometry, (LEAST_QUARTERS,)).unit_bytes
    return int(bits * 2 * geometry.num_tokens * geometry.head_dim / 8 / unit_bytes)


def stored(codec: PrincipalCodec, x_HTE: Tensor) -> Tensor:
    """Keys and values of a block as they are read again, float32 [H, T, E]."""
    num_heads, num_tokens, _ = x_HTE.shape
    k_THD, v_THD = x_HTE.transpose(0, 1).chunk(2, dim=-1)
    page_GHP = torch.zeros((1, num_heads, codec.payload_bytes), dtype=torch.uint8, device=x_HTE.device)
    codec.encode(k_THD, v_THD, page_GHP[0])
    out = [torch.empty(k_THD.transpose(0, 1).shape, device=x_HTE.device) for _ in range(2)]
    slots_N = torch.zeros(1, dtype=torch.int32, device=x_HTE.device)
    assert codec.geometry.grid is not None, "shots know where tokens lie"
    frames = num_tokens // math.prod(codec.geometry.grid)
    tables = rotary_table([0.0] * frames, *codec.geometry.grid, codec.geometry.head_dim, x_HTE.device)
    codec.materialise(page_GHP, slots_N, still(tables), *out)
    return torch.cat(out, dim=-1)


def between(costs_LR: Tensor) -> Tensor:
    """Costs of all rates from LEAST_QUARTERS to MOST_QUARTERS, from those of MEASURED; none is above a lower rate's."""
    logs_LR = costs_LR.clamp(min=TINY).log().cummin(dim=1).values
    columns = []
    for first, last, left, right in zip(MEASURED, MEASURED[1:], logs_LR.mT, logs_LR.mT[1:], strict=False):
        columns += [torch.lerp(left, right, (rate - first) / (last - first)) for rate in range(first, last)]
    return torch.stack([*columns, logs_LR[:, -1]], dim=1).exp()


def share_out(costs_LR: Tensor, total: int) -> tuple[int, ...]:
    """Quarters of each layer, ``total`` of them or as many as layers take, where each takes away most of the costs.

    Greedy along the convex hull of each layer's costs, so that a step that pays only later is seen.

    Args:
        costs_LR: of LEAST_QUARTERS to MOST_QUARTERS, never rising.
        total: not to be exceeded.
    """
    costs = costs_LR.tolist()
    quarters = [LEAST_QUARTERS] * len(costs)
    while (left := min(total, MOST_QUARTERS * len(costs)) - sum(quarters)) > 0:
        _, layer, step = max(
            ((of[have - LEAST_QUARTERS] - of[have - LEAST_QUARTERS + step]) / step, layer, step)
            for layer, (of, have) in enumerate(zip(costs, quarters, strict=True))
            for step in range(1, min(left, MOST_QUARTERS - have) + 1)
        )
        quarters[layer] += step
    return tuple(quarters)


def root(cost_DD: Tensor) -> Tensor:
    """The symmetric square root of matrices [..., D, D] that are no less than zero."""
    power, vectors_DD = torch.linalg.eigh(cost_DD)
    root_DD: Tensor = (vectors_DD * power.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors_DD.mT
    return root_DD


def with_plain(cost_DD: Tensor) -> Tensor:
    """Costs [..., D, D] of mean 1 with a share of the plain norm; that alone where nothing costs anything."""
    mean = cost_DD.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    plain = torch.eye(cost_DD.shape[-1], dtype=cost_DD.dtype, device=cost_DD.device)
    return (1 - PLAIN_SHARE) * cost_DD / mean.clamp(min=TINY) + PLAIN_SHARE * plain


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


def calibrate(
    shots: Sequence[ShotConfig], num_blocks: int, device: torch.device, report: Callable[[str], None]
) -> tuple[Tensor, Rates]:
    """Make the table of a model.

    Args:
        shots: of one model, each rendered from its prompts alone.
        num_blocks: of each shot, from its first, which has no history.
        device: where the model runs.
        report: told of every shot that begins.

    Returns:
        bfloat16 [L, H, E, E], and rates.

    Raises:
        ConfigError: no block had a history.
    """
    spec = shots[0].model
    spec = dataclasses.replace(spec, weights=dataclasses.replace(spec.weights, precision=Precision.MODEL))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    encoder = TextEncoder(spec.path, text_len=spec.text_len)
    embeds = encoder.encode_all(beat.prompt for shot in shots for beat in shot.beats)
    model = load_transformer(spec, device, dtype)
    cost = HistoryCost(spec.transformer, device)
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
            watch(rollout, cost, PROBES)
            for _ in range(blocks):
                rollout.step()
    with torch.inference_mode():
        return cost.table()
