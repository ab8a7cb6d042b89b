"""Training clips: beginnings are the first blocks of clips, new ones come beside training, sequences are of a clip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longtake.engine.mini import clips
from longtake.engine.mini.autoencoder import ClipForward
from longtake.engine.mini.clips import Batch, ClipBuffer, choose_blocks, make_clips, num_frames
from longtake.engine.mini.teacher_forcing import Layout
from longtake.engine.vae import load_vae

CPU = torch.device("cpu")
VAE = Path(clips.__file__).parent / "model" / "vae"
LAYOUT = Layout(num_blocks=1, block_frames=3, rows=6, columns=10)


def test_a_beginning_is_the_first_blocks_of_a_clip() -> None:
    vae = ClipForward(load_vae(VAE, dtype=torch.float32, device=CPU).requires_grad_(False))
    with torch.no_grad():
        (longer, script), (shorter, same_script) = (make_clips([7], vae, num_frames(n), CPU) for n in (2, 1))
    assert script == same_script
    assert longer.shape == (1, 16, 6, 12, 20)
    torch.testing.assert_close(longer[:, :, :3], shorter, rtol=0, atol=1e-4)


def small_buffer() -> ClipBuffer:
    return ClipBuffer(VAE, 3, CPU, blocks=1, at_once=2, refresh_steps=2)


def distinct(buffer: ClipBuffer) -> int:
    """Clips that come when many are asked for."""
    torch.manual_seed(0)
    drawn: Batch = buffer.sample(60, LAYOUT)
    assert drawn.latents_BCFYX.shape == (60, 16, 3, 12, 20) and drawn.askable_BN.all()
    return len(drawn.latents_BCFYX.flatten(1).unique(dim=0))


def test_new_clips_come_beside_training_and_replace_the_oldest() -> None:
    buffer = small_buffer()
    buffer.fill(2)
    assert (buffer.num_made, distinct(buffer)) == (2, 2)
    for made in (2, 2, 2, 4):  # begun in the second step, taken in the fourth
        buffer.refresh()
        assert buffer.num_made == made
    assert distinct(buffer) == 3


def test_a_clip_that_is_not_finite_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half_broken(*args: object) -> object:
        latents, scripts = make_clips(*args)  # type: ignore[arg-type]
        latents[0, 0, 0, 0, 0] = torch.nan
        return latents, scripts

    monkeypatch.setattr(clips, "make_clips", half_broken)
    buffer = small_buffer()
    buffer.fill(2)
    assert (buffer.num_made, distinct(buffer)) == (1, 1)
    assert "seeds [1] are not finite" in capsys.readouterr().out


def test_blocks_of_a_sequence_are_in_order_and_of_the_clip() -> None:
    torch.manual_seed(0)
    chosen = choose_blocks(500, 5, 12, CPU)
    assert (chosen.diff(dim=1) > 0).all() and chosen.min() == 0 and chosen.max() == 11
    assert (chosen[:, -1] - chosen[:, 0] == 4).any() and (chosen[:, -1] - chosen[:, 0] > 4).any()
    assert choose_blocks(3, 4, 4, CPU).tolist() == [[0, 1, 2, 3]] * 3
