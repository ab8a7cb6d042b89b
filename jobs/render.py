"""``longtake render``: the shots of a film, one after the other, on this machine.

The engine renders a shot and keeps what is needed to go on; this module orders the shots, shows and records progress,
keeps what each was made from, and joins the pieces::

    DIR/<shot>/segments/*.mp4  ->  DIR/<shot>/<shot>.mp4  ->  DIR/film.mp4
"""

from __future__ import annotations

import dataclasses
import fcntl
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from longtake.engine.config import ShotConfig
from longtake.jobs.film import Film
from longtake.jobs.progress import Display, RateMeter, Report
from longtake.jobs.recipe import RECIPE_NAME, Recipe
from longtake.jobs.source import one_line
from longtake.jobs.status import FILM_NAME, ShotStatus, State, StatusFile
from longtake.kernels.errors import ConfigError, LongtakeError, WorkerError
from longtake.offload.errors import LockedError, from_os_error, is_disk_full
from longtake.offload.lock import FolderLock

if TYPE_CHECKING:
    from longtake.engine.gang import Gang

STATUS_INTERVAL_S = 0.5


class BlockProgress(Protocol):
    """What the engine tells after each block; counts are of the shot, and ``block`` is how many are done."""

    @property
    def block(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def frames_done(self) -> int: ...
    @property
    def num_frames(self) -> int: ...
    @property
    def seconds_block(self) -> float: ...  # 0 in the report of where a shot goes on
    @property
    def device_cache_bytes(self) -> int: ...


class ShotResult(Protocol):
    """How a shot's rendering ended: finished, or stopped at a block boundary with everything kept."""

    @property
    def finished(self) -> bool: ...
    @property
    def segments(self) -> Sequence[Path]: ...


class RenderShot(Protocol):
    """The engine's part: render one shot in its directory, from wherever an earlier run left it."""

    def __call__(
        self,
        shot: ShotConfig,
        folder: Path,
        device: str,
        /,
        *,
        stop: Callable[[], bool],
        progress: Callable[[BlockProgress], None],
    ) -> ShotResult: ...


class Join(Protocol):
    """Join video files into one without re-encoding; the result appears whole or not at all."""

    def __call__(self, segments: Sequence[Path], out: Path, /) -> object: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderJob:
    """One ``longtake render``: which shots of a film, where, on what."""

    film: Film
    configs: Mapping[str, ShotConfig]
    directory: Path
    device: str
    only: str | None = None
    fresh: bool = False

    def shots(self) -> list[str]:
        """Names of the shots to render, in order; with ``only``, that shot and those it starts from."""
        if self.only is None:
            return list(self.configs)
        names = [self.film.shot(self.only).name]
        while (after := self.configs[names[-1]].after) is not None:
            names.append(after)
        return names[::-1]

    @property
    def num_frames(self) -> int:
        """Video frames of the shots to render."""
        return sum(self.configs[name].num_frames for name in self.shots())

    def recipe(self, name: str) -> Recipe:
        """What a shot is rendered from, down to the first shot of its chain."""
        config = self.configs[name]
        before = self.recipe(config.after).content_hash if config.after is not None else None
        return Recipe(config=config, starts_from=before)

    def shot_directory(self, name: str) -> Path:
        """DIR/<shot>."""
        return self.directory / name

    def shot_video(self, name: str) -> Path:
        """DIR/<shot>/<shot>.mp4."""
        return self.directory / name / f"{name}.mp4"


class FilmRenderer:
    """Renders the shots of a job in order and keeps the status up to date. For one run, on the main thread.

    Each shot is locked from the start until it is done (``DIR/.<shot>.lock``), so that a second process is refused
    before it has changed anything.

    Args:
        job: what to render.
        render_shot: the engine.
        join: joins segments and shots.
        display: shows progress.
        stop: whether to stop at the next block boundary.
    """

    def __init__(
        self, job: RenderJob, *, render_shot: RenderShot, join: Join, display: Display, stop: Callable[[], bool]
    ) -> None:
        self._job = job
        self._render_shot = render_shot
        self._join = join
        self._display = display
        self._stop = stop
        self._status = StatusFile(job.directory, job.film)
        self._entries: dict[str, ShotStatus] = {}
        self._names = job.shots()
        self._written_s = 0.0
        self._num_frames = job.num_frames

    def run(self) -> bool:
        """Render all shots of the job.

        Returns:
            Whether they are finished; if not, running again continues.

        Raises:
            LockedError: another process renders one of them; nothing was changed.
            LongtakeError: a shot failed; the status says which and why.
        """
        with ExitStack() as held:
            locks = {name: held.enter_context(closing(self._lock(name))) for name in self._names}
            known = self._status.shots()
            for name in self._names:  # of a --fresh that was killed on the way
                shutil.rmtree(self._discarded(name), ignore_errors=True)
            for name in self._forget() if self._job.fresh else ():
                known.pop(name, None)
            self._entries = {name: _waiting(config, known.get(name)) for name, config in self._job.configs.items()}
            self._status.update({name: self._entries[name] for name in self._names})
            for name in self._names:
                if not self._finish_shot(name):
                    return False
                locks[name].close()
        self._join_film()
        return True

    def _lock(self, name: str) -> FolderLock:
        try:
            return FolderLock(self._job.directory / f".{name}.lock")
        except LockedError as error:
            raise LockedError(f"shot {name!r}: {error.args[0]}", path=error.path) from error

    def _finish_shot(self, name: str) -> bool:
        try:
            finished = not self._stop() and self._run_shot(name)
        except LockedError:  # the status is the other process's to write
            raise
        except BaseException as error:
            with suppress(LongtakeError):
                self._set(name, state=_state_after(error), reason=one_line(str(error)) or None)
            raise
        if not finished:
            self._set(name, state=State.PAUSED)
        return finished

    def _run_shot(self, name: str) -> bool:
        config, directory, video = self._job.configs[name], self._job.shot_directory(name), self._job.shot_video(name)
        directory.mkdir(exist_ok=True)
        self._job.recipe(name).keep_in(directory)
        frames_before = sum(self._job.configs[done].num_frames for done in self._names[: self._names.index(name)])
        if not video.exists():
            self._set(name, state=State.RUNNING)
            progress = self._progress(config, frames_before)
            result = self._render_shot(config, directory, self._job.device, stop=self._stop, progress=progress)
            if not result.finished:
                return False
            self._join(result.segments, video)
        self._set(
            name,
            state=State.SUCCEEDED,
            blocks_done=config.num_blocks,
            frames_done=config.num_frames,
            video=f"{name}/{video.name}",
        )
        self._display.shot_done(name, frames_before + config.num_frames, video)
        return True

    def _progress(self, config: ShotConfig, frames_before: int) -> Callable[[BlockProgress], None]:
        """What is done after each block of a shot that has ``frames_before`` frames of the job before it."""
        meter = RateMeter()
        frames_after = self._num_frames - frames_before - config.num_frames

        def progress(block: BlockProgress) -> None:
            if not block.seconds_block:
                meter.mark(block.block, 0.0)
                self._display.note(f"{config.name} goes on after block {block.block}/{block.num_blocks}")
                self._set(config.name, blocks_done=block.block, frames_done=block.frames_done)
                return
            block_frames = config.model.block_frames * config.model.temporal_stride
            rate = block_frames * meter.mark(block.block, block.seconds_block)
            to_render = (block.num_blocks - block.block) * block_frames
            report = Report(
                shot=config.name,
                blocks_done=block.block,
                num_blocks=block.num_blocks,
                frames_done=block.frames_done,
                num_frames=block.num_frames,
                film_frames_done=frames_before + block.frames_done,
                frames_per_s=rate,
                shot_eta_s=to_render / rate,
                film_eta_s=(to_render + frames_after) / rate,
                device_cache_bytes=block.device_cache_bytes,
            )
            self._display.report(report)
            self._set_soon(
                config.name,
                state=State.CHECKPOINT if self._stop() else State.RUNNING,
                blocks_done=report.blocks_done,
                frames_done=report.frames_done,
                frames_per_s=report.frames_per_s,
                eta_s=report.shot_eta_s,
                device_cache_bytes=report.device_cache_bytes,
            )

        return progress

    def _join_film(self) -> None:
        """DIR/film.mp4, in the film's order, once every shot of it has its video."""
        videos = [self._job.shot_video(shot.name) for shot in self._job.film.shots]
        missing = [
            video.stem for video in videos if not (video.exists() and self._job.recipe(video.stem).is_in(video.parent))
        ]
        if missing:
            self._display.note(f"{FILM_NAME} waits for: {', '.join(missing)}")
            return
        kinds = {(c.height, c.width, c.fps, c.video_codec) for c in self._job.configs.values()}
        if len(kinds) > 1:
            self._display.note(f"no {FILM_NAME}: the shots differ in size or frame rate; each has its own video")
            return
        film = self._job.directory / FILM_NAME
        with open(self._job.directory / f".{FILM_NAME}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # processes that end together join one after the other
            self._join(videos, film)
        self._status.update({})
        self._display.note(str(film))

    def _set(self, name: str, **changes: object) -> None:
        entry = dataclasses.replace(self._entries[name], **changes)  # type: ignore[arg-type]
        if entry.state not in (State.RUNNING, State.CHECKPOINT):
            entry = dataclasses.replace(entry, frames_per_s=None, eta_s=None)
        self._entries[name] = entry
        self._status.update({name: self._entries[name]})
        self._written_s = time.monotonic()

    def _set_soon(self, name: str, **changes: object) -> None:
        """As `_set`, but blocks that come quicker than the interval don't each write a file."""
        if time.monotonic() - self._written_s >= STATUS_INTERVAL_S:
            self._set(name, **changes)

    def _forget(self) -> list[str]:
        """Remove what earlier runs left of the shots to be rendered; ``--shot`` spares those it starts from.

        A folder loses its name first: a process killed on the way leaves no half of one.

        Returns:
            The shots' names.
        """
        names = self._names if self._job.only is None else [self._job.only]
        directories = [d for name in names if (d := self._job.shot_directory(name)).is_symlink() or d.exists()]
        for directory in directories:
            ours = directory.is_dir() and not directory.is_symlink()
            if not ours or not (_is_begun(directory) or (directory / RECIPE_NAME).exists()):
                raise ConfigError(f"--fresh: {directory} is no shot's directory (no {RECIPE_NAME}); remove it by hand")
        (self._job.directory / FILM_NAME).unlink(missing_ok=True)
        for directory in directories:
            shutil.rmtree(directory.rename(self._discarded(directory.name)))
        return names

    def _discarded(self, name: str) -> Path:
        return self._job.directory / f".{name}.discarded"


def _waiting(config: ShotConfig, known: ShotStatus | None) -> ShotStatus:
    """A shot's entry before its turn comes; how far it is, if an earlier run told, is kept."""
    state = State.WAITING if config.after is None else State.DEPEND
    fresh = ShotStatus(state=state, num_blocks=config.num_blocks, num_frames=config.num_frames)
    if known is None or (known.num_blocks, known.num_frames) != (config.num_blocks, config.num_frames):
        return fresh
    return dataclasses.replace(fresh, blocks_done=known.blocks_done, frames_done=known.frames_done)


def _state_after(error: BaseException) -> State:
    """What a shot is after an error: dead, unless nothing is wrong with the shot itself."""
    outside = isinstance(error, ConfigError | WorkerError) or not isinstance(error, Exception) or is_disk_full(error)
    return State.PAUSED if outside else State.DEAD


def _is_begun(directory: Path) -> bool:
    """Whether a directory holds no more than a run leaves that was killed before it had written its recipe."""
    return all(entry.name == f"{RECIPE_NAME}.partial" for entry in directory.iterdir())


def make_directory(directory: Path) -> Path:
    """Make the output directory and see that files can be written there.

    Raises:
        ConfigError: they cannot.
        DiskFullError: there is no room.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        if is_disk_full(error):
            raise from_os_error(error, "making the output directory", path=directory) from error
        message = f"--out {directory}: cannot be written ({error.strerror}); name a directory that can"
        raise ConfigError(message) from error
    return directory


def check_device(name: str | None) -> str:
    """The device to render on: the one named, or the first CUDA device if there is one.

    Args:
        name: "cpu", "cuda" or "cuda:N"; None to choose.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "cpu":
        return name
    known = re.fullmatch(r"cuda(?::(\d{1,4}))?", "cuda" if name is None else name, re.ASCII)
    if known is None:
        raise ConfigError(f"--device {name}: unknown device; write cpu, cuda or cuda:N")
    import torch  # a second or two

    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return "cuda" if num_devices else "cpu"
    if int(known[1] or 0) >= num_devices:
        have = f"this machine has {num_devices} CUDA devices" if num_devices else "no CUDA device is usable here"
        raise ConfigError(f"--device {name}: {have} (PyTorch {torch.__version__}); write --device cpu")
    return name


def engine(gang: Gang | None = None) -> tuple[RenderShot, Join]:
    """The engine's renderer, which keeps a loaded model between shots, and its joiner; imports all of PyTorch.

    Args:
        gang: whose rank 0 this process is; the others are in `follow`. None: this process alone.
    """
    from longtake.engine.gang_shot import GangRenderer
    from longtake.engine.shot import ShotRenderer
    from longtake.engine.video import join

    return (ShotRenderer() if gang is None else GangRenderer(gang, ShotRenderer(gang))), join


def follow(gang: Gang, stop: Callable[[], bool]) -> int:
    """Be another rank than 0 of a gang until rank 0 has no more use for it; returns the exit code."""
    from longtake.engine.gang_shot import serve
    from longtake.engine.shot import ShotRenderer

    return serve(gang, ShotRenderer(gang), stop)
