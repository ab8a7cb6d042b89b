"""What comes back into view: the right blocks, by a plain count; the same ones after a resume; room for all of them."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longtake.engine.config import CacheConfig, HistoryConfig, HistoryPolicy, ShotConfig
from longtake.engine.essence import fingerprint
from longtake.engine.history import Candidates
from longtake.engine.model import CausalWan
from longtake.engine.retrieval import Choice, Retriever
from longtake.engine.rollout import Prefix, Rollout
from longtake.engine.shotcache import kv_shape, open_cache
from longtake.kernels.errors import CapacityError, StorageError
from longtake.offload.cache import KVCache
from longtake.offload.run import RunDirectory
from tests.engine import small_rollout
from tests.engine.small_rollout import GEOMETRY, random_contexts

CPU = torch.device("cpu")
NOTHING = Prefix()
RETRIEVE = HistoryConfig(policy=HistoryPolicy.RETRIEVE, sink_blocks=1, recent_blocks=2, retrieved_blocks=2)


def make_shot(num_blocks: int, codec: str = "bf16", history: HistoryConfig = RETRIEVE, after: int = 0) -> ShotConfig:
    return small_rollout.make_shot(history, codec, num_blocks, size=(32, 96), after_blocks=after)


def make_rollout(
    shot: ShotConfig, model: CausalWan, prefix: Prefix = NOTHING, run: RunDirectory | None = None
) -> Rollout:
    cache = open_cache(shot, CPU, len(prefix.latents), () if run is None else (run,))
    return Rollout(shot, model, random_contexts(model, 1), cache, prefix)


def pan(positions: list[int], ring: int = 58) -> tuple[Tensor, ...]:
    """Blocks that look into a ring of random columns, two columns further with each latent frame."""
    panorama = torch.randn(4, 4, ring, generator=torch.Generator().manual_seed(1))
    return tuple(
        torch.stack([panorama[:, :, [(at + frame + x) % ring for x in range(12)]] for frame in (0, 2)], dim=1)
        for at in positions
    )


def brought_back(model: CausalWan, positions: list[int]) -> list[tuple[int, ...]]:
    """What comes back for each block of a film that is given."""
    shot = make_shot(1, after=len(positions))
    rollout = make_rollout(shot, model, Prefix(latents=pan(positions)))
    found = []
    for _ in positions:
        rollout.step()
        found.append(rollout.retrieved)
    return found


def test_a_place_seen_one_turn_ago_comes_back(model: CausalWan) -> None:
    """A turn takes 14.5 blocks: the two that show what the block will show, before it was drawn."""
    found = brought_back(model, [4 * block for block in range(34)])
    assert found[:5] == [(), (), (), (), (1,)]
    for time in range(16, 31):
        assert found[time] == (time - 15, time - 14)
    for time in range(31, 34):  # two turns are 29 blocks, on which the views fall together
        assert found[time] == (time - 29, time - 14)


def test_a_place_is_known_from_the_other_side(model: CausalWan) -> None:
    """The camera turns round at block 10: what it passes again was seen in reverse order."""
    found = brought_back(model, [4 * (block if block < 10 else 18 - block) for block in range(18)])
    for time in range(14, 18):
        assert 18 - time in found[time], found


def nearest(known: Tensor, candidates: Candidates, num: int) -> list[tuple[int, int]]:
    """The choice by hand: (block, where it went), for float16 [E, H, D]."""
    rows = known[list(candidates.entries)].double()

    def row(last: int) -> list[float]:
        heads = (rows - rows[last]).square().sum(-1)
        return [float(value) for value in (heads / heads.mean(0)).sum(-1)]

    one, two = row(-1), row(-2)
    scores = []
    for time in candidates.times:
        at = time - candidates.first
        on = one[max(0, at - 1)] + two[max(0, at - 2)]
        back = one[at + 1] + two[at + 2] if at + 2 < len(rows) - 2 else float("inf")
        scores.append((min(on, back), -time, time, 1 if on <= back else -1))
    return sorted((time, way) for _, _, time, way in sorted(scores)[:num])


@pytest.mark.parametrize("at_once", [3, 512])
def test_choices_are_those_counted_by_hand(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtake.engine.retrieval._COMPARED_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(12, 7, 2, 8, generator=generator)
    retriever = Retriever(num_entries=12, num_heads=2, head_dim=8, count=3, device=CPU, sum_ranks=lambda x: x)
    for entry, k_THD in enumerate(keys):
        retriever.summarise(entry, k_THD)
    known = keys.mean(1).half()
    for candidates in (
        Candidates(time=10, first=0, times=range(1, 8), entries=range(10)),
        Candidates(time=9, first=3, times=range(3, 6), entries=range(3, 9)),
        Candidates(time=9, first=2, times=range(2, 7), entries=(2, 3, 4, 9, 10, 11, 8)),
        Candidates(time=4, first=0, times=range(1, 2), entries=range(4)),
    ):
        expected = nearest(known, candidates, 3)
        assert retriever.choose(candidates) == tuple(time for time, _ in expected)
        likely = {time + 2 * way for time, way in expected} & {*range(4, 20)}
        assert retriever.expected(candidates.time + 2, range(4, 20)) == tuple(sorted(likely))


def test_of_equal_blocks_the_newest_comes_back() -> None:
    retriever = Retriever(num_entries=9, num_heads=1, head_dim=4, count=2, device=CPU, sum_ranks=lambda x: x)
    for entry in range(9):
        retriever.summarise(entry, torch.ones(3, 1, 4))
    assert retriever.choose(Candidates(time=9, first=0, times=range(0, 7), entries=range(9))) == (5, 6)


def test_nothing_is_expected_before_a_choice() -> None:
    assert Choice(time=-1).expected(5, range(9)) == ()
    assert Choice(time=5, times=(2, 3), onward=(1, -1)).expected(7, range(1, 9)) == (1, 4)


def film_of(shot: ShotConfig, model: CausalWan, folder: Path | None, stops: tuple[int, ...] = ()) -> Tensor:
    """All blocks; stopped and opened again before some, with what is on the disk alone."""
    blocks: list[Tensor] = []
    for until in (*stops, shot.num_blocks):
        with contextlib.ExitStack() as stack:
            run = None
            if folder is not None:
                run = RunDirectory(folder, shape=kv_shape(shot), config_hash=fingerprint(shot))
                stack.callback(run.close)
            rollout = make_rollout(shot, model, run=run)
            stack.callback(rollout.cache.close)
            assert rollout.next_block == len(blocks)
            blocks += [rollout.step() for _ in range(until - len(blocks))]
    return torch.stack(blocks)


def test_goes_on_to_the_same_bytes(model: CausalWan, tmp_path: Path) -> None:
    """The device holds what one block attends, the host six blocks; the rest comes from the disk."""
    shot = make_shot(16, codec="int4", history=replace(RETRIEVE, recent_blocks=1, retrieved_blocks=3))
    whole = film_of(shot, model, None)
    assert torch.equal(film_of(shot, model, tmp_path / "undisturbed"), whole)
    assert torch.equal(film_of(shot, model, tmp_path / "stopped", stops=(1, 4, 9, 15)), whole)
    window = replace(RETRIEVE, policy=HistoryPolicy.WINDOW, recent_blocks=1, retrieved_blocks=0)
    assert not torch.equal(film_of(replace(shot, history=window), model, None), whole)


def test_the_device_holds_no_more_than_a_block_attends(model: CausalWan, tmp_path: Path) -> None:
    shot = make_shot(12)
    run = RunDirectory(tmp_path / "run", shape=kv_shape(shot), config_hash=fingerprint(shot))
    rollout = make_rollout(shot, model, run=run)
    sizes = set()
    for _ in range(12):
        rollout.step()
        sizes.add(sum(rollout.memory().values()) - rollout.memory()["host_checksums"])
    assert len(sizes) == 1
    assert isinstance(rollout.cache, KVCache) and rollout.cache.arena.num_frames == 1 + 2 + 2 + 1
    assert rollout.memory()["retrieval_summaries"] == 12 * GEOMETRY.dim * 2
    rollout.cache.close()
    run.close()


def test_a_journal_without_summaries_is_refused(model: CausalWan, tmp_path: Path) -> None:
    shot = make_shot(8)
    window = replace(shot, history=replace(RETRIEVE, policy=HistoryPolicy.WINDOW, retrieved_blocks=0))
    film_of(replace(window, num_frames=25), model, tmp_path)
    run = RunDirectory(tmp_path, shape=kv_shape(shot), config_hash=fingerprint(replace(window, num_frames=25)))
    with contextlib.closing(run), pytest.raises(StorageError, match="--fresh"):
        make_rollout(shot, model, run=run)


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_too_little_room_is_told_before_the_first_block(tier: str, model: CausalWan, tmp_path: Path) -> None:
    shot = make_shot(12)
    block = kv_shape(shot).block_bytes

    def with_room(num_blocks: int) -> ShotConfig:
        size = num_blocks * block
        budgets = {
            "device": CacheConfig(device_bytes=size),
            "host": CacheConfig(host_bytes=size),
            "disk": CacheConfig(disk_bytes=size),
        }
        return replace(shot, cache=budgets[tier])

    run = None
    if tier == "disk":
        run = RunDirectory(tmp_path / "run", shape=kv_shape(shot), config_hash=fingerprint(shot))
    with pytest.raises(CapacityError, match=f"the {tier} {12 * block:,} bytes"):
        open_cache(with_room(11), CPU, 0, () if run is None else (run,))
    open_cache(with_room(12), CPU, 0, () if run is None else (run,)).close()
    if run is not None:
        run.close()
