"""Shots on gangs of processes: the same film as alone, go on with any number of them, and lose one."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.engine.config import (
    BeatConfig,
    CacheConfig,
    HistoryConfig,
    HistoryPolicy,
    Keep,
    ModelConfig,
    ShotConfig,
)
from longtake.engine.gang import join
from longtake.engine.gang_failure import GangError
from longtake.engine.gang_shot import GangRenderer, resting, serve
from longtake.engine.latents import LatentLog
from longtake.engine.random_model import write_random_model
from longtake.engine.shot import ShotRenderer
from longtake.engine.shotfolder import LATENTS_NAME, METRICS_NAME
from longtake.engine.video import probe
from longtake.engine.weights import read_spec
from longtake.offload.run import committed_blocks
from tests.engine.gangs import RankError, run_ranks

# float32 sums in another order, and a few blocks that feed on each other; latents are of order 1.
TOLERANCE = 1e-3

FOUR_HEADS = ModelConfig(num_heads=4, head_dim=24, num_layers=2, ffn_dim=90, text_dim=32, freq_dim=32)
NUM_BLOCKS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model") / "four", transformer=FOUR_HEADS)


RETRIEVE = HistoryConfig(policy=HistoryPolicy.RETRIEVE, sink_blocks=0, recent_blocks=1, retrieved_blocks=2)


def make_shot(model: Path, keep: Keep = Keep.ALL) -> ShotConfig:
    spec = read_spec(str(model))
    return ShotConfig(
        name="arrival",
        model=spec,
        num_frames=1 + 4 * (NUM_BLOCKS * spec.block_frames - 1),
        fps=spec.fps,
        height=spec.height,
        width=spec.width,
        seed=7,
        beats=(BeatConfig(at_s=0, prompt="pan right"), BeatConfig(at_s=2, prompt="a boat")),
        sampler=spec.sampler,
        history=RETRIEVE if model.name == "retrieve" else spec.history,
        cache=CacheConfig(keep=keep),
    )


def render(
    rank: int,
    model: Path,
    folders: tuple[Path, ...],
    stop_after: tuple[int, int] | None,
    die: int | None,
    keep: Keep = Keep.ALL,
) -> dict[str, Any]:
    """One rank renders the shot in its folder.

    Args:
        folders: of each rank; the last one is of all further ranks.
        stop_after: (rank that is asked to stop, blocks after which it is).
        die: block before which the last rank is killed.
    """
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        if die is not None and asked == die + 1 and rank == gang.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return stop_after is not None and stop_after[0] == rank and asked > stop_after[1]

    with join() as gang:
        renderer = ShotRenderer(gang)
        folder = folders[min(rank, len(folders) - 1)]
        blocks: list[int] = []
        result = renderer(
            make_shot(model, keep), folder, "cpu", stop=stop, progress=lambda report: blocks.append(report.block)
        )
        decoders = int(renderer._decoder is not None)
        return {"finished": result.finished, "blocks": blocks, "asked": asked, "decoders": decoders}


def run(
    num_ranks: int,
    model: Path,
    *folders: Path,
    stop_after: tuple[int, int] | None = None,
    die: int | None = None,
    mesh: str = "",
    keep: Keep = Keep.ALL,
) -> list[Any]:
    return run_ranks(render, num_ranks, model, folders, stop_after, die, keep, LONGTAKE_MESH=mesh)


def latents(folder: Path) -> Tensor:
    return LatentLog.existing(folder / LATENTS_NAME).read(0, NUM_BLOCKS)


def chunks(folder: Path, first: int, last: int) -> dict[str, tuple[str, int]]:
    """Content and time of change of the payload files of some blocks."""
    files = {path: int(path.name.split(".")[1]) for path in folder.glob("kv.zarr/*/c.*")}
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path, block in files.items()
        if first <= block < last
    }


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """The film's latents from one process."""
    folder = tmp_path_factory.mktemp("alone") / "arrival"
    assert run(1, model, folder)[0]["finished"]
    return latents(folder)


