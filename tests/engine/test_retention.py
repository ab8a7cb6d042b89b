"""History that is deleted when nothing can read it any more: never too early, and the disk stays within its budget."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from longtake.engine.config import (
    BeatConfig,
    CacheConfig,
    HistoryConfig,
    HistoryPolicy,
    Keep,
    SamplerConfig,
    ShotConfig,
    Switch,
    WriteBack,
)
from longtake.engine.random_model import write_random_model
from longtake.engine.shot import ShotRenderer, ShotResult
from longtake.engine.shotcache import kv_shape
from longtake.engine.timeline import Timeline
from longtake.engine.weights import read_spec
from longtake.kernels.errors import ConfigError, StorageError
from longtake.offload.errors import DiskFullError
from longtake.offload.run import kept_blocks
from longtake.offload.verify import verify


@pytest.fixture(scope="module")
def shot(tmp_path_factory: pytest.TempPathFactory) -> ShotConfig:
    """Twelve blocks, a sink and two blocks attended."""
    spec = read_spec(str(write_random_model(tmp_path_factory.mktemp("model"))))
    return ShotConfig(
        name="shot",
        model=spec,
        num_frames=93,
        fps=spec.fps,
        height=spec.height,
        width=spec.width,
        seed=5,
        beats=(BeatConfig(at_s=0, prompt="a"), BeatConfig(at_s=6, prompt="b", switch=Switch.RECACHE)),
        sampler=spec.sampler,
        history=spec.history,
        cache=CacheConfig(keep=Keep.NEEDED),
    )


def render(shot: ShotConfig, folder: Path, blocks: int = 1000) -> ShotResult:
    """Render at most so many blocks."""
    counts = iter(range(blocks))
    return ShotRenderer()(shot, folder, "cpu", stop=lambda: next(counts, None) is None, progress=lambda progress: None)


def chunks(folder: Path) -> set[int]:
    return {int(path.name.split(".")[1]) for path in folder.glob("kv.zarr/*/c.*")}


def video(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "segments").iterdir())]


def test_what_later_entries_read_is_never_dropped(shot: ShotConfig) -> None:
    chooser = random.Random(0)
    for _ in range(60):
        beats = tuple(
            BeatConfig(at_s=at, prompt=str(at), switch=chooser.choice(list(Switch)) if at else Switch.KEEP)
            for at in sorted({0, *(chooser.randrange(1, 11) for _ in range(3))})
        )
        history = HistoryConfig(
            policy=chooser.choice([HistoryPolicy.FULL, HistoryPolicy.WINDOW]),
            sink_blocks=chooser.randrange(3),
            recent_blocks=chooser.randrange(1, 5),
        )
        rebuild = chooser.random() < 0.2 and history.policy is HistoryPolicy.WINDOW and not history.sink_blocks
        sampler = SamplerConfig(write_back=WriteBack.REBUILD if rebuild else WriteBack.CLEAN)
        other = dataclasses.replace(shot, beats=beats, history=history, sampler=sampler)
        try:
            timeline = Timeline(other, chooser.randrange(3))
        except ConfigError:  # switches that this sampler does not have
            continue
        read_from: set[int] = set()
        for index in reversed(range(timeline.num_entries)):
            read_from.update(*timeline.reads(index))
            assert set(timeline.needed_later(index)) >= {block for block in read_from if block < index}


def test_the_same_video_from_a_disk_that_holds_little(shot: ShotConfig, tmp_path: Path) -> None:
    all_kept = dataclasses.replace(shot, cache=CacheConfig())
    render(all_kept, tmp_path / "all")
    num_entries = Timeline(shot, 0).num_entries
    assert chunks(tmp_path / "all") == set(range(num_entries))
    block_bytes = kv_shape(shot).block_bytes
    budget = CacheConfig(keep=Keep.NEEDED, host_bytes=3 * block_bytes, disk_bytes=6 * block_bytes)
    tight = dataclasses.replace(shot, cache=budget)
    most = 0
    for _ in range(3):  # stopped and gone on with
        render(tight, tmp_path / "tight", 3)
        most = max(most, len(chunks(tmp_path / "tight")))
        assert verify(tmp_path / "tight") == []
    assert render(tight, tmp_path / "tight").finished
    assert 3 <= most <= 6 and not chunks(tmp_path / "tight")
    assert kept_blocks(tmp_path / "tight", shot.model.transformer.num_heads) == 0
    assert video(tmp_path / "tight") == video(tmp_path / "all")


def test_a_budget_below_what_is_needed_is_a_full_disk(shot: ShotConfig, tmp_path: Path) -> None:
    block_bytes = kv_shape(shot).block_bytes
    tight = dataclasses.replace(shot, cache=CacheConfig(keep=Keep.NEEDED, disk_bytes=3 * block_bytes))
    with pytest.raises(DiskFullError, match="disk budget"):
        render(tight, tmp_path / "shot")
    render(shot, tmp_path / "shot")
    assert not chunks(tmp_path / "shot")


def test_going_back_behind_what_was_deleted_is_refused(shot: ShotConfig, tmp_path: Path) -> None:
    assert not render(shot, tmp_path / "shot", 6).finished
    (tmp_path / "shot" / "latents.zarr" / "c.2.0.0.0.0").unlink()
    before = (tmp_path / "shot" / "journal").read_bytes()
    for _ in range(2):
        with pytest.raises(StorageError, match=r"reads block 1, which was deleted .* --fresh"):
            render(shot, tmp_path / "shot")
        assert (tmp_path / "shot" / "journal").read_bytes() == before


def test_a_finished_shot_whose_last_blocks_were_not_deleted(shot: ShotConfig, tmp_path: Path) -> None:
    """As one is left that is killed between its last segment and the deletion."""
    render(dataclasses.replace(shot, cache=CacheConfig()), tmp_path / "shot")
    assert chunks(tmp_path / "shot")
    assert render(shot, tmp_path / "shot").finished
    assert not chunks(tmp_path / "shot")
