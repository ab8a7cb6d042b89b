"""The table of a model's heads: what is summed up against autograd, what the matrices do, and the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longtake.engine.basis import BASIS_NAME, basis_bytes, basis_hash, read_basis, write_basis
from longtake.engine.calibrate import LEAST, PLAIN_SHARE, HeadMoments, calibrate, turn, with_plain
from longtake.engine.config import ModelSpec, ShotConfig
from longtake.engine.model import CausalWan
from longtake.engine.random_model import TINY, write_random_model
from longtake.engine.rollout import Rollout, open_cache
from longtake.engine.weights import load_transformer, read_spec
from longtake.jobs.film import parse_film
from longtake.jobs.resolve import resolve
from longtake.kernels.errors import ConfigError
from longtake.kernels.rotary import apply_rotary, rotary_table
from tests.engine.small_rollout import random_contexts

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
    write_basis(calibrate([make_shot(read_spec(str(folder)))], 3, CPU, lambda line: None), folder / BASIS_NAME)
    return read_spec(str(folder))


def make_shot(spec: ModelSpec, codec: str = "bf16") -> ShotConfig:
    return resolve(parse_film(FILM.replace("bf16", codec)), lambda name: spec)["a"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_what_an_error_costs_is_what_autograd_says(model: CausalWan) -> None:
    """Sums of squared derivatives of the layer's output, by each row of keys before RoPE and of values."""
    moments, dim, keys = HeadMoments(model), model.config.head_dim, 12
    q_SD, k_XD, v_XD = normal(5, dim), normal(keys, dim, seed=1), normal(keys, dim, seed=2)
    tables = [rotary_table([position], 2, 3, dim) for position in (3.0, 8.0)]
    turns = [  # what is kept of tables may be of inference, where autograd cannot follow
        replace(one, temporal_YP2=one.temporal_YP2.clone(), spatial_SQ2=one.spatial_SQ2.clone()) for one in tables
    ]

    def turned(k_XD: Tensor) -> Tensor:
        parts = zip(k_XD.split(6), turns, strict=True)
        return torch.cat([apply_rotary(k[:, None], rotary)[:, 0] for k, rotary in parts])

    moments.add_queries(1, 1, q_SD, turned(k_XD), v_XD, turns)
    weight = model.blocks[1].get_parameter("attn1.to_out.0.weight")[:, dim : 2 * dim]

    def output(k_XD: Tensor, v_XD: Tensor) -> Tensor:
        return torch.softmax(q_SD @ turned(k_XD).T / dim**0.5, dim=-1) @ v_XD @ weight.T

    by_k, by_v = torch.autograd.functional.jacobian(output, (k_XD, v_XD))
    for slope_SMXD, got_DD in (
        (by_k, moments.queries_LHDD[1, 1]),
        (by_v, moments.weight_LH[1, 1] * moments.output_LHDD[1, 1]),
    ):
        want_DD = torch.einsum("smxd,smxe->de", slope_SMXD, slope_SMXD)
        torch.testing.assert_close(got_DD.float(), want_DD, rtol=1e-3, atol=1e-4 * float(want_DD.abs().max()))
    assert not moments.queries_LHDD[0].any() and not moments.weight_LH[1, 0]


def test_components_do_not_go_together_and_cost_the_same() -> None:
    covariance = (mixing := normal(8, 8).double()) @ mixing.T + torch.eye(8)
    cost = with_plain((mixing := normal(8, 3, seed=1).double()) @ mixing.T)
    assert float(torch.linalg.eigvalsh(cost)[0]) == pytest.approx(PLAIN_SHARE * float(cost.diagonal().mean()))
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
    moments, (heads, dim) = HeadMoments(model), (model.config.num_heads, model.config.head_dim)
    k_THD, v_THD = normal(20, heads, dim) + 5, normal(20, heads, dim, seed=1)
    for _ in range(2):
        moments.add_block(0, k_THD, v_THD)
    x_TE = torch.cat((k_THD[:, 1], v_THD[:, 1]), dim=-1)
    torch.testing.assert_close(moments.joint_LHEE[0, 1].float(), 2 * 19 * torch.cov(x_TE.T), rtol=1e-4, atol=1e-4)


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
    assert shot.history_basis == basis_hash(spec.path) and make_shot(spec).history_basis is None
    heads = range(2)
    with pytest.raises(ConfigError, match="is not the table that this film goes with"):
        read_basis(spec, heads, CPU, "0" * 16)
    other = replace(spec, path=tmp_path)
    with pytest.raises(ConfigError, match=r"history_basis\.safetensors, which is not there; .* longtake calibrate"):
        make_shot(other, "pc2")
    write_basis(torch.zeros(2, 2, 4, 4, dtype=torch.bfloat16), tmp_path / BASIS_NAME)
    with pytest.raises(ConfigError, match="is of another model"):
        read_basis(other, heads, CPU)
    (tmp_path / BASIS_NAME).write_bytes(b"no table")
    with pytest.raises(ConfigError, match="is damaged"):
        read_basis(other, heads, CPU)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_basis(torch.zeros(1), tmp_path / "none" / BASIS_NAME)
