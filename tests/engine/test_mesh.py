"""Which rank holds what, and the collectives along both axes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longtake.engine.gang import join
from longtake.engine.mesh import MeshShape, open_mesh, parse_mesh, share, wait
from longtake.engine.place import place
from longtake.kernels.errors import ConfigError
from tests.engine.gangs import run_ranks


@pytest.mark.parametrize("num_heads", [4, 12, 40])
def test_every_head_has_one_rank(num_heads: int) -> None:
    for tp in range(1, num_heads + 1):
        for sp in range(1, num_heads + 1):
            shape = MeshShape(tp=tp, sp=sp)
            if num_heads % shape.size:
                continue
            shape.check(num_heads)
            heads = [shape.heads(rank, num_heads) for rank in range(shape.size)]
            assert [head for own in heads for head in own] == list(range(num_heads))
            for rank, own in enumerate(heads):
                weights = shape.weight_heads(rank, num_heads)
                assert set(own) <= set(weights)
                assert len(weights) == num_heads // tp
                peers = [other for other in range(shape.size) if shape.coordinates(other)[0] == rank // sp]
                assert sorted(head for peer in peers for head in heads[peer]) == list(weights)


@pytest.mark.parametrize(("tp", "sp"), [(5, 1), (1, 8), (2, 4), (0, 1)])
def test_heads_that_cannot_be_dealt(tp: int, sp: int) -> None:
    with pytest.raises(ConfigError, match="use one of 1, 2, 3, 4, 6, 12 processes"):
        MeshShape(tp=tp, sp=sp).check(12)


def test_uneven_shares_cover_everything() -> None:
    parts = [share(8960, index, 3) for index in range(3)]
    assert [position for part in parts for position in part] == list(range(8960))
    assert {len(part) for part in parts} == {2986, 2987}


def test_meshes_in_words() -> None:
    assert parse_mesh("tp=2, sp=4") == MeshShape(tp=2, sp=4)
    assert parse_mesh("sp=4") == MeshShape(sp=4)
    assert parse_mesh("tp=4,norms") == MeshShape(tp=4, split_norms=True)
    for wrong in ("", "4", "tp=0", "tp=two", "xp=2"):
        with pytest.raises(ConfigError):
            parse_mesh(wrong)


def collect(rank: int) -> dict[str, Any]:
    with join() as gang:
        mesh = open_mesh(MeshShape(tp=2, sp=2))
        with torch.inference_mode():
            x = torch.tensor([[10.0 * rank], [10.0 * rank + 1]])
            started = mesh.tp.start_all_reduce(x.clone())
            found = {
                "place": (mesh.tp.index, mesh.sp.index),
                "sum tp": mesh.tp.all_reduce(x.clone()).flatten().tolist(),
                "gather sp": mesh.sp.all_gather(x).flatten().tolist(),
                "scatter tp": mesh.tp.reduce_scatter(x).flatten().tolist(),
                "exchange sp": mesh.sp.all_to_all(x).flatten().tolist(),
                "started": wait(started).flatten().tolist(),
            }
        with pytest.raises(ConfigError, match="needs 2 processes, not 4"):
            open_mesh(MeshShape(tp=2))
        gang.any(False)
        return found


def test_collectives_along_both_axes() -> None:
    found = run_ranks(collect, 4)
    assert [one["place"] for one in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert found[0]["sum tp"] == found[2]["sum tp"] == found[0]["started"] == [20, 22]  # ranks 0 and 2
    assert found[3]["sum tp"] == [40, 42]
    assert found[0]["gather sp"] == found[1]["gather sp"] == [0, 1, 10, 11]
    assert [one["scatter tp"] for one in found] == [[20], [40], [22], [42]]
    assert [one["exchange sp"] for one in found] == [[0, 10], [1, 11], [20, 30], [21, 31]]


@pytest.mark.parametrize(
    ("size", "said", "graphs"), [(1, None, False), (4, None, True), (4, "0", False), (1, "1", True)]
)
def test_passes_are_recorded_where_processes_share_a_shot(
    size: int, said: str | None, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(size))
    monkeypatch.delenv("LONGTAKE_GRAPHS", raising=False)
    if said is not None:
        monkeypatch.setenv("LONGTAKE_GRAPHS", said)
    assert place().graphs == graphs
