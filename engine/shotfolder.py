"""A shot's folder, open for rendering: locked, rolled back to what is whole, and closed as the rendering ended.

    <shot>/lock  journal  kv.zarr  forms/<name>/...  latents.zarr  window/  segments/00000.mp4 ...  metrics.jsonl

A block is done when its K/V are journaled and its latents are kept; of the two the shorter one counts, and what the
other has beyond is deleted, because blocks rendered again on another device would not match it. The journal counts
entries of the cache, the latent log blocks of the shot; the timeline knows which is which.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from longtake.engine.config import ShotConfig
from longtake.engine.gang import Gang
from longtake.engine.latents import LatentLog
from longtake.engine.segments import Segments
from longtake.engine.shotcache import open_folders
from longtake.engine.timeline import Kind, Timeline
from longtake.kernels.errors import StorageError
from longtake.offload.errors import from_os_error, is_disk_full
from longtake.offload.files import FileOps, fsync_dir
from longtake.offload.forms import blocks_by_form

LATENTS_NAME = "latents.zarr"
METRICS_NAME = "metrics.jsonl"
WINDOW_NAME = "window"


class ShotFolder:
    """The parts of an open folder. As a context manager it closes: in order, or after an error.

    Args:
        shot: what is rendered.
        path: its folder; made if it is not there.
        gang: that renders it together; this is its rank 0. None: this process alone.
        heads: of the model, that this rank keeps; None: all.

    Raises:
        LockedError: another process renders the shot.
        ConfigError: the folder is of another configuration.
        StorageError, DiskFullError: it is damaged, or cannot be written.
    """

    def __init__(self, shot: ShotConfig, path: Path, gang: Gang | None = None, heads: range | None = None) -> None:
        self.path, self._shot, self._gang = path, shot, gang or Gang()
        self.num_prefix = shot.after_blocks
        self.timeline = Timeline(shot, self.num_prefix)
        self.latents: LatentLog
        self.runs = open_folders(shot, path, self._gang, heads, self.timeline, self._whole_blocks)
        self.run = self.runs[0]
        self._kept = [self.timeline.kept(form) for form in range(len(self.runs))]
        try:
            self.latents.cut(self.num_done)
            self.segments = Segments(shot, self.run, self.timeline)
            self._sync_names()
        except BaseException:
            self._close(orderly=False)
            raise

    def _sync_names(self) -> None:
        """The names of what was made, the folder's own among them, are on the disk before anything is rendered."""
        for folder in (self.path, self.path.absolute().parent):
            try:
                fsync_dir(FileOps(), folder)
            except OSError as error:
                raise from_os_error(error, "forcing a folder to the disk", path=folder) from error

    @property
    def num_done(self) -> int:
        """Blocks of the shot that are durable."""
        if self.run.num_blocks == self.timeline.num_entries:
            return self._shot.num_blocks
        return max(0, self.timeline.entry(self.run.num_blocks).step)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.num_done == self._shot.num_blocks and self.segments.complete

    @property
    def paths(self) -> tuple[Path, ...]:
        """The whole segments, in order."""
        return self.segments.paths

    def mend(self, error: StorageError) -> str | None:
        """What to do about damage to this folder's files; None if the error tells of something else."""
        if error.block is None or error.path is None or is_disk_full(error):
            return None
        anew = f"render the shot anew with --fresh --shot {self._shot.name}"
        damaged = Path(error.path)
        if damaged.parent == self.latents.path:
            return f"delete that file and run again to go on from its block, or {anew}"
        if not damaged.is_relative_to(self.path):
            return None
        entry = self.timeline.entry(self._entry_of(error.block, damaged))
        block = entry.step - (entry.kind is Kind.REPLAY)
        if block < 0 or not self._can_go_on_from(self.timeline.index_of(block)):
            return anew
        latents = self.latents.chunk(block)
        return f"delete {latents} and run again to go on from that block, or {anew}"

    def _can_go_on_from(self, entry: int) -> bool:
        """Whether what an entry and the later ones read was not dropped."""
        by_form = blocks_by_form(self.timeline.needed_later(entry), self._kept)
        return all(run.keeps(block) for run, blocks in zip(self.runs, by_form, strict=True) for block in blocks)

    def _entry_of(self, block: int, damaged: Path) -> int:
        """The entry that a form's folder calls block so."""
        for run, kept in zip(self.runs[1:], self._kept[1:], strict=True):
            if damaged.is_relative_to(run.path):
                return kept[block]
        return block

    def __enter__(self) -> ShotFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(orderly=error is None)

    def _close(self, *, orderly: bool) -> None:
        for run in reversed(self.runs):
            run.close(orderly=orderly)

    def _whole_blocks(self, num_journaled: int) -> int:
        """The entries whose latents are there too, and that every rank has; called when the folder is locked."""
        self.latents = LatentLog(self.path / LATENTS_NAME, self._shot.num_blocks, self._shot.latent_shape)
        return self._gang.minimum(min(num_journaled, self.timeline.num_known(self.latents.num_written())))


def shot_latents(path: Path, name: str, starting: str) -> LatentLog:
    """The latents of a shot that another one starts from.

    Args:
        path: the earlier shot's folder.
        name: of it.
        starting: name of the shot that starts from it.

    Raises:
        StorageError: it was not rendered.
    """
    latents = path / LATENTS_NAME
    if not (latents / "zarr.json").exists():
        raise StorageError(f"shot {starting!r} starts from {name!r}, which is not rendered: no {latents}")
    return LatentLog.existing(latents)
