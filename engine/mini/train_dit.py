"""Train mini's transformer and text encoder on latents of the procedural world.

    python -m longtake.engine.mini.train_dit --vae DIR/vae --out DIR --seconds 1200 [--resume DIR]
    torchrun --nproc-per-node 4 -m longtake.engine.mini.train_dit ...    the same on four GPUs

Flow matching (target ``noise - x0``) by teacher forcing over blocks with a noise level each. Steps on long sequences,
which teach to remember, take turns with steps on many beginnings of films, which teach to invent. Two phases in one
run: the history is the truth, lightly noised so that small errors do no harm; then, for a share of the long batches,
the history is what the model itself makes of it (one denoising step from a random level of noise), so that it learns to
go on from its own pictures. Stops by the clock, saves its state, and goes on from there with ``--resume``.

Shape legend: B batch, N blocks, C latent channels, F latent frames, Y, X latent rows and columns, K text tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from longtake.engine.config import ModelConfig
from longtake.engine.mini.clips import BEGINNING_BLOCKS, Batch, ClipBuffer, shared_beginnings, shared_clips
from longtake.engine.mini.muon import Muon, leave_out_unless_finite
from longtake.engine.mini.ranks import ALONE, Ranks, join, leave
from longtake.engine.mini.state import load_state, load_weights, save_state
from longtake.engine.mini.teacher_forcing import Geometry, Layout, make_attend
from longtake.engine.model import CausalWan

TRANSFORMER = ModelConfig(num_heads=4, head_dim=64, num_layers=6, ffn_dim=608, text_dim=64)
TEXT = UMT5Config(
    vocab_size=384,
    d_model=64,
    d_kv=16,
    num_heads=4,
    d_ff=128,
    num_layers=2,
    relative_attention_num_buckets=32,
    dropout_rate=0.0,
    pad_token_id=0,
    eos_token_id=1,
    decoder_start_token_id=0,
    is_encoder_decoder=False,
    use_cache=False,
)
LAYOUT = Layout(num_blocks=20, block_frames=3, rows=6, columns=10)
BEGINNING = Layout(num_blocks=BEGINNING_BLOCKS, block_frames=3, rows=6, columns=10)
_MOST_SKIPPED = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training run besides the world."""

    seconds: float = 1200.0
    horizon_s: float = 1200.0  # of the learning-rate schedule, over all resumed runs
    batch: int = 32
    beginnings_batch: int = 160
    beginnings_share: float = 0.5  # of the steps
    learning_rate: float = 1.2e-3
    warmup_steps: int = 200
    final_rate: float = 0.05
    weight_decay: float = 0.01
    ema: float = 0.9995
    shift: float = 3.0
    history_noise: float = 0.1
    own_history_from: float = 0.7  # share of the horizon after which the model's own pictures serve as history
    own_history_share: float = 0.4
    seed: int = 1


