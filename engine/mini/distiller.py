"""The distillation of mini's few-step sampler: a student and two scores over whole sequences; see distil.py.

Shape legend: B batch, N blocks, P prompts, C latent channels, F latent frames, Y, X latent rows and columns, E text
width, K text tokens.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longtake.engine.config import SamplerConfig
from longtake.engine.mini.clips import NUM_PROMPTS, TEXT_LEN, ClipBuffer, text_mask
from longtake.engine.mini.film_pool import FilmPool, PoolPlan
from longtake.engine.mini.muon import leave_out_unless_finite
from longtake.engine.mini.ranks import ALONE, Ranks
from longtake.engine.mini.teacher_forcing import Geometry, Layout, make_attend
from longtake.engine.mini.train_dit import Trainee, lightly_noised, make_optimisers, mean_over, sample_sigmas, spread
from longtake.engine.model import CausalWan
from longtake.engine.sampler import shifted_sigmas

_LEAST_ERROR = 0.05  # of a latent of unit variance: below it the normaliser would only enlarge rounding
_REPORT_STEPS = 20
_MOST_SKIPPED = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilConfig:
    """Everything that decides a distillation besides the world and the teacher."""

    seconds: float = 650.0
    horizon_s: float = 650.0
    batch: int = 16
    beginnings_batch: int = 80
    beginnings_share: float = 0.35  # of the iterations
    student_rate: float = 2e-4
    fake_rate: float = 6e-4
    fake_updates: int = 2  # a student update (DMD2's two time scales)
    fake_first: int = 40  # iterations before the student moves
    warmup_steps: int = 20
    weight_decay: float = 0.0
    ema: float = 0.99
    timesteps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    shift: float = 3.0
    history_noise: float = 0.1
    own_history_share: float = 0.4
    guidance: float = 1.8  # how far the real score goes from the guide's through the teacher's
    refresh_steps: int = 6  # iterations between two advances of the student's films
    truth_share: float = 0.25  # of the blocks under a true history, denoised from the truth
    truth_weight: float = 1.0
    seed: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """What one iteration works on: a history, the truth where it is known, and what conditions each block."""

    geometry: Geometry
    history_BCFYX: Tensor
    clean_BCFYX: Tensor | None
    starts_BN: Tensor
    askable_BN: Tensor
    tokens_BPK: Tensor
    embeds_BKE: Tensor
    text_mask: Tensor


def matching_gradient(own: Tensor, real: Tensor, fake: Tensor, num_blocks: int) -> Tensor:
    """The direction in which the student's blocks are to move less, DMD's equations 7 and 8.

    Args:
        own: the student's blocks, [B, C, N * F, Y, X].
        real, fake: what the two scores make of them, noised; alike.
        num_blocks: N.

    Returns:
        ``fake - real`` over the mean distance of ``own`` from ``real`` in the block; like ``own``.
    """
    distance = (own - real).abs().unflatten(2, (num_blocks, -1)).mean(dim=(1, 3, 4, 5)).clamp_min(_LEAST_ERROR)
    return (fake - real) / spread(distance, own)


class Distiller:
    """One distillation on one device.

    Args:
        config: of the run; its batches are those of all ranks together.
        model: the trained model; becomes the student. Its text encoder stays as it is.
        clips: long true sequences, prompts.
        beginnings: short true sequences, from the start of films.
        layouts: of a long sequence, of a short one.
        device: of the model and the clips.
        guide: a worse state of the same model, by which the real score is guided; None: it is the teacher's alone.
        pool: how films of its own are made.
        ranks: that distil together.
    """

    def __init__(
        self,
        config: DistilConfig,
        model: Trainee,
        clips: ClipBuffer,
        beginnings: ClipBuffer,
        layouts: tuple[Layout, Layout],
        device: torch.device,
        *,
        guide: Trainee | None = None,
        pool: PoolPlan | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        torch.manual_seed(config.seed + ranks.index)
        self.choices = random.Random(config.seed)  # alike on all ranks: what kind of step comes
        self.ranks = ranks
        self.batch, self.beginnings_batch = ranks.share(config.batch), ranks.share(config.beginnings_batch)
        self.config, self.clips, self.beginnings, self.device = config, clips, beginnings, device
        self.model = model
        model.text_encoder.requires_grad_(False)
        self.teacher = copy.deepcopy(model.transformer)  # never stepped; all three alike, so that graphs are shared
        self.fake = copy.deepcopy(model.transformer)
        self.guide = guide
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.sigmas = shifted_sigmas(SamplerConfig(timesteps=config.timesteps, shift=config.shift))
        self.levels = torch.tensor(self.sigmas, device=device)
        betas = (0.5, 0.95)
        self.student_optimisers = make_optimisers(model.transformer, config.weight_decay, betas)
        self.fake_optimisers = make_optimisers(self.fake, config.weight_decay, betas)
        head_dim = model.transformer.config.head_dim
        self.long, self.short = (Geometry(layout, head_dim, device) for layout in layouts)
        self.pool = FilmPool(
            clips, model, self.long.layout, self.sigmas, pool or PoolPlan(batch=self.batch), device, self.choices
        )
        self.step = self.steps_here = 0
        self.num_skipped = torch.zeros((), dtype=torch.int64, device=device)  # updates without a finite gradient
        self.elapsed_s = 0.0
        self.forward: Callable[..., Tensor] = self._forward
        if device.type == "cuda":
            self.forward = torch.compile(self._forward, dynamic=False)

    def _forward(
        self,
        geometry: Geometry,
        transformer: CausalWan,
        doubled: Tensor,
        times_BF: Tensor,
        embeds: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Flow of the noisy half [B, C, F, Y, X]."""
        context = transformer.text_context(embeds)
        flow: Tensor = transformer(doubled, times_BF, context, make_attend(cos, sin, geometry.mask), mask)
        return flow[:, :, doubled.shape[2] // 2 :]

    def denoised(
        self,
        transformer: CausalWan,
        noisy: Tensor,
        sigma_BN: Tensor,
        sequence: Sequence,
        embeds_BKE: Tensor | None = None,
    ) -> Tensor:
        """What a model makes of noisy blocks: x0, float32 [B, C, F, Y, X]; with other embeddings if given."""
        geometry = sequence.geometry
        sigma_BF = sigma_BN.repeat_interleave(geometry.layout.block_frames, dim=1)
        times = torch.cat((torch.zeros_like(sigma_BF), 1000 * sigma_BF), dim=1)
        embeds = sequence.embeds_BKE if embeds_BKE is None else embeds_BKE
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            doubled = torch.cat((sequence.history_BCFYX, noisy), dim=2)
            rotations = geometry.rotations(sequence.starts_BN)
            flow = self.forward(geometry, transformer, doubled, times, embeds, *rotations, sequence.text_mask)
        return noisy - sigma_BF[:, None, :, None, None] * flow.float()

    @torch.no_grad()
    def true_sequence(self, *, beginning: bool = False) -> Sequence:
        """A sequence of a clip, a long one or the beginning of one."""
        geometry = self.short if beginning else self.long
        clips, count = (self.beginnings, self.beginnings_batch) if beginning else (self.clips, self.batch)
        batch = clips.sample(count, geometry.layout)
        clean = batch.latents_BCFYX.float()
        return Sequence(
            geometry=geometry,
            history_BCFYX=lightly_noised(clean, geometry.layout.num_blocks, self.config.history_noise),
            clean_BCFYX=clean,
            starts_BN=batch.starts_BN,
            askable_BN=batch.askable_BN,
            tokens_BPK=batch.tokens_BNK,
            embeds_BKE=self.model.encode_text(batch.tokens_BNK),
            text_mask=batch.text_mask,
        )

    @torch.no_grad()
    def own_sequence(self) -> Sequence:
        """A sequence of a film of the student's own."""
        own, layout = self.pool.sample(), self.long.layout
        return Sequence(
            geometry=self.long,
            history_BCFYX=lightly_noised(own.latents_BCFYX, layout.num_blocks, self.config.history_noise),
            clean_BCFYX=None,
            starts_BN=own.starts_BN,
            askable_BN=torch.ones_like(own.starts_BN, dtype=torch.bool),
            tokens_BPK=own.tokens_BPK,
            embeds_BKE=self.model.encode_text(own.tokens_BPK),
            text_mask=text_mask(own.prompt_BN, layout, NUM_PROMPTS, TEXT_LEN),
        )

    def draw(self) -> Sequence:
        """A sequence of one of the three kinds, by their shares."""
        kind = self.choices.random()
        if kind < self.config.own_history_share:
            return self.own_sequence()
        return self.true_sequence(beginning=kind < self.config.own_history_share + self.config.beginnings_share)

    @torch.no_grad()
    def step_inputs(self, sequence: Sequence) -> list[Tensor]:
        """What each of the sampler's steps is given, all blocks at once: as many [B, C, F, Y, X] as there are steps."""
        shape = sequence.starts_BN.shape
        inputs = [torch.randn_like(sequence.history_BCFYX)]
        for sigma, following in zip(self.sigmas[:-1], self.sigmas[1:], strict=True):
            level = torch.full(shape, sigma, device=self.device)
            guess = self.denoised(self.model.transformer, inputs[-1], level, sequence)
            inputs.append(torch.lerp(guess, torch.randn_like(guess), following))
        return inputs

    @torch.no_grad()
    def student_input(self, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """The noisy half of the pass that has gradients.

        Returns:
            Latents [B, C, F, Y, X], their noise levels [B, N], and which blocks [B, N] come from the truth.
        """
        shape, last = sequence.starts_BN.shape, len(self.sigmas) - 1
        exits_BN = torch.randint(0, last + 1, shape, device=self.device)
        noisy = torch.zeros_like(sequence.history_BCFYX)
        for step, latents in enumerate(self.step_inputs(sequence)):
            noisy = torch.where(spread(exits_BN == step, noisy), latents, noisy)
        truth_BN = torch.zeros(shape, dtype=torch.bool, device=self.device)
        if sequence.clean_BCFYX is not None:
            truth_BN = torch.rand(shape, device=self.device) < self.config.truth_share
            exits_BN = torch.where(truth_BN, exits_BN.clamp_min(max(last - 1, 0)), exits_BN)
            clean = sequence.clean_BCFYX
            noised = torch.lerp(clean, torch.randn_like(clean), spread(self.levels[exits_BN], clean))
            noisy = torch.where(spread(truth_BN, noisy), noised, noisy)
        return noisy, self.levels[exits_BN], truth_BN

    def _noised(self, clean: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """Blocks noised for a score: latents, levels [B, N], the noise."""
        count = (clean.shape[0], sequence.geometry.layout.num_blocks)
        sigma_BN = sample_sigmas(count, self.config.shift, self.device).clamp(0.02, 0.98)
        noise = torch.randn_like(clean)
        return torch.lerp(clean, noise, spread(sigma_BN, clean)), sigma_BN, noise

    @torch.no_grad()
    def score_gradient(self, own: Tensor, sequence: Sequence) -> Tensor:
        """The matching gradient of the student's blocks, like them."""
        noisy, sigma_BN, _ = self._noised(own, sequence)
        real = self.denoised(self.teacher, noisy, sigma_BN, sequence)
        if self.guide is not None:
            embeds = self.guide.encode_text(sequence.tokens_BPK)
            worse = self.denoised(self.guide.transformer, noisy, sigma_BN, sequence, embeds)
            real = torch.lerp(worse, real, self.config.guidance)
        fake = self.denoised(self.fake, noisy, sigma_BN, sequence)
        return matching_gradient(own, real, fake, sequence.geometry.layout.num_blocks)

    def student_loss(self, own: Tensor, truth_BN: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of the student's blocks; the size of the matching gradient and the error against the truth, to print."""
        gradient = self.score_gradient(own.detach(), sequence)
        scored_BN = sequence.askable_BN & ~truth_BN
        loss = mean_over(own * gradient, scored_BN)  # whose gradient is that one
        size = mean_over(gradient.abs(), scored_BN)
        error = torch.zeros((), device=self.device)
        if sequence.clean_BCFYX is not None:
            error = mean_over((own - sequence.clean_BCFYX).square(), truth_BN & sequence.askable_BN)
            share = truth_BN.float().mean()
            loss = (1 - share) * loss + share * self.config.truth_weight * error
        return loss, size, error.detach()

    def fake_loss(self, own: Tensor, scored_BN: Tensor, sequence: Sequence) -> Tensor:
        """Flow matching on the student's blocks."""
        noisy, sigma_BN, noise = self._noised(own, sequence)
        sigma = spread(sigma_BN, own)
        flow = (noisy - self.denoised(self.fake, noisy, sigma_BN, sequence)) / sigma
        return mean_over((flow - (noise - own)).square(), scored_BN)

    def iterate(self) -> Tensor:
        """One iteration; figures to print, [4]: gradient size, error against the truth, fake loss, gradient norm."""
        if self.steps_here % self.config.refresh_steps == 0:
            self.pool.refresh(self.model)
        sequence = self.draw()
        noisy, sigma_BN, truth_BN = self.student_input(sequence)
        size = error = norm = torch.zeros((), device=self.device)
        learns = self.step >= self.config.fake_first
        with torch.set_grad_enabled(learns):
            own = self.denoised(self.model.transformer, noisy, sigma_BN, sequence)
        if learns:
            loss, size, error = self.student_loss(own, truth_BN, sequence)
            loss.backward()
            norm = self._apply(self.model.transformer, self.student_optimisers, self.config.student_rate)
            named = [(name, p.detach()) for name, p in self.model.named_parameters() if p.requires_grad]
            averages = [self.average[name] for name, _ in named]
            torch._foreach_lerp_(averages, [p for _, p in named], 1 - self.config.ema)
        scored_BN = sequence.askable_BN & ~truth_BN
        fake = torch.zeros((), device=self.device)
        for _ in range(self.config.fake_updates):
            fake = self.fake_loss(own.detach(), scored_BN, sequence)
            fake.backward()
            self._apply(self.fake, self.fake_optimisers, self.config.fake_rate)
        self.step += 1
        self.steps_here += 1
        return torch.stack((size, error, fake.detach(), norm.detach()))

    def learning_rate(self, rate: float) -> float:
        """Warm-up, then constant, then down to a tenth over the last third of the horizon."""
        left = max(0.0, 1.0 - self.elapsed_s / self.config.horizon_s)
        return rate * min(1.0, (self.steps_here + 1) / self.config.warmup_steps) * min(1.0, 0.1 + 2.7 * left)

    def _apply(self, model: nn.Module, optimisers: tuple[torch.optim.Optimizer, ...], rate: float) -> Tensor:
        self.ranks.average_gradients(model.parameters())
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.num_skipped += ~leave_out_unless_finite((p.grad for p in model.parameters() if p.grad is not None), norm)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.learning_rate(rate)
            optimiser.step()
        model.zero_grad(set_to_none=True)
        return norm

    def run(self, seconds: float, every_s: float, save: Callable[[], None], look: Callable[[], None]) -> None:
        """Train until ``seconds`` have passed, saving and looking every ``every_s`` and at the end."""
        started = last = saved = self.ranks.first(time.monotonic(), self.device)
        figures: list[Tensor] = []
        while True:
            self.clips.refresh()
            self.beginnings.refresh()
            figures.append(self.iterate())
            if len(figures) < _REPORT_STEPS:
                continue
            size, error, fake, norm = torch.stack(figures).nanmean(0).tolist()  # waits for the device
            if self.num_skipped > _MOST_SKIPPED:
                raise RuntimeError(
                    f"{int(self.num_skipped)} updates without a finite gradient: lower the rates, resume"
                )
            now = self.ranks.first(time.monotonic(), self.device)
            self.elapsed_s += now - last
            line = (
                f"step {self.step} gradient {size:.3f} truth {error:.4f} fake {fake:.4f} norm {norm:.3f} "
                f"skipped {int(self.num_skipped)}, "
                f"{1000 * (now - last) / len(figures):.0f} ms a step, {now - started:.0f} s of {seconds:.0f}"
            )
            last = now
            figures.clear()
            if self.ranks.leads:
                print(line, flush=True)
            if now - started > seconds:
                break
            if now - saved > every_s:
                if self.ranks.leads:
                    save()
                    look()
                saved = last = self.ranks.first(time.monotonic(), self.device)
        if self.ranks.leads:
            save()
            look()