@pytest.mark.parametrize(("num_ranks", "mesh"), [(2, "sp=2"), (2, "tp=2"), (4, "tp=2,sp=2")])
def test_the_same_film_as_alone(num_ranks: int, mesh: str, model: Path, tmp_path: Path, alone: Tensor) -> None:
    folder = tmp_path / "arrival"
    found = run(num_ranks, model, folder, mesh=mesh)
    assert all(one["finished"] for one in found), found
    assert found[0]["blocks"] == list(range(1, NUM_BLOCKS + 1))
    assert [one["decoders"] for one in found] == [1] + [0] * (num_ranks - 1)
    torch.testing.assert_close(latents(folder), alone, rtol=0, atol=TOLERANCE)
    assert sorted(path.name for path in folder.glob("journal*")) == [
        "journal" if rank == 0 else f"journal.{rank}" for rank in range(num_ranks)
    ]
    assert probe(next((folder / "segments").iterdir())).frames == make_shot(model).num_frames


def test_go_on_with_4_then_2_then_1_then_4(model: Path, tmp_path: Path, alone: Tensor) -> None:
    """What was committed before a change of the gang's size stays as it is, byte for byte and untouched."""
    folder = tmp_path / "arrival"
    kept: dict[str, tuple[str, int]] = {}
    for num_ranks, done in ((4, 2), (2, 3), (1, 5), (4, 6)):
        before = committed_blocks(folder, 4) if folder.exists() else 0
        stop_after = (num_ranks - 1, done - before) if done < NUM_BLOCKS else None
        found = run(num_ranks, model, folder, stop_after=stop_after)
        assert all(one["finished"] is (done == NUM_BLOCKS) for one in found), found
        assert committed_blocks(folder, 4) == done
        assert chunks(folder, 0, before) == kept
        kept = chunks(folder, 0, done)
        assert len(kept) == 4 * done
    torch.testing.assert_close(latents(folder), alone, rtol=0, atol=TOLERANCE)


def test_history_that_nothing_reads_is_deleted_by_every_rank(model: Path, tmp_path: Path, alone: Tensor) -> None:
    folder = tmp_path / "arrival"
    for num_ranks, done, kept_blocks in ((2, 3, {0, 1, 2}), (1, 5, {0, 3, 4}), (2, NUM_BLOCKS, set())):
        before = committed_blocks(folder, 4) if folder.exists() else 0
        stop_after = (num_ranks - 1, done - before) if done < NUM_BLOCKS else None
        run(num_ranks, model, folder, stop_after=stop_after, keep=Keep.NEEDED)
        assert committed_blocks(folder, 4) == done
        kept = {int(path.name.split(".")[1]) for path in folder.glob("kv.zarr/*/c.*")}
        assert kept == kept_blocks and len(list(folder.glob("kv.zarr/*/c.*"))) == 4 * len(kept)
    torch.testing.assert_close(latents(folder), alone, rtol=0, atol=TOLERANCE)


def test_ranks_bring_the_same_blocks_back(model: Path, tmp_path: Path) -> None:
    """Each sees the keys of its heads alone; a gang of another size goes on with what the journals keep of them."""
    (tmp_path / "retrieve").symlink_to(model)
    found = {}
    for name, ranks in (("alone", (1, 1)), ("tp", (2, 2)), ("changing", (2, 1))):
        folder = tmp_path / name
        run(ranks[0], tmp_path / "retrieve", folder, stop_after=(0, 4), mesh="tp=2" if ranks[0] == 2 else "")
        assert committed_blocks(folder, 4) == 4
        assert all(one["finished"] for one in run(ranks[1], tmp_path / "retrieve", folder))
        lines = (folder / METRICS_NAME).read_text().splitlines()
        found[name] = [json.loads(line)["retrieved"] for line in lines]
        torch.testing.assert_close(latents(folder), latents(tmp_path / "alone"), rtol=0, atol=TOLERANCE)
    assert found["alone"][:3] == [[], [], [0]]
    assert [len(times) for times in found["alone"][3:]] == [2, 2, 2]
    assert found["tp"] == found["changing"] == found["alone"]


def test_one_rank_is_asked_to_stop(model: Path, tmp_path: Path) -> None:
    found = run(2, model, tmp_path / "arrival", stop_after=(1, 3))
    assert [one["finished"] for one in found] == [False, False]
    assert [one["asked"] for one in found] == [4, 4]
    assert committed_blocks(tmp_path / "arrival", 4) == 3


