"""What a journal says: one dataclass a kind of record, each with a version, as JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from longtake.kernels.errors import StorageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A writer took the journal over; everything after it belongs to `epoch`."""

    kind: ClassVar[str] = "open"
    epoch: int
    config_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCommitted:
    """A block's payloads are on the disk.

    Args:
        block: its number.
        array: the Zarr array that holds it.
        first_head: first of the heads that this journal's rank wrote.
        num_layers, num_heads: shape of the checksums; layers are rows where the codec gives layers several of them.
        checksums: CRC-32C of each unit, row by row, head by head: R * H little-endian uint32, base64.
        summary: what `Commit.attach` was given, as many bytes a head, head by head, base64; empty: nothing.
    """

    kind: ClassVar[str] = "block"
    block: int
    array: str
    first_head: int
    num_layers: int
    num_heads: int
    checksums: str
    summary: str = ""

    @property
    def summary_HS(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """The summary as uint8 [H, bytes of a head]."""
        return np.frombuffer(base64.b64decode(self.summary), dtype=np.uint8).reshape(self.num_heads, -1)

    @property
    def checksums_RH(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint32]]:
        """The checksums as uint32 [R, H]."""
        raw = np.frombuffer(base64.b64decode(self.checksums), dtype="<u4")
        return raw.astype(np.uint32).reshape(self.num_layers, self.num_heads)


def pack_checksums(checksums_RH: np.ndarray[tuple[int, ...], np.dtype[np.uint32]]) -> str:
    """The inverse of `BlockCommitted.checksums_RH`."""
    return base64.b64encode(checksums_RH.astype("<u4").tobytes()).decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentWritten:
    """A segment of video is whole on the disk; it shows blocks up to `num_blocks`."""

    kind: ClassVar[str] = "segment"
    index: int
    path: str
    checksum: int
    num_blocks: int
    num_frames: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledBack:
    """The history has `num_blocks` blocks: this journal's next block has that number.

    Its own blocks from there on, and what was saved after them, no longer count. A rank that joins later begins so.
    """

    kind: ClassVar[str] = "rollback"
    num_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """Blocks that nothing reads any more: from here on they count as committed, but their files may be gone.

    Args:
        blocks: [first, one past the last] of each run of them.
    """

    kind: ClassVar[str] = "drop"
    blocks: list[list[int]]

    @classmethod
    def of(cls, blocks: Iterable[int]) -> Dropped:
        """The record that lists these blocks."""
        runs: list[list[int]] = []
        for block in sorted(blocks):
            if runs and runs[-1][1] == block:
                runs[-1][1] += 1
            else:
                runs.append([block, block + 1])
        return cls(blocks=runs)

    def __iter__(self) -> Iterator[int]:
        for first, last in self.blocks:
            yield from range(first, last)


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """The writer ended in order."""

    kind: ClassVar[str] = "closed"
    num_blocks: int


Record = Opened | BlockCommitted | SegmentWritten | RolledBack | Dropped | Closed

VERSION = 1
_KINDS: dict[str, type[Record]] = {
    cls.kind: cls for cls in (Opened, BlockCommitted, SegmentWritten, RolledBack, Dropped, Closed)
}


def encode(record: Record) -> bytes:
    """A record as JSON."""
    return json.dumps(
        {"version": VERSION, "kind": record.kind, **asdict(record)}, separators=(",", ":"), sort_keys=True
    ).encode()


def decode(body: bytes) -> Record:
    """A record from JSON.

    Raises:
        StorageError: it is of a newer version, or of no known kind or shape.
    """
    try:
        fields = json.loads(body)
        version, kind = fields.pop("version"), fields.pop("kind")
    except (ValueError, KeyError, AttributeError) as error:
        raise StorageError(f"a journal record is not one of ours: {error!r}") from error
    if version > VERSION or kind not in _KINDS:
        raise StorageError(
            f"a journal record of kind {kind!r}, version {version}, is newer than this longtake reads "
            f"(version {VERSION}); use the longtake that wrote it"
        )
    try:
        return _KINDS[kind](**fields)
    except TypeError as error:
        raise StorageError(f"a journal record of kind {kind!r} has the wrong fields: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What a journal's records amount to: the state after replaying them in order.

    Args:
        config_hash: of the last writer; empty when there was none.
        blocks: blocks that this journal's rank committed, number -> record; a rank that joined late lacks the first.
        num_blocks: blocks of the history as this rank knows it; the next one has this number.
        segments: those that still count, in order.
        dropped: blocks whose files may be gone.
        closed: whether the last writer ended in order.
    """

    config_hash: str = ""
    blocks: dict[int, BlockCommitted]
    num_blocks: int = 0
    segments: tuple[SegmentWritten, ...] = ()
    dropped: frozenset[int] = frozenset()
    closed: bool = False


def history(records: Iterable[Record]) -> History:
    """Replay records.

    Raises:
        StorageError: blocks out of order, which no writer of ours leaves.
    """
    config_hash, closed, num_blocks = "", False, 0
    blocks: dict[int, BlockCommitted] = {}
    segments: list[SegmentWritten] = []
    dropped: set[int] = set()
    for record in records:
        closed = isinstance(record, Closed)
        match record:
            case Opened():
                config_hash = record.config_hash
            case BlockCommitted():
                if record.block != num_blocks:
                    raise StorageError(f"the journal commits block {record.block} after {num_blocks} blocks")
                blocks[record.block] = record
                num_blocks += 1
            case SegmentWritten():
                segments = [kept for kept in segments if kept.index < record.index]
                segments.append(record)
            case RolledBack():
                num_blocks = record.num_blocks
                blocks = {block: kept for block, kept in blocks.items() if block < record.num_blocks}
                segments = [kept for kept in segments if kept.num_blocks <= record.num_blocks]
                dropped = {block for block in dropped if block < record.num_blocks}
            case Dropped():
                dropped.update(record)
            case Closed():
                pass
    return History(
        config_hash=config_hash,
        blocks=blocks,
        num_blocks=num_blocks,
        segments=tuple(segments),
        dropped=frozenset(dropped),
        closed=closed,
    )
