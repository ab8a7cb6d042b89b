"""Short clips, written and read, for tests."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from longtake.engine.footage import Frames, read_frames
from longtake.engine.video import SegmentWriter

HEIGHT, WIDTH = 48, 64


def moving(num: int, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Frames:
    """Soft shapes that drift, and grain: something for motion search and B frames to work on. uint8 [num, Y, X, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 2 * num, width // 8 + 2 * num, 3)).astype(np.float32)
    coarse += 0.7 * (coarse.mean(-1, keepdims=True) - coarse)  # colours that survive at half resolution
    wide = np.kron(coarse, np.ones((8, 8, 1), np.float32))
    frames = [wide[i : i + height, 2 * i : 2 * i + width] + rng.normal(0, 2, (height, width, 3)) for i in range(num)]
    return np.clip(np.stack(frames), 0, 255).astype(np.uint8)


def write(path: Path, frames: Frames, codec: str = "h264", fps: Fraction | int | str = 16) -> Path:
    with SegmentWriter(path, fps=fps, size=(frames.shape[1], frames.shape[2]), codec=codec) as writer:
        writer.write(frames)
    return path


def decode(path: Path) -> Frames:
    return np.stack(list(read_frames(path)))


def payloads(path: Path) -> list[tuple[int, int]]:
    """Where each packet of a file starts and how long it is, in bytes."""
    with av.open(str(path)) as container:
        return [(p.pos, p.size) for p in container.demux(video=0) if p.size and p.pos is not None]
