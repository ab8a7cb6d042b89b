"""One shot on a gang: rank 0 renders it as a process alone does, the others follow.

What a rank has of a shot is its heads' share of the history: arena, host pool, journal and chunks on the disk. Rank 0
has beside it what exists once: latents, video, metrics, prompts, the text encoder and the VAE. The others are told
which shot to render and where it stands, and run the same blocks::

    rank 0   FilmRenderer -> GangRenderer --task--> ShotRenderer: folder, prompts, blocks, latents, segments
    rank n   serve <---------------------- task --> ShotRenderer: heads,            blocks
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor

from longtake.engine.config import ShotConfig
from longtake.engine.gang import Gang
from longtake.engine.gang_failure import exit_code
from longtake.engine.latents import LatentLog
from longtake.engine.retention import Retention
from longtake.engine.rolling import WindowStore
from longtake.engine.rollout import Rollout
from longtake.engine.shotcache import open_folders
from longtake.engine.shotfolder import LATENTS_NAME
from longtake.engine.timeline import Timeline
from longtake.kernels.errors import LongtakeError, StorageError

if TYPE_CHECKING:
    from longtake.engine.shot import BlockProgress, ShotRenderer, ShotResult


@dataclass(frozen=True, slots=True, kw_only=True)
class ShotTask:
    """A shot for every rank to render."""

    shot: ShotConfig
    folder: Path
    device: str


class RankFolder:
    """A shot's folder as a rank other than 0 has it: its heads of the history. Closes as ShotFolder does.

    Args:
        shot: what is rendered.
        path: its folder.
        gang: of this rank.
        heads: of the model, that it keeps.

    Raises:
        LockedError, ConfigError, StorageError, DiskFullError: as ShotFolder.
    """

    def __init__(self, shot: ShotConfig, path: Path, gang: Gang, heads: range) -> None:
        self._path = path
        self.num_prefix = shot.after_blocks
        timeline = Timeline(shot, self.num_prefix)
        self.runs = open_folders(shot, path, gang, heads, timeline, gang.minimum)

    @property
    def latents(self) -> LatentLog:
        """The clean latents that rank 0 keeps, to be read."""
        return LatentLog.existing(self._path / LATENTS_NAME)

    @property
    def finished(self) -> bool:
        """Rank 0 knows."""
        return False

    @property
    def paths(self) -> tuple[Path, ...]:
        """Rank 0 has the video."""
        return ()

    def mend(self, error: StorageError) -> None:
        """Rank 0 knows what to do about damage, and says so."""

    def __enter__(self) -> RankFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for run in reversed(self.runs):
            run.close(orderly=error is None)


class ReadWindows(WindowStore):
    """The rolling window that rank 0 keeps: the same on every rank, so the others only read it."""

    def write(self, block: int, noisy: dict[int, Tensor]) -> None:
        """Nothing."""


def resting(gang: Gang, *waits: Callable[[], None]) -> Callable[[bool], None]:
    """What `Rollout.rest` is on a gang: when any rank records, all threads of all ranks leave their devices alone.

    Args:
        gang: that renders.
        waits: each ends when some of this rank's threads do; rank 0's decoder ends with those of the others.
    """

    def rest(due: bool) -> None:
        if gang.any(due):
            for wait in waits:
                wait()
            gang.any(False)

    return rest


def follow(gang: Gang, shot: ShotConfig, rollout: Rollout, stop: Callable[[], bool]) -> None:
    """The main loop of a rank other than 0: the blocks that rank 0 renders, until any rank is to stop."""
    retention = Retention(shot.cache.keep, rollout.timeline, rollout.cache, gang, None)
    rollout.rest = resting(gang, rollout.cache.flush)
    while rollout.next_block < shot.num_blocks and not gang.any(stop()):
        rollout.step()
        retention(rollout.cache.flush)
    rollout.cache.flush()
    retention(rollout.cache.flush)


class GangRenderer:
    """What rank 0's ``jobs`` calls to render a shot: as ShotRenderer, with the other ranks.

    Args:
        gang: with its other ranks in :func:`serve`.
        render: of this rank.
    """

    def __init__(self, gang: Gang, render: ShotRenderer) -> None:
        self._gang, self._render = gang, render

    def __call__(
        self,
        shot: ShotConfig,
        folder: Path,
        device_name: str,
        *,
        stop: Callable[[], bool],
        progress: Callable[[BlockProgress], None],
    ) -> ShotResult:
        """As ``ShotRenderer.__call__``.

        Raises:
            ConfigError: the heads of the model cannot be dealt to this gang, or the device is one GPU.
            GangError: another rank failed or died.
        """
        # what every rank would refuse alike is refused here, once
        self._gang.mesh_shape(shot.model.transformer.num_heads)
        self._gang.device(device_name)
        self._gang.tell(ShotTask(shot=shot, folder=folder, device=device_name))
        return self._render(shot, folder, device_name, stop=stop, progress=progress)


def serve(gang: Gang, render: ShotRenderer, stop: Callable[[], bool]) -> int:
    """A rank other than 0: render what rank 0 says until it has nothing more to say.

    Rank 0 tells the user what went wrong, here or there; only when it is gone does another one.

    Args:
        gang: not yet entered.
        render: of this rank.
        stop: whether this process was asked to stop.

    Returns:
        The exit code of this process.
    """
    try:
        with gang:
            while (task := gang.receive()) is not None:
                render(task.shot, task.folder, task.device, stop=stop, progress=lambda _: None)
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, Exception) and not isinstance(error, LongtakeError):
            traceback.print_exception(error)  # of which rank 0 knows a line
        if gang.speaks:
            print(f"longtake: {error}", file=sys.stderr)
        return exit_code(error)
    return gang.dismissed_with
