"""Distillation at a tiny size: what a block sees, where gradients come from, resuming, what is printed and drawn."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import nn

from longtake.engine.config import ModelConfig
from longtake.engine.mini import distil
from longtake.engine.mini import distiller as training
from longtake.engine.mini.autoencoder import ClipForward, new_autoencoder
from longtake.engine.mini.clips import CLIP_BLOCKS, NUM_PROMPTS, TEXT_LEN, Batch, ClipBuffer, Clips, text_mask
from longtake.engine.mini.distiller import DistilConfig, Distiller, Sequence, matching_gradient
from longtake.engine.mini.film_pool import PoolPlan
from longtake.engine.mini.preview import PreviewPlan
from longtake.engine.mini.state import fill, load_distilled, save_distilled
from longtake.engine.mini.teacher_forcing import Layout
from longtake.engine.mini.train_dit import Trainee, mean_over, spread
from longtake.engine.model import CausalWan

CPU = torch.device("cpu")
LAYOUT = Layout(num_blocks=3, block_frames=2, rows=1, columns=2)
BEGINNING = Layout(num_blocks=2, block_frames=2, rows=1, columns=2)
SMALL = ModelConfig(num_heads=2, head_dim=16, num_layers=2, ffn_dim=32, text_dim=64)
SMALL_POOL = PoolPlan(batch=2, reels=1, blocks=6, advance=2, window=3, max_true_blocks=2, kept=2)


class FewClips:
    """Stands for the buffer of clips: random latents of the layout's size."""

    def __init__(self) -> None:
        vae = new_autoencoder().eval().requires_grad_(False)
        self.autoencoder = ClipForward(vae)

    def refresh(self) -> None:
        pass

    def sample(self, batch: int, layout: Layout) -> Batch:
        prompt_BN = torch.randint(0, 2, (batch, layout.num_blocks)).sort(dim=1).values
        askable_BN = torch.ones(batch, layout.num_blocks, dtype=torch.bool)
        askable_BN[0, 0] = False
        return Batch(
            latents_BCFYX=torch.randn(batch, 16, layout.num_blocks * layout.block_frames, 2, 4),
            starts_BN=torch.arange(layout.num_blocks).expand(batch, -1) * layout.block_frames,
            askable_BN=askable_BN,
            tokens_BNK=torch.randint(3, 259, (batch, NUM_PROMPTS, TEXT_LEN)),
            text_mask=text_mask(prompt_BN, layout, NUM_PROMPTS, TEXT_LEN),
        )

    def sample_clips(self, batch: int) -> Clips:
        return Clips(
            latents_BCFYX=torch.randn(batch, 16, CLIP_BLOCKS * LAYOUT.block_frames, 2, 4),
            tokens_BPK=torch.randint(3, 259, (batch, NUM_PROMPTS, TEXT_LEN)),
            prompt_BQ=torch.zeros(batch, CLIP_BLOCKS, dtype=torch.int64),
        )


def small_model(seed: int = 0) -> Trainee:
    torch.manual_seed(seed)
    model = Trainee()
    model.transformer = CausalWan(SMALL)
    nn.init.normal_(model.transformer.proj_out.weight, std=0.1)
    return model


def small_distiller(**changes: Any) -> Distiller:
    guide = small_model(2) if changes.pop("guided", False) else None
    few = {"batch": 2, "beginnings_batch": 4, "fake_updates": 2, "fake_first": 1, "refresh_steps": 2}
    clips = cast(ClipBuffer, FewClips())
    layouts = (LAYOUT, BEGINNING)
    return Distiller(
        DistilConfig(**{**few, **changes}), small_model(), clips, clips, layouts, CPU, guide=guide, pool=SMALL_POOL
    )


def test_gradient_vanishes_where_the_scores_agree() -> None:
    distiller = small_distiller()
    sequence = distiller.true_sequence()
    own = torch.randn_like(sequence.history_BCFYX)
    assert not distiller.score_gradient(own, sequence).any()
    with torch.no_grad():
        distiller.fake.proj_out.bias.add_(0.1)
    assert distiller.score_gradient(own, sequence).abs().min() > 0


