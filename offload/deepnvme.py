"""DeepSpeed's DeepNVMe as the way to the disk: asynchronous direct I/O (libaio, O_DIRECT) from page-locked buffers.

    frame, piece by piece --copy--> aligned buffer --aio--> file.partial, allocated     --cut to size, fsync--> file
    frame, piece by piece <--copy-- aligned buffer <--aio-- file, whole 4 KiB           its end by a system call

A chunk file is no multiple of a disk's sector, and its pieces lie apart in a frame, so each transfer goes through an
aligned buffer; through the page cache it would be copied once as well. The files are those of the system's calls.

DeepSpeed's op (0.19.8) does not look at how a transfer ended: an ENOSPC, an EIO or a short write passes as done. So
room is taken beforehand, by a call that tells, and a file must have no hole afterwards: a part that was allocated and
not written is one. A read that failed leaves other bytes, which the checksum finds; the store then reads by system
calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import importlib.util
import logging
import os
import queue
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from longtake.offload.chunkfiles import ChunkFiles, DiskIO
from longtake.offload.files import Bytes, FileOps, make_file

ALIGNMENT = 4096
_BLOCK_BYTES = 1 << 20
_QUEUE_DEPTH = 32
_LIBAIO = "libaio.so.1"
_PROBE_NAME = ".deepnvme"
_ARCHITECTURES = "TORCH_CUDA_ARCH_LIST"

_LOG = logging.getLogger(__name__)


class Handle(Protocol):
    """What is used of DeepSpeed's aio_handle; `wait` waits for all its transfers, so each thread needs one."""

    def new_cpu_locked_tensor(self, num_elem: int, example: Tensor, /) -> Tensor: ...
    def free_cpu_locked_tensor(self, tensor: Tensor, /) -> bool: ...
    def async_pwrite(self, buffer: Tensor, fd: int, file_offset: int, /) -> int: ...
    def async_pread(self, buffer: Tensor, filename: str, file_offset: int, /) -> int: ...
    def wait(self) -> int: ...


class _Lane:
    """One handle and its buffer, used by one thread at a time."""

    def __init__(self, handle: Handle, num_bytes: int) -> None:
        self._handle = handle
        self._buffer = handle.new_cpu_locked_tensor(num_bytes, torch.empty(0, dtype=torch.uint8))
        if self._buffer.data_ptr() % ALIGNMENT:
            raise OSError(errno.EINVAL, "a page-locked buffer does not begin on a page")
        self.bytes: Bytes = self._buffer.numpy()

    def write(self, fd: int, num_bytes: int) -> None:
        """Write the buffer's first bytes at the start of a file opened with O_DIRECT."""
        self._run(self._handle.async_pwrite(self._buffer[:num_bytes], fd, 0))

    def read(self, path: Path, num_bytes: int, offset: int) -> None:
        """Read a part of a file into the buffer."""
        self._run(self._handle.async_pread(self._buffer[:num_bytes], str(path), offset))

    def free(self) -> None:
        """Give the buffer back."""
        self.bytes = np.empty(0, dtype=np.uint8)
        self._handle.free_cpu_locked_tensor(self._buffer)

    def _run(self, started: int) -> None:
        if started != 0 or self._handle.wait() != 1:
            raise OSError(errno.EIO, "DeepNVMe refused a transfer")


