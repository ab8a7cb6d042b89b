"""The table of a model's heads and the rates of its layers: slopes against finite differences, matrices, the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from longtake.engine.basis import BASIS_NAME, basis_bytes, read_basis, read_table, write_basis
from longtake.engine.calibrate import (
    LEAST,
    MEASURED,
    PLAIN_SHARE,
    HistoryCost,
    between,
    calibrate,
    share_out,
    turn,
    with_plain,
)
from longtake.engine.config import HistoryConfig, ModelSpec, ShotConfig
from longtake.engine.model import CausalWan
from longtake.engine.random_model import TINY, write_random_model
from longtake.engine.rollout import Rollout, open_cache
from longtake.engine.sensitivity import SlopePasses, SlopePath, turned, watch
from longtake.engine.weights import load_transformer, read_spec
from longtake.jobs.film import parse_film
from longtake.jobs.resolve import resolve
from longtake.kernels.codec import BlockGeometry, Codec
from longtake.kernels.errors import ConfigError
from longtake.kernels.principal import BITS, HistoryBasis, PrincipalCodec
from longtake.kernels.rotary import Turns
from tests.engine.small_rollout import make_shot as make_small_shot
from tests.engine.small_rollout import random_contexts, random_model

CPU = torch.device("cpu")
FILM = """[film]
codec = "bf16"
[[shot]]
name = "a"
duration = "4s"
prompt = "p"
[[shot.beat]]
at = "2s"
prompt = "q"
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = write_random_model(tmp_path_factory.mktemp("model") / "tiny")
    turn_LHEE, rates = calibrate([make_shot(read_spec(str(folder)))], 3, CPU, lambda line: None)
    write_basis(turn_LHEE, rates, folder / BASIS_NAME)
    return read_spec(str(folder))