def test_a_killed_rank_and_going_on(model: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(2, model, whole)[0]["finished"]
    found = run(2, model, broken, die=3)
    assert isinstance(found[0], GangError | RankError), found
    assert str(found[1]) == f"died with {-signal.SIGKILL}"
    # blocks whose K/V or latents were on their way to the disk are rendered again
    done = min(committed_blocks(broken, 4), LatentLog.existing(broken / LATENTS_NAME).num_written())
    assert done <= 3
    kept = chunks(broken, 0, done)
    assert all(one["finished"] for one in run(2, model, broken))
    assert chunks(broken, 0, done) == kept
    assert torch.equal(latents(broken), latents(whole))  # the same number of ranks: bit for bit


def test_ranks_that_see_different_journals(model: Path, tmp_path: Path) -> None:
    """Two disks, of which one missed the last blocks: all go back to what both have."""
    whole, first, second = tmp_path / "whole", tmp_path / "first", tmp_path / "second"
    assert run(2, model, whole)[0]["finished"]
    run(2, model, first, stop_after=(0, 2))
    shutil.copytree(first, second)
    run(2, model, first, stop_after=(0, 2))
    assert (committed_blocks(first, 4), committed_blocks(second, 4)) == (4, 2)
    found = run(2, model, first, second)
    assert all(one["finished"] for one in found), found
    assert found[0]["blocks"] == [2, 3, 4, 5, 6]
    assert torch.equal(latents(first), latents(whole))


def fail(rank: int, model: Path, folder: Path) -> tuple[int, str]:
    """The way of ``longtake render``: rank 0 leads, the other one follows; its exit code and what it says."""
    gang = join()
    if rank == 1:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = serve(gang, ShotRenderer(gang), lambda: False)
        return code, said.getvalue()
    with gang:
        GangRenderer(gang, ShotRenderer(gang))(
            make_shot(model), folder, "cpu", stop=lambda: False, progress=lambda _: None
        )
    return 0, ""


@pytest.mark.parametrize("leader_fails", [True, False])
def test_a_folder_that_one_rank_cannot_open(leader_fails: bool, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "arrival"
    (folder / ("lock" if leader_fails else "lock.1")).mkdir(parents=True)
    found = run_ranks(fail, 2, model, folder)
    assert f"rank {0 if leader_fails else 1}" in str(found[0])
    assert found[1] == (1, "")  # rank 0 speaks, in the command line


FILM = """\
[film]
model = "{model}"
seed = 3
[[shot]]
name = "arrival"
duration = "2s"
prompt = "pan right"
[[shot]]
name = "quay"
duration = "1.5s"
after = "arrival"
prompt = "pan left"
"""


def torchrun(num_ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), "--no-python"]
    longtake = str(Path(sys.executable).with_name("longtake"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, longtake, *arguments], capture_output=True, text=True, timeout=240, env=environment, check=False
    )


@pytest.mark.slow
def test_longtake_render_under_torchrun(model: Path, tmp_path: Path) -> None:
    film, out = tmp_path / "film.toml", tmp_path / "out"
    film.write_text(FILM.format(model=model))
    done = torchrun(2, "render", str(film), "--out", str(out), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{out}/film.mp4"
    assert probe(out / "film.mp4").frames == 21 + 12


@pytest.mark.slow
def test_bad_input_under_torchrun_is_said_once(model: Path, tmp_path: Path) -> None:
    film = tmp_path / "film.toml"
    film.write_text(FILM.format(model=model))
    failed = torchrun(3, "render", str(film), "--out", str(tmp_path / "out"), "--device", "cpu")
    assert failed.returncode != 0
    assert failed.stderr.count("longtake: a gang of 3 (tp=1, sp=3) cannot share 4 heads evenly") == 1


def rest_together(rank: int) -> list[list[str]]:
    done: list[list[str]] = []
    with join() as gang:
        for due in (False, rank == 1, True):
            waited: list[str] = []
            resting(gang, lambda: waited.append("cache"), lambda: waited.append("decoder"))(due)  # noqa: B023
            done.append(waited)
    return done


def test_all_ranks_rest_where_one_records() -> None:
    """A rank whose recording found no room asks for none, and must not leave the others waiting."""
    both = ["cache", "decoder"]
    assert run_ranks(rest_together, 2) == [[[], both, both]] * 2