class DeepNvmeFiles(ChunkFiles):
    """Chunk files by DeepNVMe. Any number of threads, of which as many as there are handles move files at once."""

    name = "deepnvme"
    tells_errors = False

    def __init__(
        self, new_handle: Callable[[], Handle], *, file_bytes: int, num_handles: int = 8, ops: FileOps | None = None
    ) -> None:
        """Allocate the buffers. Made by `open_files`, which tries it out.

        Args:
            new_handle: makes an aio_handle with one thread.
            file_bytes: size of the files; longer ones go by the system's calls.
            num_handles: how many there are, each with a page-locked buffer of that size.
            ops: the system calls to use beside.
        """
        super().__init__(ops)
        self._buffer_bytes = _aligned(file_bytes) + ALIGNMENT
        self._lanes: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        self._num_lanes = 0
        for _ in range(num_handles):
            self._lanes.put(_Lane(new_handle(), self._buffer_bytes))
            self._num_lanes += 1

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the page-locked buffers."""
        return self._num_lanes * self._buffer_bytes

    def write(self, path: Path, buffers: Sequence[Bytes]) -> None:
        """As `ChunkFiles.write`."""
        total = sum(buffer.size for buffer in buffers)
        length = _aligned(total)
        if length > self._buffer_bytes:
            return super().write(path, buffers)
        with self._lane() as lane:
            done = 0
            for buffer in buffers:
                lane.bytes[done : done + buffer.size] = buffer
                done += buffer.size
            lane.bytes[total:length] = 0

            def fill(fd: int) -> int:
                self.ops.allocate(fd, length)
                lane.write(fd, length)
                if (written := self.ops.written_bytes(fd)) < length:
                    raise OSError(errno.EIO, f"only {written} of {length} bytes reached the disk")
                self.ops.truncate(fd, total)
                return total

            make_file(self.ops, path, os.O_RDWR | os.O_DIRECT, fill)

    def read(self, path: Path, buffers: Sequence[Bytes], offset: int, file_bytes: int) -> None:
        """As `ChunkFiles.read`, but a disk that fails gives other bytes instead of an error."""
        end = offset + sum(buffer.size for buffer in buffers)
        first = offset - offset % ALIGNMENT
        last = max(first, min(_aligned(end), file_bytes - file_bytes % ALIGNMENT))
        if max(last, end) - first > self._buffer_bytes:
            return super().read(path, buffers, offset, file_bytes)
        with self._lane() as lane, self.reading(path, file_bytes) as fd:
            if last > first:
                lane.read(path, last - first, first)
            if end > last:
                self.fill(fd, [lane.bytes[last - first : end - first]], last)
            for buffer in buffers:
                buffer[:] = lane.bytes[offset - first : offset - first + buffer.size]
                offset += buffer.size

    def close(self) -> None:
        """Give the buffers back, when transfers under way have ended; a second call does nothing."""
        while self._num_lanes:
            self._lanes.get().free()
            self._num_lanes -= 1

    @contextlib.contextmanager
    def _lane(self) -> Iterator[_Lane]:
        lane = self._lanes.get()
        try:
            yield lane
        finally:
            self._lanes.put(lane)


def open_files(
    wish: DiskIO,
    folder: Path,
    *,
    file_bytes: int,
    ops: FileOps | None = None,
    load: Callable[[bool], Callable[[], Handle] | None] | None = None,
) -> ChunkFiles:
    """Choose how chunk files are moved, and log it in one line.

    Args:
        wish: what was asked for.
        folder: where the files will be; a small one is written, read and removed.
        file_bytes: their size.
        ops: the system calls to use.
        load: for tests, in place of `load_op`.

    Returns:
        DeepNVMe's if it was asked for, is there, and tells the truth in that folder; else the system's.
    """
    if wish is DiskIO.SYSTEM:
        return ChunkFiles(ops)
    files: DeepNvmeFiles | None = None
    try:
        new_handle = (load or load_op)(wish is DiskIO.DEEPNVME)
        if new_handle is None:
            return ChunkFiles(ops)
        files = DeepNvmeFiles(new_handle, file_bytes=file_bytes, ops=ops)
        _try_out(files, folder)
    except Exception as error:  # whatever a compiler, a linker or a library of others runs into: there is another way
        if files is not None:
            files.close()
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        _LOG.warning("disk: by system calls, DeepNVMe cannot be used here: %s", reason)
        return ChunkFiles(ops)
    _LOG.info("disk: by DeepNVMe (libaio, O_DIRECT)")
    return files


def load_op(build: bool) -> Callable[[], Handle] | None:
    """DeepSpeed's async_io op.

    Args:
        build: compile it if it was not installed with DeepSpeed; takes minutes, once a machine.

    Returns:
        What makes handles; None if there is no op and none is to be built.

    Raises:
        ImportError, OSError, RuntimeError: it, or libaio, cannot be loaded or built.
    """
    found = importlib.util.find_spec("deepspeed")
    if found is None or not found.submodule_search_locations:
        if build:
            raise ImportError("DeepSpeed is not installed: pip install 'longtake[deepnvme]'")
        return None
    places = [Path(place) for place in found.submodule_search_locations]
    installed = any(list(place.glob("ops/aio/async_io_op*.so")) for place in places)
    if not installed and not build:
        return None
    if not installed:
        _LOG.info("disk: building DeepSpeed's async_io op unless an earlier run has; this can take minutes")
    ctypes.CDLL(_LIBAIO, mode=ctypes.RTLD_GLOBAL)  # an op that was built for CPUs is not linked with it
    with _plain_architectures():
        op = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder().load(verbose=False)

    def new_handle() -> Handle:
        handle: Handle = op.aio_handle(_BLOCK_BYTES, _QUEUE_DEPTH, False, True, 1)
        return handle

    return new_handle


@contextlib.contextmanager
def _plain_architectures() -> Iterator[None]:
    """9.0a is 9.0 meanwhile: DeepSpeed's builder takes the entries for numbers, and the op has no CUDA kernels."""
    wish = os.environ.get(_ARCHITECTURES)
    if wish is None:
        yield
        return
    os.environ[_ARCHITECTURES] = re.sub(r"(?<=\d)[a-z]+", "", wish)
    try:
        yield
    finally:
        os.environ[_ARCHITECTURES] = wish


def _try_out(files: DeepNvmeFiles, folder: Path) -> None:
    """Write and read a small file, and see that the file system tells what was written from what was not.

    Raises:
        OSError: it does not, or something failed.
    """
    probe, ops = folder / _PROBE_NAME, files.ops
    wanted = np.random.default_rng(0).integers(0, 256, 2 * ALIGNMENT + 100, dtype=np.uint8)
    found = np.empty_like(wanted)
    try:
        fd = ops.open(probe, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            ops.allocate(fd, ALIGNMENT)
            if ops.written_bytes(fd):
                raise OSError(errno.EOPNOTSUPP, "the file system does not tell written from unwritten parts of a file")
        finally:
            ops.close(fd)
        files.write(probe, [wanted])
        files.read(probe, [found], 0, wanted.size)
    finally:
        ops.unlink(probe)
    if not np.array_equal(found, wanted):
        raise OSError(errno.EIO, "a file written and read back has other bytes")


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
