"""The rolling window of Rolling Forcing (arXiv 2509.25161): several blocks at once, each a step cleaner than the next.

Pass ``w`` takes blocks ``max(0, w - W + 1)`` to ``w`` (``W`` steps, as many blocks) one step on: block ``b`` makes its
step ``w - b``. Block ``n`` is finished by pass ``n + W - 1``; only then it is committed::

    pass     0      1      2      3      4          W = 3
    steps    0      1 0    2 1 0
                             2 1 0
                               2 1 0

Between two commits the only state is the noisy window, which :class:`WindowStore` keeps for a resumed shot.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longtake.kernels.errors import StorageError
from longtake.offload.files import FileOps, as_bytes, crc32c, fsync_dir, write_file

_FORMAT = "longtake window 1"
_KEPT = 16


class RollingWindow:
    """Noisy latents of the blocks in the window.

    Args:
        num_blocks: of the shot.
        sigmas: noise levels of the steps.
        predict_flow: (first block, latents [C, w * F, Y, X], one sigma for each of the w blocks) -> flow of that shape.
        noise: (block, step) -> float32 noise [C, F, Y, X] on the device.
        store: keeps the window after every block; None: it dies with the process.
    """

    def __init__(
        self,
        num_blocks: int,
        sigmas: tuple[float, ...],
        predict_flow: Callable[[int, Tensor, tuple[float, ...]], Tensor],
        noise: Callable[[int, int], Tensor],
        store: WindowStore | None = None,
    ) -> None:
        self._num_blocks, self._sigmas, self._store = num_blocks, sigmas, store
        self._predict_flow, self._noise = predict_flow, noise
        self._noisy: dict[int, Tensor] = {}
        self._next = 0

    def finish(self, block: int) -> Tensor:
        """Run the passes that finish a block; blocks come in order.

        Returns:
            The clean block, float32 [C, F, Y, X].

        Raises:
            StorageError: an earlier run began the shot and its window is not there any more.
        """
        if block != self._next:
            self._resume(block)
        num_steps = len(self._sigmas)
        for index in range(block + num_steps - 1 if block else 0, block + num_steps - 1):
            self._pass(block, index)
        clean = self._pass(block, block + num_steps - 1)
        self._noisy.pop(block, None)
        self._next = block + 1
        if self._store is not None and self._next < self._num_blocks:
            self._store.write(self._next, self._noisy)
        return clean

    def _pass(self, first: int, index: int) -> Tensor:
        blocks = range(first, min(index, self._num_blocks - 1) + 1)
        steps = [index - block for block in blocks]
        noisy = torch.cat(
            [self._noise(b, 0) if step == 0 else self._noisy[b] for b, step in zip(blocks, steps, strict=True)], dim=1
        )
        sigmas = tuple(self._sigmas[step] for step in steps)
        flow = self._predict_flow(first, noisy, sigmas).float()
        frames = noisy.shape[1] // len(blocks)
        cleans: list[Tensor] = [
            part - sigma * part_flow
            for part, part_flow, sigma in zip(noisy.split(frames, 1), flow.split(frames, 1), sigmas, strict=True)
        ]
        for block, step, clean in zip(blocks, steps, cleans, strict=True):
            if step + 1 < len(self._sigmas):
                self._noisy[block] = torch.lerp(clean, self._noise(block, step + 1), self._sigmas[step + 1])
        return cleans[0]

    def _resume(self, block: int) -> None:
        if self._store is None:
            raise StorageError("a rolling window cannot go on in the middle of a shot: it was not kept", block=block)
        device = self._noise(block, 0).device
        self._noisy = {key: tensor.to(device) for key, tensor in self._store.read(block).items()}
        self._next = block


class WindowStore:
    """The windows before the last few blocks, one small file each, in a folder of the shot.

    Older than the 16 last ones are removed: so far and no further a resumed history may lie behind.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, block: int, noisy: dict[int, Tensor]) -> None:
        """Keep the window as it is before ``block``; durable on return."""
        tensors = {str(key): tensor.cpu().contiguous() for key, tensor in noisy.items()}
        note = json.dumps({key: f"{_checksum(tensor):08x}" for key, tensor in tensors.items()})
        path = self._path(block)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_file(FileOps(), path, [as_bytes(safetensors.torch.save(tensors, {_FORMAT: note}))])
            fsync_dir(FileOps(), self._folder)
            if block >= _KEPT:
                self._path(block - _KEPT).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"the rolling window cannot be kept: {error}", path=path) from error

    def read(self, block: int) -> dict[int, Tensor]:
        """The window before ``block``.

        Raises:
            StorageError: it is missing or damaged.
        """
        path = self._path(block)
        try:
            with safe_open(path, "pt") as file:
                note = json.loads(file.metadata()[_FORMAT])
                tensors = {key: file.get_tensor(key) for key in note}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"the rolling window before block {block} is missing or damaged: {error}; render the shot anew with "
                "--fresh",
                path=path,
            ) from error
        for key, tensor in tensors.items():
            if f"{_checksum(tensor):08x}" != note[key]:
                raise StorageError(
                    f"the rolling window before block {block} is damaged; render the shot anew with --fresh", path=path
                )
        return {int(key): tensor for key, tensor in tensors.items()}

    def _path(self, block: int) -> Path:
        return self._folder / f"{block:06d}.safetensors"


def _checksum(tensor: Tensor) -> int:
    return crc32c(tensor.contiguous().view(torch.uint8).flatten().numpy())