class Trainee(nn.Module):
    """Transformer and text encoder, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = CausalWan(TRANSFORMER)
        self.text_encoder = UMT5EncoderModel(TEXT)
        initialise(self.transformer)

    def encode_text(self, tokens_BNK: Tensor) -> Tensor:
        """Token ids [B, beats, K], 0 where padded -> embeddings [B, beats * K, E], zero where padded."""
        tokens = tokens_BNK.flatten(0, 1)
        mask = (tokens != 0).long()
        hidden: Tensor = self.text_encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        embeds: Tensor = (hidden * mask[..., None]).unflatten(0, tokens_BNK.shape[:2]).flatten(1, 2)
        return embeds


def initialise(model: CausalWan) -> None:
    """Wan's initialisation: Xavier matrices, small time and text embeddings, zero output."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.patch_embedding.weight.flatten(1))
    embedder = model.condition_embedder
    for linear in (embedder.text_embedder.linear_1, embedder.text_embedder.linear_2):
        nn.init.normal_(linear.weight, std=0.02)
    for linear in (embedder.time_embedder.linear_1, embedder.time_embedder.linear_2):
        nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(model.proj_out.weight)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon trains this parameter of a ``Trainee`` or of its transformer: the matrices of its layers."""
    return name.removeprefix("transformer.").startswith("blocks.") and parameter.ndim == 2


def make_optimisers(
    model: nn.Module, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)
) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the layers' matrices, AdamW for all else that is trained; learning rates are to be set at each step."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    others = [p for name, p in named if not is_matrix(name, p)]
    decay, plain = [p for p in others if p.ndim >= 2], [p for p in others if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=betas, fused=others[0].is_cuda)
    return Muon([p for name, p in named if is_matrix(name, p)], lr=1.0, weight_decay=weight_decay), adam


def sample_sigmas(count: tuple[int, int], shift: float, device: torch.device) -> Tensor:
    """Noise levels [B, N]: uniform timesteps, shifted as the sampler shifts them."""
    uniform = torch.rand(count, device=device)
    return shift * uniform / (1 + (shift - 1) * uniform)


def lightly_noised(clean_BCFYX: Tensor, num_blocks: int, most: float) -> Tensor:
    """A history that is not quite clean: a level of noise for each block, up to ``most`` and mostly small."""
    level_BN = most * torch.rand(len(clean_BCFYX), num_blocks, device=clean_BCFYX.device).square()
    return torch.lerp(clean_BCFYX, torch.randn_like(clean_BCFYX), spread(level_BN, clean_BCFYX))


def spread(values_BN: Tensor, like_BCFYX: Tensor) -> Tensor:
    """One number a block -> [B, 1, N * F, 1, 1]."""
    frames = like_BCFYX.shape[2] // values_BN.shape[1]
    return values_BN.repeat_interleave(frames, dim=1)[:, None, :, None, None]


def mean_over(values_BCFYX: Tensor, chosen_BN: Tensor) -> Tensor:
    """Mean over the chosen blocks; 0 where none is."""
    by_block_BN: Tensor = values_BCFYX.unflatten(2, (chosen_BN.shape[1], -1)).mean(dim=(1, 3, 4, 5))
    return (by_block_BN * chosen_BN).sum() / chosen_BN.sum().clamp_min(1)


class Trainer:
    """One training run on one device, or one rank's part of it.

    Args:
        config: of the run; its batches are those of all ranks together.
        clips: of this rank, long ones.
        beginnings: of this rank.
        device: of this rank.
        ranks: that train together.
    """

    def __init__(
        self,
        config: TrainConfig,
        clips: ClipBuffer,
        beginnings: ClipBuffer,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        torch.manual_seed(config.seed)
        self.choices = random.Random(config.seed)  # alike on all ranks: what kind of step comes
        self.config, self.device, self.ranks = config, device, ranks
        self.clips, self.beginnings = clips, beginnings
        self.batch, self.beginnings_batch = ranks.share(config.batch), ranks.share(config.beginnings_batch)
        self.model = Trainee().to(device)
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.matrices = {name: p for name, p in self.model.named_parameters() if is_matrix(name, p)}
        self.muon, self.adam = make_optimisers(self.model, config.weight_decay)
        self.long, self.short = (Geometry(layout, TRANSFORMER.head_dim, device) for layout in (LAYOUT, BEGINNING))
        torch.manual_seed(config.seed + ranks.index)
        self.step = 0
        self.num_skipped = torch.zeros((), dtype=torch.int64, device=device)  # steps without a finite gradient
        self.elapsed_s = 0.0
        self.forward: Callable[..., Tensor] = self._forward
        if device.type == "cuda":
            self.forward = torch.compile(self._forward, dynamic=False)

    def _forward(
        self,
        geometry: Geometry,
        doubled: Tensor,
        times_BF: Tensor,
        embeds: Tensor,
        cos: Tensor,
        sin: Tensor,
        text_mask: Tensor,
    ) -> Tensor:
        """Flow of the noisy half [B, C, F, Y, X]."""
        transformer = self.model.transformer
        context = transformer.text_context(embeds)
        attend = make_attend(cos, sin, geometry.mask)
        flow: Tensor = transformer(doubled, times_BF, context, attend, text_mask)
        return flow[:, :, doubled.shape[2] // 2 :]

    def progress(self) -> float:
        """Share of the horizon that is over, 0 .. 1."""
        return min(1.0, self.elapsed_s / self.config.horizon_s)

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine over the horizon."""
        config = self.config
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress()))
        rate = config.final_rate + (1 - config.final_rate) * cosine
        return config.learning_rate * min(1.0, (self.step + 1) / config.warmup_steps) * rate

    def flow(self, geometry: Geometry, history: Tensor, noisy: Tensor, sigma_BF: Tensor, batch: Batch) -> Tensor:
        """The model's flow for the noisy blocks, given a clean (or nearly clean) history."""
        times = torch.cat((torch.zeros_like(sigma_BF), 1000 * sigma_BF), dim=1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            doubled = torch.cat((history, noisy), dim=2)
            embeds = self.model.encode_text(batch.tokens_BNK)
            return self.forward(geometry, doubled, times, embeds, *geometry.rotations(batch.starts_BN), batch.text_mask)

    def own_history(self, clean: Tensor, batch: Batch) -> Tensor:
        """A history of the model's own one-step pictures, from a random level of noise, for most of the blocks."""
        count, frames = batch.starts_BN.shape, self.long.layout.block_frames
        sigma_BF = (0.35 + 0.45 * torch.rand(count, device=self.device)).repeat_interleave(frames, dim=1)
        level = sigma_BF[:, None, :, None, None]
        noisy = torch.lerp(clean, torch.randn_like(clean), level)
        with torch.no_grad():
            guess = noisy - level * self.flow(self.long, clean, noisy, sigma_BF, batch).float()
        use = torch.rand(count, device=self.device) < 0.7
        return torch.where(use.repeat_interleave(frames, dim=1)[:, None, :, None, None], guess, clean)

    def train_step(self) -> Tensor:
        """One optimiser step; returns the loss (a device scalar, not read here)."""
        config = self.config
        if self.choices.random() < config.beginnings_share:
            geometry = self.short
            batch = self.beginnings.sample(self.beginnings_batch, geometry.layout)
        else:
            geometry = self.long
            batch = self.clips.sample(self.batch, geometry.layout)
        past = clean = batch.latents_BCFYX.float()
        own = self.choices.random() < config.own_history_share and self.progress() > config.own_history_from
        if own and geometry is self.long:
            past = self.own_history(clean, batch)
        noise = torch.randn_like(clean)
        sigma_BN = sample_sigmas(tuple(batch.starts_BN.shape), config.shift, self.device)  # type: ignore[arg-type]
        sigma_BF = sigma_BN.repeat_interleave(geometry.layout.block_frames, dim=1)
        noisy = torch.lerp(clean, noise, sigma_BF[:, None, :, None, None])
        flow = self.flow(
            geometry, lightly_noised(past, geometry.layout.num_blocks, config.history_noise), noisy, sigma_BF, batch
        )
        error = (flow.float() - (noise - clean)).square()
        loss = mean_over(error, batch.askable_BN)
        loss.backward()
        self.ranks.average_gradients(self.model.parameters())
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        finite = leave_out_unless_finite((p.grad for p in self.model.parameters() if p.grad is not None), norm)
        self.num_skipped += ~finite
        for group in self.adam.param_groups + self.muon.param_groups:
            group["lr"] = self.learning_rate()
        self.adam.step()
        self.muon.step()
        self.model.zero_grad(set_to_none=True)
        keep = min(self.config.ema, (self.step + 1) / (self.step + 10))
        parameters = [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(list(self.average.values()), parameters, 1 - keep)
        self.step += 1
        return torch.where(finite, loss.detach(), math.nan)

    def run(
        self,
        seconds: float,
        save_every_s: float,
        save: Callable[[], None],
        preview_every_s: float = math.inf,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """Train until ``seconds`` have passed, saving and looking from time to time and at the end."""
        started = last = saved = looked = self.ranks.first(time.monotonic(), self.device)
        losses: list[Tensor] = []
        while True:
            self.clips.refresh()
            self.beginnings.refresh()
            losses.append(self.train_step())
            if len(losses) == 50:
                loss = torch.stack(losses).nanmean().item()  # waits for the device
                if self.num_skipped > _MOST_SKIPPED:
                    raise RuntimeError(
                        f"{int(self.num_skipped)} steps had no finite gradient: lower the learning rate, resume"
                    )
                now = self.ranks.first(time.monotonic(), self.device)
                self.elapsed_s += now - last
                last = now
                rate = self.learning_rate()
                self.say(
                    f"step {self.step} loss {loss:.4f} lr {rate:.2e} "
                    f"skipped {int(self.num_skipped)} "
                    f"clips {self.clips.num_made} beginnings {self.beginnings.num_made} "
                    f"{(now - started):.0f} s of {seconds:.0f}"
                )
                losses.clear()
                if now - saved > save_every_s:
                    self.alone(save)
                    saved = now
                if now - looked > preview_every_s:
                    self.alone(look)
                    looked = now
                if now - started > seconds:
                    break
        self.alone(save)
        if preview_every_s < math.inf:
            self.alone(look)

    def alone(self, act: Callable[[], None]) -> None:
        """The first rank does it; the others go on to the next step and wait there."""
        if self.ranks.leads:
            act()

    def say(self, line: str) -> None:
        """Print it once."""
        if self.ranks.leads:
            print(line, flush=True)


def read_options() -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the trained VAE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1200.0, help="of this run")
    parser.add_argument("--horizon", type=float, default=1200.0, help="seconds of all runs together")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--weights", type=Path, help="start from the weights of a model's or a state's folder")
    parser.add_argument("--clips", type=int, default=4096, help="clips kept on the device")
    parser.add_argument("--first-clips", type=int, default=768, help="clips made before training starts")
    parser.add_argument("--beginnings", type=int, default=8192, help="beginnings of clips kept on the device")
    parser.add_argument("--first-beginnings", type=int, default=2048, help="of them, made before training starts")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--preview-every", type=float, default=100.0, help="seconds between contact sheets in --out")
    parser.add_argument("--preview-blocks", type=int, default=16, help="blocks of 0.75 s of the films shown there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Train as the command line says."""
    from longtake.engine.mini.preview import PreviewPlan, preview  # which needs this module

    options = read_options()
    torch.set_float32_matmul_precision("high")
    ranks, device = join(options.device)
    config = TrainConfig(seconds=options.seconds, horizon_s=options.horizon, batch=options.batch)
    clips = shared_clips(options.vae, options.clips, device, ranks)
    beginnings = shared_beginnings(options.vae, options.beginnings, device, ranks)
    trainer = Trainer(config, clips, beginnings, device, ranks)
    if options.weights:
        load_weights(options.weights, trainer)
    if options.resume:
        load_state(options.resume, trainer)
    clips.fill(options.first_clips // ranks.size)
    beginnings.fill(options.first_beginnings // ranks.size)
    options.out.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        save_state(options.out, trainer)
        record = {"config": asdict(config), "ranks": ranks.size, "step": trainer.step, "elapsed_s": trainer.elapsed_s}
        record["skipped"] = int(trainer.num_skipped)
        (options.out / "training.json").write_text(json.dumps(record, indent=1))

    plan = PreviewPlan(blocks=options.preview_blocks)

    def look() -> None:
        path = options.out / f"preview-{trainer.step:06d}.png"
        print("preview:", preview(trainer.model, trainer.average, clips, LAYOUT, plan, path), flush=True)

    trainer.run(options.seconds, 120.0, save, options.preview_every, look)
    leave()


if __name__ == "__main__":
    main()
