"""The segments of a shot: which are whole, what the journal says of them, which come next.

A segment shows ``segment_blocks`` blocks, the last one what is left, wherever a run began. Its record is journaled when
it has its name on the disk and the blocks that it shows are durable; a segment that no record names, or whose bytes do
not have the record's checksum, is made again from the latents, with all that come after it.
"""

from __future__ import annotations

import threading
from pathlib import Path

from longtake.engine.config import ShotConfig
from longtake.engine.timeline import Timeline
from longtake.engine.video_codec import video_codec
from longtake.kernels.errors import StorageError
from longtake.offload.errors import from_os_error
from longtake.offload.files import as_bytes, crc32c
from longtake.offload.records import SegmentWritten
from longtake.offload.run import RunDirectory

SEGMENT_S = 10.0
SEGMENTS_NAME = "segments"


def segment_blocks(shot: ShotConfig) -> int:
    """Blocks of one segment: as many as make about ``SEGMENT_S`` seconds."""
    frames = shot.model.block_frames * shot.model.temporal_stride
    return max(1, round(SEGMENT_S * shot.fps / frames))


def num_segments(shot: ShotConfig) -> int:
    """Segments of the whole shot."""
    return -(-shot.num_blocks // segment_blocks(shot))


class Segments:
    """The segments in a shot's folder. `written` may be called from another thread than the rest.

    Args:
        shot: what is rendered.
        run: its folder, open; journals records.
        timeline: of the shot; tells when a block is durable.

    Raises:
        StorageError: the folder cannot be read or written.
    """

    def __init__(self, shot: ShotConfig, run: RunDirectory, timeline: Timeline) -> None:
        self.folder = run.path / SEGMENTS_NAME
        self._shot, self._run, self._timeline = shot, run, timeline
        self._suffix = video_codec(shot.video_codec).suffix
        self._pending: list[SegmentWritten] = []
        self._lock = threading.Lock()
        try:
            self.folder.mkdir(exist_ok=True)
            self._remove_unlisted()
            self.num_whole = self._count_whole()
        except OSError as error:
            raise from_os_error(error, "looking through the segments", path=self.folder) from error

    @property
    def first_block(self) -> int:
        """The first block that no whole segment shows."""
        return min(self.num_whole * segment_blocks(self._shot), self._shot.num_blocks)

    @property
    def complete(self) -> bool:
        """Whether every segment of the shot is whole and journaled."""
        return self.num_whole == num_segments(self._shot)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The journaled segments, in order."""
        return tuple(self.path(index) for index in range(self.num_whole))

    def path(self, index: int) -> Path:
        """Where a segment is, or will be."""
        return self.folder / f"{index:05d}{self._suffix}"

    def written(self, path: Path, num_blocks: int, num_frames: int) -> None:
        """Note a segment that has its name on the disk; `journal` records it.

        Args:
            path: of the segment.
            num_blocks: of the shot, up to its end.
            num_frames: in it.
        """
        try:
            checksum = crc32c(as_bytes(path.read_bytes()))
        except OSError as error:
            raise from_os_error(error, "reading a segment back", path=path) from error
        record = SegmentWritten(
            index=int(path.stem),
            path=f"{SEGMENTS_NAME}/{path.name}",
            checksum=checksum,
            num_blocks=self._timeline.index_of(num_blocks - 1) + 1,
            num_frames=num_frames,
        )
        with self._lock:
            self._pending.append(record)

    def journal(self) -> None:
        """Record the segments whose blocks are durable by now.

        Raises:
            DiskFullError, StorageError: see `Journal.append`.
        """
        while self._pending and self._pending[0].num_blocks <= self._run.num_blocks:
            record = self._pending[0]
            self._run.note_segment(record)
            self.num_whole = record.index + 1
            with self._lock:
                self._pending.pop(0)

    def _remove_unlisted(self) -> None:
        listed = {Path(record.path).name for record in self._run.segments}
        for path in self.folder.iterdir():
            if path.name not in listed:
                path.unlink()

    def _count_whole(self) -> int:
        for index, record in enumerate(self._run.segments):
            path = self.path(index)
            if record.index != index or record.path != f"{SEGMENTS_NAME}/{path.name}":
                raise StorageError(
                    "the journal lists segments that are not this shot's; render the shot anew with --fresh",
                    path=self._run.path,
                )
            if not path.exists() or crc32c(as_bytes(path.read_bytes())) != record.checksum:
                return index
        return len(self._run.segments)
