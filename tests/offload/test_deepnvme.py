"""DeepNVMe: chosen where it can be trusted, and otherwise not, with a line that says why."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from longtake.offload.chunkfiles import ChunkFiles, DiskIO, WrongSizeError
from longtake.offload.deepnvme import ALIGNMENT, DeepNvmeFiles, Handle, load_op, open_files
from longtake.offload.files import FileOps
from tests.offload.aio import PlainHandle, failing_load, files_of
from tests.offload.faults import FaultyOps


def random_bytes(num_bytes: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(num_bytes).integers(0, 256, num_bytes, dtype=np.uint8)


def plain_handles(build: bool) -> Callable[[], Handle]:
    return lambda: PlainHandle(FileOps())


class Everywhere(FileOps):
    """A file system that calls all of a file written."""

    def written_bytes(self, fd: int) -> int:
        return os.fstat(fd).st_size


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 8192, 70_001])
def test_files_of_any_size_are_written_and_read_in_any_part(tmp_path: Path, size: int) -> None:
    files = files_of("aio", tmp_path, file_bytes=70_001)
    wanted = random_bytes(size)
    files.write(tmp_path / "file", [wanted[: size // 3], wanted[size // 3 :]])
    assert (tmp_path / "file").read_bytes() == wanted.tobytes()
    for first, last in ((0, size), (size // 2, size), (size - 1, size), (0, 1), (size // 3, 2 * size // 3 + 1)):
        part = np.zeros(last - first, dtype=np.uint8)
        files.read(tmp_path / "file", [part[: part.size // 2], part[part.size // 2 :]], first, size)
        assert np.array_equal(part, wanted[first:last])
    with pytest.raises(WrongSizeError, match=f"{size} bytes"):
        files.read(tmp_path / "file", [wanted], 0, size + 1)


def test_longer_files_than_its_buffers_go_by_system_calls(tmp_path: Path) -> None:
    files = files_of("aio", tmp_path, file_bytes=100)
    wanted = random_bytes(5 * ALIGNMENT)
    files.write(tmp_path / "file", [wanted])
    found = np.zeros_like(wanted)
    files.read(tmp_path / "file", [found], 0, wanted.size)
    assert np.array_equal(found, wanted)


def test_threads_have_buffers_of_their_own_and_give_them_back(tmp_path: Path) -> None:
    files = files_of("aio", tmp_path, file_bytes=50_000)

    def work(number: int) -> bool:
        wanted = random_bytes(49_000 + number)
        files.write(tmp_path / f"file{number}", [wanted])
        found = np.zeros_like(wanted)
        files.read(tmp_path / f"file{number}", [found], 0, wanted.size)
        return np.array_equal(found, wanted)

    with ThreadPoolExecutor(12) as threads:
        assert all(threads.map(work, range(60)))
    assert isinstance(files, DeepNvmeFiles)
    assert files.buffer_bytes == 8 * (53_248 + ALIGNMENT)
    files.close()
    assert files.buffer_bytes == 0


def test_the_choice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    files_of("aio", tmp_path, file_bytes=100)
    caplog.clear()
    chosen = open_files(DiskIO.AUTO, tmp_path, file_bytes=100, load=plain_handles)
    assert chosen.name == "deepnvme" and caplog.messages == ["disk: by DeepNVMe (libaio, O_DIRECT)"]
    assert type(open_files(DiskIO.SYSTEM, tmp_path, file_bytes=100, load=plain_handles)) is ChunkFiles
    assert type(open_files(DiskIO.AUTO, tmp_path, file_bytes=100, load=lambda build: None)) is ChunkFiles
    assert len(caplog.messages) == 1 and not list(tmp_path.iterdir())


def test_what_cannot_be_used_or_trusted_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert type(open_files(DiskIO.DEEPNVME, tmp_path, file_bytes=100, load=failing_load)) is ChunkFiles
    everywhere = open_files(DiskIO.AUTO, tmp_path, file_bytes=100, ops=Everywhere(), load=plain_handles)
    assert type(everywhere) is ChunkFiles
    full = open_files(DiskIO.AUTO, tmp_path, file_bytes=100, ops=FaultyOps(free_bytes=1), load=plain_handles)
    assert type(full) is ChunkFiles
    assert len(caplog.messages) == 3 and not list(tmp_path.iterdir())
    for message, reason in zip(caplog.messages, ("libaio", "written from unwritten", "No space"), strict=True):
        assert message.startswith("disk: by system calls, DeepNVMe cannot be used here: ") and reason in message


def test_what_is_not_used_gives_its_buffers_back(tmp_path: Path) -> None:
    freed: list[int] = []

    class Counted(PlainHandle):
        def free_cpu_locked_tensor(self, tensor: Tensor, /) -> bool:
            freed.append(tensor.numel())
            return True

    ops = FaultyOps(free_bytes=1)
    chosen = open_files(DiskIO.AUTO, tmp_path, file_bytes=100, ops=ops, load=lambda build: lambda: Counted(ops))
    assert type(chosen) is ChunkFiles
    assert len(freed) == 8


def test_without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert load_op(False) is None
    with pytest.raises(ImportError, match="longtake\\[deepnvme\\]"):
        load_op(True)


@pytest.mark.parametrize(
    ("wish", "meanwhile"),
    [("8.0 9.0a;10.0f+PTX;Hopper", "8.0 9.0;10.0+PTX;Hopper"), ("9.0a", "9.0"), (None, None)],
)
@pytest.mark.parametrize("fails", [False, True])
def test_the_builder_is_given_architectures_that_it_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: str | None, meanwhile: str | None, fails: bool
) -> None:
    seen: list[str | None] = []

    class Builder:
        def load(self, verbose: bool) -> Any:
            seen.append(os.environ.get("TORCH_CUDA_ARCH_LIST"))
            if fails:
                raise RuntimeError("no compiler")
            return SimpleNamespace(aio_handle=lambda *_: PlainHandle(FileOps()))

    if wish is None:
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    else:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    builders = SimpleNamespace(AsyncIOBuilder=Builder)
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(importlib, "import_module", lambda name: builders)
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode: None)
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        load_op(True)
    assert seen == [meanwhile]
    assert os.environ.get("TORCH_CUDA_ARCH_LIST") == wish
