"""Ways to the disk for tests: the system's calls, DeepNVMe with a handle of ours, and with DeepSpeed's own."""

from __future__ import annotations

import errno
import importlib.util
import mmap
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.offload.chunkfiles import ChunkFiles, DiskIO
from longtake.offload.deepnvme import ALIGNMENT, DeepNvmeFiles, Handle, open_files
from longtake.offload.files import FileOps
from tests.offload.faults import FaultyOps

WAYS = ("system", "aio", pytest.param("deepnvme", marks=pytest.mark.slow))


class PlainHandle:
    """What DeepSpeed's aio_handle does, with system calls; as that one, it does not tell what went wrong.

    Args:
        ops: its faults are this handle's too.
    """

    def __init__(self, ops: FileOps) -> None:
        self._faults = ops if isinstance(ops, FaultyOps) else FaultyOps()
        self._pending = 0

    def new_cpu_locked_tensor(self, num_elem: int, example: Tensor, /) -> Tensor:
        return torch.frombuffer(mmap.mmap(-1, num_elem), dtype=example.dtype)

    def free_cpu_locked_tensor(self, tensor: Tensor, /) -> bool:
        return True

    def async_pwrite(self, buffer: Tensor, fd: int, file_offset: int, /) -> int:
        self._pending += 1
        if self._faults.fail_writes:
            self._faults.fail_writes -= 1
            return 0
        self._faults.take_time()
        length = buffer.numel()
        if self._faults.short is not None and self._faults.short % ALIGNMENT == 0:
            length = min(length, self._faults.short)
        assert os.pwrite(fd, buffer.numpy()[:length].data, file_offset) == length
        return 0

    def async_pread(self, buffer: Tensor, filename: str, file_offset: int, /) -> int:
        self._pending += 1
        assert file_offset + buffer.numel() <= os.path.getsize(filename), "DeepSpeed's op ends the process"
        if self._faults.fail_reads:
            return 0
        fd = os.open(filename, os.O_RDONLY | os.O_DIRECT)
        try:
            assert os.preadv(fd, [buffer.numpy().data], file_offset) == buffer.numel()
        finally:
            os.close(fd)
        return 0

    def wait(self) -> int:
        assert self._pending, "DeepSpeed's op ends the process"
        done, self._pending = self._pending, 0
        return done


def files_of(way: str, folder: Path, *, file_bytes: int, ops: FileOps | None = None) -> ChunkFiles:
    """A way to the disk; skips the test where there is none such."""
    ops = ops or FileOps()
    if way == "system":
        return ChunkFiles(ops)
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"file_bytes": file_bytes, "ops": ops}
    if way == "aio":

        def new_handle() -> Handle:
            return PlainHandle(ops)

        options["load"] = lambda build: new_handle
    elif importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    files = open_files(DiskIO.DEEPNVME, folder, **options)
    if not isinstance(files, DeepNvmeFiles):
        pytest.skip("no direct I/O in the folder for temporary files, or no op")
    return files


def failing_load(build: bool) -> None:
    """A library that cannot be used."""
    raise OSError(errno.ENOENT, "cannot open shared object file: libaio.so.1")