def test_guide_pushes_the_real_score_away_from_itself() -> None:
    plain, guided = small_distiller(), small_distiller(guided=True, guidance=1.0)
    sequence = guided.true_sequence(beginning=True)
    own = torch.randn_like(sequence.history_BCFYX)

    def gradient(distiller: Distiller) -> torch.Tensor:
        torch.manual_seed(4)
        return distiller.score_gradient(own, sequence)

    assert torch.equal(gradient(guided), gradient(plain))
    guided.config = dataclasses.replace(guided.config, guidance=2.0)
    assert not torch.equal(gradient(guided), gradient(plain))
    assert guided.guide is not None
    same = small_model()
    guided.guide = same  # no worse than the teacher: nothing to go away from
    torch.testing.assert_close(gradient(guided), gradient(plain))


def test_all_kinds_of_sequences_are_drawn() -> None:
    distiller = small_distiller()
    distiller.pool.refresh(distiller.model)
    drawn = [distiller.draw() for _ in range(30)]
    kinds = {(s.geometry is distiller.short, s.clean_BCFYX is None, s.history_BCFYX.shape[:3]) for s in drawn}
    assert kinds == {(False, True, (2, 16, 6)), (False, False, (2, 16, 6)), (True, False, (4, 16, 4))}


def test_gradient_is_normalised_by_block() -> None:
    own, real = torch.zeros(1, 2, 4, 1, 1), torch.ones(1, 2, 4, 1, 1)
    real[:, :, 2:] = 4.0
    gradient = matching_gradient(own, real, real + 1.0, 2)
    assert gradient[0, 0, :, 0, 0].tolist() == [1.0, 1.0, 0.25, 0.25]


def test_loss_moves_the_student_by_the_gradient_and_the_truth() -> None:
    distiller = small_distiller(truth_weight=2.0)
    sequence = distiller.true_sequence()
    assert sequence.clean_BCFYX is not None
    with torch.no_grad():
        distiller.fake.proj_out.bias.add_(0.1)
    own = torch.randn_like(sequence.history_BCFYX).requires_grad_()
    truth_BN = torch.tensor([[False, True, False], [False, False, False]])
    loss, size, error = distiller.student_loss(own, truth_BN, sequence)
    loss.backward()
    assert own.grad is not None and size > 0 and error > 0
    by_block = own.grad.unflatten(2, (3, 2)).abs().sum(dim=(1, 3, 4, 5))
    assert by_block[0, 0] == 0  # not askable
    assert (by_block.flatten()[1:] > 0).all()
    toward = (own.detach() - sequence.clean_BCFYX)[0, :, 2:4]
    assert torch.nn.functional.cosine_similarity(own.grad[0, :, 2:4].flatten(), toward.flatten(), dim=0) > 0.999


