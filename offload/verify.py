"""Reads a shot's folder from end to end and lists what is bad; changes nothing and needs no lock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from longtake.kernels.errors import StorageError
from longtake.offload.chunkfiles import ChunkFiles
from longtake.offload.errors import from_os_error
from longtake.offload.files import FileOps, as_bytes, crc32c
from longtake.offload.forms import FORMS_FOLDER
from longtake.offload.journal import replay
from longtake.offload.records import History, history
from longtake.offload.run import covered_blocks, dropped_blocks, journals, whole_checksums
from longtake.offload.store import BlockStore, layout_of

KV_FOLDER = "kv.zarr"


def verify(path: Path, ops: FileOps | None = None) -> list[StorageError]:
    """Check every checksum of a shot's folder: journals, payloads in all their forms, segments.

    A torn tail of a journal and files of blocks that were never committed are no damage: the next run cuts them. Blocks
    that were dropped are not looked for.

    Args:
        path: the shot's folder.
        ops: the system calls to use.

    Returns:
        One error for each bad file, in the order of blocks; each names block, layer, head and file where it has them.
    """
    ops = ops or FileOps()
    return [error for folder in (path, *form_folders(path)) for error in _damages(folder, ops)]


def form_folders(path: Path) -> list[Path]:
    """The folders of a shot's further forms; see `longtake.offload.forms`."""
    return sorted((path / FORMS_FOLDER).glob("*/"))


def _damages(path: Path, ops: FileOps) -> Iterator[StorageError]:
    histories: list[History] = []
    for journal in journals(path).values():
        try:
            histories.append(history(replay(journal).records))
        except StorageError as error:
            yield error
    heads = {
        (record.array, record.first_head, record.num_heads) for known in histories for record in known.blocks.values()
    }
    for array in sorted({array for array, _, _ in heads}):
        yield from _bad_chunks(path / KV_FOLDER, array, histories, ops)
    for known in histories:
        for segment in known.segments:
            yield from _bad_file(path / segment.path, segment.checksum, segment.kind)


def _bad_chunks(root: Path, array: str, histories: list[History], ops: FileOps) -> Iterator[StorageError]:
    try:
        layout = layout_of(root, array)
    except StorageError as error:
        yield error
        return
    store = BlockStore(root, array=array, layout=layout, files=ChunkFiles(ops))
    pages = np.empty((layout.num_rows, layout.model_heads, layout.unit_bytes), dtype=np.uint8)
    dropped = dropped_blocks(histories)
    for block in range(covered_blocks(histories, layout.model_heads)):
        if block in dropped:
            continue
        checksums_RH = whole_checksums(histories, block, layout.model_heads)
        for chunk in store.chunks:
            try:
                store.read_chunk(block, chunk, pages, checksums_RH)
            except StorageError as error:
                yield error


def _bad_file(path: Path, checksum: int, kind: str) -> Iterator[StorageError]:
    try:
        found = crc32c(as_bytes(path.read_bytes()))
    except FileNotFoundError:
        yield StorageError(f"the journal lists this {kind} but its file is missing", path=path)
    except OSError as error:
        failure = from_os_error(error, f"reading a {kind}", path=path)
        yield failure if isinstance(failure, StorageError) else StorageError(str(failure), path=path)
    else:
        if found != checksum:
            yield StorageError(f"the {kind} has checksum {found:08x}, the journal says {checksum:08x}", path=path)
