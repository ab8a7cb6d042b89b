"""A shot's folder on disk, open for one rank: lock, journal, store, and what is committed.

    <shot>/lock[.<rank>]  journal[.<rank>]  kv.zarr/<codec>/...        rank 0 has no suffix
    <shot>/forms/<name>/lock  journal  kv.zarr/<codec>/...             further forms of its blocks, as offload/forms.py

A block is committed when every head of it is listed in some rank's journal, so a gang of another size finds what the
last one left. Opening agrees on the number of committed blocks, rolls the journals back to it, and deletes orphans.

A block that nothing reads any more may be dropped: the journal says so first, then its files go. Its record stays, so
that a committed block is never one that might exist.
"""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from longtake.kernels.errors import ConfigError, StorageError
from longtake.offload.chunkfiles import ChunkFiles, DiskIO
from longtake.offload.deepnvme import open_files
from longtake.offload.errors import from_os_error
from longtake.offload.files import FileOps, fsync_dir
from longtake.offload.journal import Journal, replay
from longtake.offload.layout import chunk_layout
from longtake.offload.lock import FolderLock
from longtake.offload.records import (
    BlockCommitted,
    Closed,
    Dropped,
    History,
    RolledBack,
    SegmentWritten,
    history,
    pack_checksums,
)
from longtake.offload.shape import ModelKVShape
from longtake.offload.store import BlockStore, Checksums, Payloads

_SUFFIX = re.compile(r"journal(?:\.(\d+))?$")


def _name(kind: str, rank: int) -> str:
    return kind if rank == 0 else f"{kind}.{rank}"


def journals(path: Path) -> dict[int, Path]:
    """The journals in a shot's folder by rank."""
    found = {}
    for entry in sorted(path.iterdir()) if path.is_dir() else ():
        if matched := _SUFFIX.match(entry.name):
            found[int(matched[1] or 0)] = entry
    return found


def covered_blocks(histories: Sequence[History], model_heads: int) -> int:
    """How many blocks from 0 on have all heads listed in the journals together."""
    block = 0
    while True:
        heads: set[int] = set()
        for one in histories:
            if block in one.blocks:
                record = one.blocks[block]
                heads.update(range(record.first_head, record.first_head + record.num_heads))
        if len(heads) < model_heads:
            return block
        block += 1


def committed_blocks(path: Path, model_heads: int) -> int:
    """How many blocks a shot's folder holds, without opening it for writing.

    Raises:
        StorageError: a journal is damaged.
    """
    return covered_blocks([history(replay(file).records) for file in journals(path).values()], model_heads)


def dropped_blocks(histories: Iterable[History]) -> frozenset[int]:
    """The blocks that any rank has dropped: the files of the others may be there or not."""
    return frozenset[int]().union(*(one.dropped for one in histories))


def kept_blocks(path: Path, model_heads: int) -> int:
    """How many committed blocks of a shot's folder are to be found on the disk.

    Raises:
        StorageError: a journal is damaged.
    """
    known = [history(replay(file).records) for file in journals(path).values()]
    covered = covered_blocks(known, model_heads)
    return covered - sum(block < covered for block in dropped_blocks(known))


def whole_checksums(histories: Sequence[History], block: int, model_heads: int) -> Checksums:
    """Checksums uint32 [R, all heads] of a block that the journals cover."""
    parts = [one.blocks[block] for one in histories if block in one.blocks]
    checksums_RH = np.zeros((parts[0].num_layers, model_heads), dtype=np.uint32)
    for part in parts:
        checksums_RH[:, part.first_head : part.first_head + part.num_heads] = part.checksums_RH
    return checksums_RH


def whole_summary(histories: Sequence[History], block: int, model_heads: int) -> Payloads:
    """What was attached to a block that the journals cover: uint8 [all heads, bytes of a head]."""
    parts = [one.blocks[block] for one in histories if block in one.blocks]
    summary_HS = np.zeros((model_heads, parts[0].summary_HS.shape[1]), dtype=np.uint8)
    for part in parts:
        summary_HS[part.first_head : part.first_head + part.num_heads] = part.summary_HS
    return summary_HS