def seeded(distiller: Distiller, sequence: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    noisy, sigma_BN, _ = distiller.student_input(sequence)
    return distiller.denoised(distiller.model.transformer, noisy, sigma_BN, sequence), sigma_BN


def test_generated_blocks_see_the_history_before_them_alone() -> None:
    distiller = small_distiller()
    distiller.pool.refresh(distiller.model)
    sequence = distiller.own_sequence()
    own, sigma_BN = seeded(distiller, sequence)
    assert set(sigma_BN.flatten().tolist()) <= set(distiller.levels.tolist()) and len(sigma_BN.unique()) > 1
    history = sequence.history_BCFYX.clone()
    history[:, :, 2:4] += 1.0
    changed, _ = seeded(
        distiller, Sequence(**{n: getattr(sequence, n) for n in Sequence.__slots__} | {"history_BCFYX": history})
    )
    assert torch.equal(changed[:, :, :4], own[:, :, :4])
    assert not torch.isclose(changed[:, :, 4:], own[:, :, 4:]).all()


def test_steps_start_from_the_last_guess() -> None:
    distiller = small_distiller()
    sequence = distiller.true_sequence()
    torch.manual_seed(3)
    inputs = distiller.step_inputs(sequence)
    torch.manual_seed(3)
    noise = [torch.randn_like(inputs[0]) for _ in inputs]
    level = torch.full((2, 3), distiller.sigmas[1])
    guess = distiller.denoised(distiller.model.transformer, inputs[1], level, sequence)
    assert torch.equal(inputs[0], noise[0])
    torch.testing.assert_close(inputs[2], torch.lerp(guess, noise[2], distiller.sigmas[2]))


def test_truth_is_asked_at_the_last_steps_only() -> None:
    distiller = small_distiller(truth_share=0.5, batch=8)
    sequence = distiller.true_sequence()
    _, sigma_BN, truth_BN = distiller.student_input(sequence)
    assert truth_BN.any() and not truth_BN.all()
    assert set(sigma_BN[truth_BN].tolist()) <= set(distiller.levels[-2:].tolist())


def test_iterations_train_the_fake_first() -> None:
    distiller = small_distiller()
    before = copy.deepcopy(distiller.model.state_dict())
    assert torch.isfinite(distiller.iterate()).all()
    assert all(torch.equal(p, before[name]) for name, p in distiller.model.state_dict().items())
    fake = copy.deepcopy(distiller.fake.state_dict())
    for _ in range(3):
        assert torch.isfinite(distiller.iterate()).all()
    moved = {name for name, p in distiller.model.state_dict().items() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("transformer.") for name in moved)
    assert any(not torch.equal(p, fake[name]) for name, p in distiller.fake.state_dict().items())
    teacher = {f"transformer.{name}": p for name, p in distiller.teacher.state_dict().items()}
    assert all(torch.equal(p, before[name]) for name, p in teacher.items())


def test_state_round_trip(tmp_path: Path) -> None:
    first, second = small_distiller(), small_distiller()
    for _ in range(3):
        first.iterate()
    save_distilled(tmp_path, first)
    load_distilled(tmp_path, second)
    assert second.step == 3
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, dict(second.model.named_parameters())[name])
        assert torch.equal(first.average[name].bfloat16(), second.average[name].bfloat16())
    for mine, other in zip(first.fake.parameters(), second.fake.parameters(), strict=True):
        assert torch.equal(mine.bfloat16(), other.bfloat16())
    assert torch.isfinite(second.iterate()).all()
    averaged = small_model(1)
    fill(averaged, tmp_path, CPU)
    assert all(torch.equal(p, first.average[n].bfloat16().float()) for n, p in averaged.named_parameters())


def test_run_saves_measures_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_REPORT_STEPS", 2)
    distiller = small_distiller(seconds=0.0)
    distil.watch(distiller, tmp_path, PreviewPlan(worlds=2, blocks=5, moments=3, window=3), 100.0)
    printed = capsys.readouterr().out
    assert "recall" in printed and "sharpness" in printed and "ms a step" in printed
    picture = Image.open(tmp_path / "preview-000002.png")
    assert picture.size == (3 * (4 * 8 + 4), 2 * (2 * 8 + 4))
    assert (tmp_path / "state.json").exists() and (tmp_path / "distillation.json").exists()


def test_not_a_number_changes_no_weights_and_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_REPORT_STEPS", 1)
    monkeypatch.setattr(training, "_MOST_SKIPPED", 3)
    distiller = small_distiller()
    with torch.no_grad():
        distiller.fake.proj_out.bias.fill_(float("nan"))
    before = copy.deepcopy(distiller.model.state_dict())
    with pytest.raises(RuntimeError, match="without a finite gradient"):
        distiller.run(60.0, 100.0, lambda: None, lambda: None)
    assert all(torch.equal(p, before[name]) for name, p in distiller.model.state_dict().items())


def test_mean_over_chosen_blocks() -> None:
    values = spread(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 1, 4, 1, 1)).expand(-1, 3, -1, 2, 2)
    chosen = torch.tensor([[True, False], [False, True]])
    assert mean_over(values, chosen) == 2.5
    assert mean_over(values, torch.zeros_like(chosen)) == 0
