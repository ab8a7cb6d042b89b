"""The store keeps the newest clips in eight bits and cuts pieces that are in it."""

from __future__ import annotations

import pytest
import torch

from longtake.engine.mini.clip_store import ClipStore

CPU = torch.device("cpu")


def test_pieces_come_from_the_store() -> None:
    generator = torch.Generator().manual_seed(0)
    store = ClipStore(2, 4, 1, CPU)
    for _ in range(3):  # the third takes the first one's place
        store.make(generator)
    assert store.num_made == 3
    pieces = store.sample(3, 2, generator)
    assert pieces.shape == (3, 3, 2, 96, 160)
    assert pieces.min() >= -1 and pieces.max() <= 1
    kept = ((store._clips_MT3YX.float() / 127.5) - 1).transpose(1, 2)
    for piece in pieces:
        windows = [kept[:, :, s : s + 2] for s in range(3)]
        found = [(w - p).abs().amax((1, 2, 3, 4)).min() for w in windows for p in (piece, piece.flip(-1))]
        assert min(found) < 1e-5


def test_lots_must_fit() -> None:
    with pytest.raises(ValueError, match="divide"):
        ClipStore(3, 4, 2, CPU)
