"""Noise as a pure function of (seed, shot, block, step): no generator state exists, so none needs saving.

It is drawn on the CPU by NumPy's counter-based Philox, so that every device and every gang size sees the same film.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def block_noise(seed: int, shot: str, block: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of one step of one block.

    Args:
        seed: of the film or shot.
        shot: its name, so that shots of one seed differ.
        block, step: counted from 0.
        shape: of the result.

    Returns:
        float32 [shape] on the CPU; equal for equal arguments.
    """
    name = f"longtake noise v1|{seed}|{shot}|{block}|{step}".encode()
    key = np.frombuffer(hashlib.blake2b(name, digest_size=16).digest(), dtype="<u8")
    generator = np.random.Generator(np.random.Philox(key=key))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