class RunDirectory:
    """One rank's hold on a shot's folder. Commits come from one thread at a time; reads from any."""

    def __init__(
        self,
        path: Path,
        *,
        shape: ModelKVShape,
        config_hash: str,
        rank: int = 0,
        num_ranks: int = 1,
        agree: Callable[[int], int] = lambda num_blocks: num_blocks,
        num_blocks: int | None = None,
        reads: Callable[[int], Iterable[int]] = lambda num_blocks: (),
        disk_io: DiskIO = DiskIO.SYSTEM,
        ops: FileOps | None = None,
    ) -> None:
        """Lock, replay, agree, roll back, remove orphans.

        Args:
            path: the folder; made if it is not there.
            shape: geometry of a block on this rank.
            config_hash: of everything that the payloads depend on.
            rank, num_ranks: of this process in its gang.
            agree: the gang's minimum of the committed blocks; called once, by every rank.
            num_blocks: blocks of the whole shot, if known, for the array's shape.
            reads: which of so many blocks those after them may read; a folder that has dropped one is refused.
            disk_io: how payloads are to reach the disk.
            ops: the system calls to use.

        Raises:
            LockedError: another process has the folder.
            ConfigError: the folder is of another configuration.
            StorageError, DiskFullError: it is damaged, has dropped what is needed to go on, or cannot be written.
        """
        self.path, self.shape, self.rank = path, shape, rank
        self._ops = ops or FileOps()
        self._array = shape.codec.name
        self._mutex = threading.Lock()
        self._locks: list[FolderLock] = []
        self._journal: Journal | None = None
        self._files: ChunkFiles | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            fsync_dir(self._ops, path.parent)
        except OSError as error:
            raise from_os_error(error, "making the shot's folder", path=path) from error
        try:
            self._locks.append(FolderLock(path / _name("lock", rank)))
            histories = {r: history(replay(file).records) for r, file in journals(path).items()}
            committed = agree(covered_blocks(list(histories.values()), shape.model_heads))
            if gone := dropped_blocks(histories.values()).intersection(reads(committed)):
                raise StorageError(
                    f"block {committed} is the next, and it or a later one reads block {min(gone)}, which was deleted "
                    f"when the shot had come further than that; render the shot anew with --fresh",
                    path=path,
                )
            self._open(histories, committed, config_hash, num_ranks)
            layout = chunk_layout(shape)
            self._files = open_files(disk_io, path, file_bytes=layout.file_bytes, ops=self._ops)
            self.store = BlockStore.create(
                path / "kv.zarr",
                array=shape.codec.name,
                layout=layout,
                heads=range(shape.first_head, shape.first_head + shape.num_heads),
                rows=shape.codec.rows,
                num_blocks=num_blocks,
                files=self._files,
            )
            self.orphans = self.store.remove_orphans(committed, self._dropped)
        except BaseException:
            self.close(orderly=False)
            raise

    def _open(self, histories: dict[int, History], committed: int, config_hash: str, num_ranks: int) -> None:
        """Check the configuration, load what is committed, begin the epoch. Nothing is written before the agreement."""
        for found in histories.values():
            if found.config_hash not in ("", config_hash):
                raise ConfigError(
                    f"this folder holds a shot of another configuration ({found.config_hash}, now {config_hash}); "
                    f"use another folder or start afresh",
                    path=self.path,
                )
        known, shape = list(histories.values()), self.shape
        heads = slice(shape.first_head, shape.first_head + shape.num_heads)
        self._checksums: list[Checksums] = [
            np.ascontiguousarray(whole_checksums(known, block, shape.model_heads)[:, heads])
            for block in range(committed)
        ]
        self._dropped = {block for block in dropped_blocks(known) if block < committed}
        self._summaries: list[Payloads] = [
            np.ascontiguousarray(whole_summary(known, block, shape.model_heads)[heads]) for block in range(committed)
        ]
        own = histories.get(self.rank)
        self.segments: tuple[SegmentWritten, ...] = ()
        if own is not None:
            self.segments = tuple(kept for kept in own.segments if kept.num_blocks <= committed)
        self._journal = self._continue_journal(self.rank, config_hash, own, committed)
        if self.rank == 0:
            self._take_over(histories, num_ranks, config_hash, committed)

    def _continue_journal(self, rank: int, config_hash: str, known: History | None, committed: int) -> Journal:
        journal = Journal(self.path / _name("journal", rank), config_hash=config_hash, ops=self._ops)
        try:
            if (known.num_blocks if known is not None else 0) != committed:
                journal.append(RolledBack(num_blocks=committed))
        except BaseException:
            journal.close()
            raise
        return journal

    def _take_over(self, histories: dict[int, History], num_ranks: int, config_hash: str, committed: int) -> None:
        """Fence out and roll back the journals of ranks that this smaller gang no longer has."""
        for rank, known in histories.items():
            if rank >= num_ranks:
                self._locks.append(FolderLock(self.path / _name("lock", rank)))
                self._continue_journal(rank, config_hash, known, committed).close()

    @property
    def num_blocks(self) -> int:
        """Committed blocks, durable on this rank."""
        return len(self._checksums)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of memory held for transfers to and from the disk."""
        return 0 if self._files is None else self._files.buffer_bytes

    def checksums_RH(self, block: int) -> Checksums:
        """The journal's checksums of this rank's payloads of a committed block."""
        return self._checksums[block]

    @property
    def checksum_bytes(self) -> int:
        """Bytes of the checksums held in memory: four for each payload of the history."""
        return sum(checksums_RH.nbytes for checksums_RH in self._checksums[:1]) * self.num_blocks

    def keeps(self, block: int) -> bool:
        """Whether a block is committed and was not dropped."""
        return block < self.num_blocks and block not in self._dropped

    @property
    def num_kept(self) -> int:
        """Committed blocks that were not dropped."""
        return self.num_blocks - len(self._dropped)

    def drop(self, blocks: Iterable[int]) -> None:
        """Delete committed blocks that nothing will read again, no matter from which block the shot goes on.

        What a crash leaves of their files is removed by the next opening.

        Raises:
            StorageError: a block is not durable, or a file cannot be deleted.
            FencedError, DiskFullError: see `Journal.append`.
        """
        doomed = sorted(block for block in set(blocks) if block not in self._dropped)
        if doomed and doomed[-1] >= self.num_blocks:
            raise StorageError(f"block {doomed[-1]} is to be dropped but not durable yet", path=self.path)
        if doomed:
            self.note_dropped(doomed)
            for block in doomed:
                self.store.remove(block)

    def note_dropped(self, blocks: Sequence[int]) -> None:
        """Journal that blocks are dropped; their files are still there."""
        self._open_journal().append(Dropped.of(blocks))
        self._dropped.update(blocks)

    def claim_summaries(self) -> list[Payloads]:
        """What was attached to the blocks that were there on opening, uint8 [H, bytes of a head] each; only once."""
        claimed, self._summaries = self._summaries, []
        return claimed

    def commit(self, block: int, checksums_RH: Checksums, summary: bytes = b"") -> None:
        """Journal a block whose chunks are durable; returns when the record is.

        Args:
            block: the next one.
            checksums_RH: of its payloads on this rank.
            summary: to be found again by `claim_summaries`, as many bytes for each head of this rank.

        Raises:
            FencedError, DiskFullError, StorageError: see `Journal.append`.
        """
        if block != self.num_blocks:
            raise StorageError(f"block {self.num_blocks} is the next to be journaled, not {block}", path=self.path)
        self.store.grow(block + 1)
        self._open_journal().append(
            BlockCommitted(
                block=block,
                array=self._array,
                first_head=self.shape.first_head,
                num_layers=self.shape.num_rows,
                num_heads=self.shape.num_heads,
                checksums=pack_checksums(checksums_RH),
                summary=base64.b64encode(summary).decode(),
            )
        )
        self._checksums.append(checksums_RH)

    def note_segment(self, record: SegmentWritten) -> None:
        """Journal a segment of video that is whole on the disk."""
        self._open_journal().append(record)
        self.segments = (*(kept for kept in self.segments if kept.index < record.index), record)

    def close(self, *, orderly: bool = True) -> None:
        """End the writer; `orderly` journals that the run came to its end. A second call does nothing."""
        with self._mutex:
            journal, self._journal = self._journal, None
            locks, self._locks = self._locks, []
        try:
            if journal is not None and orderly:
                journal.append(Closed(num_blocks=self.num_blocks))
        finally:
            if journal is not None:
                journal.close()
            for lock in locks:
                lock.close()
            if self._files is not None:
                self._files.close()

    def _open_journal(self) -> Journal:
        if self._journal is None:
            raise StorageError("the shot's folder was closed", path=self.path)
        return self._journal