def make_shot(spec: ModelSpec, codec: str = "bf16") -> ShotConfig:
    return resolve(parse_film(FILM.replace("bf16", codec)), lambda name: spec)["a"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Listener:
    """A witness that keeps what it is told."""

    def __init__(self) -> None:
        self.histories: list[list[tuple[Tensor, Tensor]]] = []
        self.slopes: list[tuple[int, Tensor, Tensor]] = []

    def see_history(self, geometry: BlockGeometry, layers: list[tuple[Tensor, Tensor]]) -> None:
        self.histories.append(layers)

    def see_slopes(self, layer: int, dk_HXD: Tensor, dv_HXD: Tensor) -> None:
        self.slopes.append((layer, dk_HXD, dv_HXD))


class Moved(SlopePath):
    """Reads a layer's history a little beside what is stored."""

    layer, num_layers = -1, 2
    moves: Mapping[int, Tensor] = {}

    def begin(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, rotary: Turns) -> None:
        self.layer = (self.layer + 1) % self.num_layers
        super().begin(q_THD, k_THD, v_THD, rotary)

    def write_history(
        self, pages_GHP: Tensor, slots_N: Tensor, rotary: Turns, *, codec: Codec | None = None, row: int = 0
    ) -> None:
        super().write_history(pages_GHP, slots_N, rotary, codec=codec, row=row)
        if self.leaves and self.layer in self.moves:  # a pass that denoises
            k_HXD, v_HXD = (x + move for x, move in zip(self.leaves[-1], self.moves[self.layer], strict=True))
            self._rows[-1] = turned(k_HXD, rotary), v_HXD


def first_flow(model: CausalWan, shot: ShotConfig, moves: Mapping[int, Tensor], witness: Listener) -> Tensor:
    """The flow of the first pass over a history, which is moved by so much in some layers."""
    found: list[Tensor] = []

    class Passes(SlopePasses):
        def run(self, *args: Any) -> Tensor:
            flow = super().run(*args)
            if args[0] == 1:
                found.append(flow)
            return flow

    rollout = Rollout(shot, model, random_contexts(model, 1), open_cache(shot, CPU))
    watch(rollout, witness, 1)
    path = rollout.path
    assert isinstance(path, SlopePath)
    if moves:
        path = Moved(rollout.codec, path.num_heads, path.num_rows, torch.float32, CPU)
        path.moves = moves
    rollout.path, rollout.passes = path, Passes(model, path, witness, 1)
    for _ in range(2):
        rollout.step()
    return found[0]


@pytest.mark.parametrize("head_jitter", [0.0, 0.2])
def test_slopes_are_those_of_the_models_estimate(model: CausalWan, head_jitter: float) -> None:
    """As finite differences of a whole pass say, by keys before RoPE and by values of each layer's history."""
    history = HistoryConfig(recent_blocks=2, head_jitter=head_jitter)
    shot = make_small_shot(history, "fp32", 2)
    listener = Listener()
    flow = first_flow(model, shot, {}, listener)
    direction = torch.randn(flow.shape, generator=torch.Generator().manual_seed(0)) / flow.numel() ** 0.5
    assert [layer for layer, _, _ in listener.slopes[:2]] == [0, 1] and len(listener.slopes) == 4
    assert len(listener.histories) == 1, "once a block, whatever its steps"
    for layer, *slopes in listener.slopes[:2]:
        for place, slope_HXD in enumerate(slopes):
            move = torch.zeros(2, *slope_HXD.shape)
            move[place] = 0.05 * normal(*slope_HXD.shape, seed=layer)
            ahead, behind = (first_flow(model, shot, {layer: sign * move}, Listener()) for sign in (1, -1))
            want = float(((ahead - behind) * direction).sum()) / 2  # the first step's sigma is 1
            assert float((move[place] * slope_HXD).sum()) == pytest.approx(want, rel=0.02)


def test_passes_are_what_they_were(model: CausalWan) -> None:
    shot = make_small_shot(HistoryConfig(recent_blocks=2), "fp32", 3)
    found = []
    for watched in (False, True):
        rollout = Rollout(shot, model, random_contexts(model, 1), open_cache(shot, CPU))
        if watched:
            watch(rollout, Listener(), 2)
        found.append([rollout.step() for _ in range(3)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_a_layer_whose_history_does_not_matter_has_the_fewest_bits() -> None:
    model = random_model()
    model.blocks[0].get_parameter("attn1.to_out.0.weight").zero_()
    shot = make_small_shot(HistoryConfig(recent_blocks=2), "bf16", 3)
    cost = HistoryCost(model.config, CPU)
    rollout = Rollout(shot, model, random_contexts(model, 1), open_cache(shot, CPU))
    watch(rollout, cost, 1)
    for _ in range(3):
        rollout.step()
    assert not cost.cost_LHEE[0].any() and cost.cost_LHEE[1].any()
    turn_LHEE, rates = cost.table()
    assert turn_LHEE.isfinite().all() and HistoryBasis(turn_LHEE).num_layers == 2
    for (name, bits), quarters in zip(BITS.items(), rates, strict=True):
        codec = PrincipalCodec(name, rollout.codec.geometry, quarters)
        one_more = codec.unit_bytes * 8 / (2 * 2 * codec.geometry.num_tokens * codec.geometry.head_dim)
        assert quarters[0] == 2 and bits - one_more < codec.bits_per_element <= bits


def test_quarters_go_where_they_take_away_most() -> None:
    """The dearer layer has more; a step that pays only later is seen; no layer has too many."""
    falling = 0.5 ** torch.arange(23.0, dtype=torch.float64)
    late = torch.cat((torch.full((6,), 100.0, dtype=torch.float64), torch.zeros(17, dtype=torch.float64)))
    assert share_out(torch.stack((falling, 4 * falling, 16 * falling)), 24) == (6, 8, 10)
    assert share_out(torch.stack((falling, late)), 12) == (4, 8)
    assert share_out(torch.stack((falling, falling)), 99) == (24, 24)
    costs = torch.stack([2.0**n * falling for n in range(3)])
    measured = costs[:, [quarters - 2 for quarters in MEASURED]]
    torch.testing.assert_close(between(measured), costs)
    measured[0, 3] = 1e9  # an accident of the samples
    assert (between(measured).diff(dim=1) <= 0).all()


def test_components_do_not_go_together_and_cost_the_same() -> None:
    covariance = (mixing := normal(8, 8).double()) @ mixing.T + 20 * torch.eye(8)
    cost = with_plain((mixing := normal(8, 3, seed=1).double()) @ mixing.T)
    assert float(cost.diagonal().mean()) == pytest.approx(1)
    assert float(torch.linalg.eigvalsh(cost)[0]) == pytest.approx(PLAIN_SHARE)
    matrix = turn(cost, covariance)
    power = matrix.T @ covariance @ matrix
    torch.testing.assert_close(power, torch.diag(power.diagonal()), atol=1e-9, rtol=0)
    assert (power.diagonal().diff() <= 0).all(), "the largest first"
    back = torch.linalg.inv(matrix)
    torch.testing.assert_close(back @ cost @ back.T, torch.eye(8, dtype=torch.float64))


def test_components_are_not_smaller_than_can_be_stored() -> None:
    covariance = torch.diag(torch.tensor([1e6, 9.0, 0.0, 1e4], dtype=torch.float64))
    matrix = turn(torch.eye(4, dtype=torch.float64), covariance)
    size = (matrix.T @ covariance @ matrix).diagonal().sqrt()
    torch.testing.assert_close(size, torch.tensor([1e3, 1e2, 1e3 * LEAST, 0], dtype=torch.float64))
    assert float(matrix.abs().max()) == pytest.approx(1 / LEAST), "what was not seen is not blown up without end"


def test_blocks_count_about_their_means(model: CausalWan) -> None:
    cost, (heads, dim) = HistoryCost(model.config, CPU), (model.config.num_heads, model.config.head_dim)
    geometry = BlockGeometry(num_tokens=20, head_dim=dim, grid=(4, 5))
    k_HXD, v_HXD = normal(heads, 40, dim) + 5, normal(heads, 40, dim, seed=1)
    k_HXD[:, 20:] += 7
    cost.see_history(geometry, [(k_HXD, v_HXD)] * 2)
    x_NTE = torch.cat((k_HXD[1], v_HXD[1]), dim=-1).unflatten(0, (2, 20))
    want_EE = sum(19 * torch.cov(x_TE.T) for x_TE in x_NTE)
    torch.testing.assert_close(cost.covariance_LHEE[0, 1].float(), want_EE, rtol=1e-4, atol=1e-4)


def test_a_model_is_calibrated_and_renders_by_its_table(spec: ModelSpec) -> None:
    """Bytes as planned, of the heads that are kept here; two heads of this model have two matrices."""
    basis = read_basis(spec, range(TINY.num_heads), CPU)
    second = read_basis(spec, range(1, 2), CPU)
    assert torch.equal(second.turn_LHEE[:, 0], basis.turn_LHEE[:, 1])
    assert basis.num_bytes == basis_bytes(TINY) == 2 * second.num_bytes
    shot, model = make_shot(spec, "pc3"), load_transformer(spec, CPU, torch.float32)
    rollout = Rollout(shot, model, random_contexts(model, 2), open_cache(shot, CPU))
    assert rollout.memory()["history_basis"] == basis.num_bytes
    exact = make_shot(spec)
    reference = Rollout(exact, model, random_contexts(model, 2), open_cache(exact, CPU))
    assert reference.memory()["history_basis"] == 0
    for block in range(3):
        got, want = rollout.step(), reference.step()
        assert float((got - want).norm() / want.norm()) < (0.2 if block else 1e-6)


def test_a_table_that_is_not_the_shots_is_refused(spec: ModelSpec, tmp_path: Path) -> None:
    shot = make_shot(spec, "pc2")
    assert shot.history_basis == read_table(spec) and make_shot(spec).history_basis is None
    assert shot.history_basis is not None
    heads = range(2)
    with pytest.raises(ConfigError, match="is not the table that this film goes with"):
        read_basis(spec, heads, CPU, replace(shot.history_basis, hash="0" * 16))
    other = replace(spec, path=tmp_path)
    with pytest.raises(ConfigError, match=r"history_basis\.safetensors, which is not there; .* longtake calibrate"):
        make_shot(other, "pc2")
    path, turn_LHEE, rates = tmp_path / BASIS_NAME, read_basis(spec, heads, CPU).turn_LHEE, shot.history_basis.quarters
    write_basis(turn_LHEE[..., :4, :4], rates, path)
    refused(other, "is of another model: .* longtake calibrate")
    path.write_bytes(save({"turn": turn_LHEE.contiguous()}))
    refused(other, "is of an earlier longtake: it has no rates by layer; .* longtake calibrate")
    for bad in (rates[:2], ((1, 9), *rates[1:]), ((9, 25), *rates[1:]), tuple((9,) for _ in rates)):
        write_basis(turn_LHEE, bad, path)
        refused(other, "is damaged: its rates are none; .* longtake calibrate")
    path.write_bytes(b"no table")
    refused(other, "is damaged .*; .* longtake calibrate")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_basis(torch.zeros(1), (), tmp_path / "none" / BASIS_NAME)


def refused(spec: ModelSpec, message: str) -> None:
    """By what reads the matrices, and by a film that asks for them."""
    for ask in (lambda: read_basis(spec, range(2), CPU), lambda: make_shot(spec, "pc2")):
        with pytest.raises(ConfigError, match=message) as caught:
            ask()
        assert len(str(caught.value).splitlines()) == 1


def test_a_film_without_a_history_calibrates_nothing(spec: ModelSpec) -> None:
    with pytest.raises(ConfigError, match=r"no block of the film had a history; .* --blocks"):
        calibrate([make_shot(spec)], 1, CPU, lambda line: None)
