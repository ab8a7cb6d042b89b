"""Train mini's AutoencoderKLWan on the world, rendered on the fly.

    python -m longtake.engine.mini.train_vae --out DIR --seconds 820 [--resume DIR/state.pt [--decoder-only]]

Everything is included in `--seconds`: the last part goes to the latents' statistics, the evaluation of the weights as
saved, and DIR/vae/, DIR/vae.json, DIR/vae.png. DIR/state.pt is written every minute. `--resume` also takes the folder
of a saved model (DIR/vae). With `--decoder-only` the encoder stays as it was saved, to the bit, and with it every
latent and the latents' statistics; the decoder learns from latents without noise. `--device cpu --seconds 60 --tiny`
is a smoke test.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from .autoencoder import CONFIG, ClipForward, new_autoencoder
from .clip_store import ClipStore
from .evaluate_vae import EvalPlan, evaluate, latent_statistics, psnr
from .muon import Muon, leave_out_unless_finite
from .norm_silu import fused_norm_silu, norm_silu

CHECKPOINT_EVERY_S = 60.0
KL_WEIGHT = 3e-4
FIRST_LOG_VARIANCE = -6.0
WARMUP_STEPS = 100
MAX_NORM = 2.0
WEIGHT_DECAY = 0.05  # of matrices, times the learning rate
FLAT_SHARE = 0.4  # of the run at the full learning rate, which then falls in a straight line
_ENCODER = ("encoder.", "quant_conv.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much of everything; `--tiny` shrinks it for a smoke test."""

    shapes: tuple[tuple[int, int], ...] = ((32, 17), (16, 33), (32, 17), (8, 65))  # clips, frames: taken in turn
    store_clips: int = 512
    store_frames: int = 65
    clips_at_once: int = 64
    refresh_steps: int = 20  # a frame serves about 2.6 times
    workers: int = 2
    measured: EvalPlan = field(default_factory=EvalPlan)


TINY = Plan(
    shapes=((1, 5), (1, 9)),
    store_clips=4,
    store_frames=9,
    clips_at_once=4,
    workers=0,
    measured=EvalPlan(eval_worlds=9, eval_frames=5, long_worlds=1, long_frames=17, stats_worlds=4),
)


def losses(target: Tensor, output: Tensor, moments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the loss (with the KL of a posterior that learns) and the mean square error of video [B, 3, T, Y, X]."""
    difference = output.float() - target
    square = difference.square().mean()
    loss = 10 * square + 0.5 * difference.abs().mean()
    if moments is None:
        return loss, square
    mean, log_variance = moments.float().chunk(2, 1)
    log_variance = log_variance.clamp(-30, 20)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return loss + KL_WEIGHT * kl, square


def sample(moments: Tensor) -> Tensor:
    """Draw latents from the posterior."""
    mean, log_variance = moments.float().chunk(2, 1)
    return mean + torch.randn_like(mean) * (0.5 * log_variance.clamp(-30, 20)).exp()


@torch.no_grad()
def first_weights() -> AutoencoderKLWan:
    """Make a model that can be trained fast.

    PyTorch's own start shrinks a picture's variance by three in each convolution, and Wan has no shortcut around its
    resamplings, so that the biases drown the picture; here every convolution keeps the variance, biases are zero and
    residual branches start small. The posterior starts narrow: noise as wide as the latents hides them for long.
    """
    torch.manual_seed(0)
    vae = new_autoencoder()
    for name, module in vae.named_modules():
        if not isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            continue
        branch = name.endswith((".conv2", ".proj"))
        module.weight.normal_(0, (0.1 if branch else 1.0) * module.weight[0].numel() ** -0.5)
        if module.bias is not None:
            module.bias.zero_()
    vae.decoder.conv_out.weight.mul_(0.3)
    channels = CONFIG["z_dim"]
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = FIRST_LOG_VARIANCE
    return vae


def can_fuse(device: torch.device) -> bool:
    """Try the fused norm on a few numbers: says whether it works here and is right."""
    if device.type != "cuda":
        return False
    x = torch.randn(2, 24, 3, 5, 7, device=device).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    gamma = torch.rand(24, 1, 1, 1, device=device, requires_grad=True)
    weight = torch.randn_like(x)
    try:
        found = [
            torch.autograd.grad((f(x, gamma, 4.9) * weight).sum(), (x, gamma)) for f in (norm_silu, fused_norm_silu)
        ]
    except Exception as error:  # a compiler that is not there must not end the run
        print(f"no fused norm: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return False
    right = all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(*found, strict=True))
    if not right:
        print("no fused norm: it is wrong here", flush=True)
    return right


class Trainer:
    """The state of a run: weights, their moving average, optimisers, step."""

    def __init__(self, plan: Plan, device: torch.device, learning_rate: float, *, decoder_only: bool = False) -> None:
        self.plan, self.device, self.learning_rate, self.decoder_only = plan, device, learning_rate, decoder_only
        self.vae = first_weights().to(device).train()
        self.average = {name: p.detach().clone() for name, p in self.vae.named_parameters()}
        for name, parameter in self.vae.named_parameters():
            parameter.requires_grad_(not (decoder_only and name.startswith(_ENCODER)))
        self.learning = {name: p for name, p in self.vae.named_parameters() if p.requires_grad}
        matrices = {name: p for name, p in self.learning.items() if p.ndim >= 2 and p[0].numel() > 1}
        vectors = [p for name, p in self.learning.items() if name not in matrices]
        self.muon = Muon(matrices.values(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
        self.adam = torch.optim.AdamW(
            vectors, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=device.type == "cuda"
        )
        self.step = self.first_step = 0
        self.trained_s = 0.0
        self.statistics: tuple[list[float], list[float]] | None = None
        self.generator = torch.Generator().manual_seed(1)
        self.num_skipped = torch.zeros((), device=device)
        self.fused = can_fuse(device)
        cuda = device.type == "cuda"
        self.forward = ClipForward(self.vae, convolution="conv3d channels last" if cuda else "conv2d", fuse=self.fused)
        torch.backends.cudnn.benchmark = cuda
        self.store: ClipStore | None = None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def _loss(self, video: Tensor) -> tuple[Tensor, Tensor]:
        with self.autocast():
            if self.decoder_only:
                with torch.no_grad():
                    latents = self.forward.encode(video)[:, : CONFIG["z_dim"]]
                return losses(video, self.forward.decode(latents), None)
            moments = self.forward.encode(video)
            return losses(video, self.forward.decode(sample(moments)), moments)

    def batch(self) -> Tensor:
        """Cut the next step's clips, now and then from new ones."""
        plan = self.plan
        if self.store is None:  # a resumed run goes on with other worlds
            self.store = ClipStore(
                plan.store_clips,
                plan.store_frames,
                plan.clips_at_once,
                self.device,
                first_seed=1 + 4 * self.step,
                workers=plan.workers,
            )
            self.store.make(self.generator)
        elif (self.step - self.first_step) % plan.refresh_steps == 0:
            self.store.make(self.generator)
        clips, frames = plan.shapes[self.step % len(plan.shapes)]
        return self.store.sample(clips, frames, self.generator)

    def train_step(self, progress: float) -> tuple[Tensor, Tensor]:
        """Make one step; `progress` in [0, 1] of the run sets the learning rate."""
        video = self.batch()
        warm = min(1.0, (self.step - self.first_step + 1) / WARMUP_STEPS)
        rate = self.learning_rate * warm * max(0.005, min(1.0, (1 - progress) / (1 - FLAT_SHARE)))
        for group in self.muon.param_groups + self.adam.param_groups:
            group["lr"] = rate
        loss, square = self._loss(video)
        self.vae.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [p.grad for p in self.learning.values() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(self.learning.values(), MAX_NORM)
        self.num_skipped += ~leave_out_unless_finite(gradients, norm)
        self.muon.step()
        self.adam.step()
        self.step += 1
        keep = min(0.999, self.step / (10.0 + self.step))
        with torch.no_grad():
            averages = [self.average[name] for name in self.learning]
            torch._foreach_lerp_(averages, list(self.learning.values()), 1 - keep)
        return loss.detach(), square.detach()

    def save(self, path: Path) -> None:
        """Write the state, at most 16 MiB: momenta go as bfloat16."""
        state = {
            "weights": {name: p.detach().clone() for name, p in self.vae.named_parameters()},
            "average": self.average,
            "muon": {
                name: self.muon.state[p]["momentum"].to(torch.bfloat16)
                for name, p in self.learning.items()
                if p in self.muon.state
            },
            "adam": self.adam.state_dict(),
            "decoder_only": self.decoder_only,
            "statistics": self.statistics,
            "step": self.step,
            "trained_s": self.trained_s,
            "generator": self.generator.get_state(),
        }
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Go on from a state that `save` wrote, or from the folder of a saved model."""
        if path.is_dir():
            saved = AutoencoderKLWan.from_pretrained(str(path), torch_dtype=torch.float32)
            self._set(dict(saved.state_dict()), dict(saved.state_dict()))
            self.statistics = (list(saved.config.latents_mean), list(saved.config.latents_std))
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self._set(state["weights"], state["average"])
        self.statistics = state["statistics"]
        if state["decoder_only"] == self.decoder_only:
            for name, momentum in state["muon"].items():
                self.muon.state[self.learning[name]] = {"momentum": momentum.float()}
            self.adam.load_state_dict(state["adam"])
        self.step, self.trained_s = state["step"], state["trained_s"]
        self.first_step = self.step
        self.generator.set_state(state["generator"].cpu())

    def _set(self, weights: dict[str, Tensor], average: dict[str, Tensor]) -> None:
        for name, parameter in self.vae.named_parameters():
            frozen = name not in self.learning  # as it was saved: the average, rounded
            self.average[name].copy_(average[name].half().float() if frozen else average[name])
            parameter.copy_(self.average[name] if frozen else weights[name])


@torch.no_grad()
def finish(trainer: Trainer, out: Path) -> dict[str, Any]:
    """Measure the latents, write the model with rounded weights, evaluate it as saved on held-out worlds."""
    plan, device = trainer.plan.measured, trainer.device
    torch.backends.cudnn.benchmark = False  # few shapes come twice here
    torch.backends.cudnn.allow_tf32 = False
    rounded = {name: p.to(torch.float16) for name, p in trainer.average.items()}
    vae = new_autoencoder().to(device).eval()
    vae.load_state_dict({name: p.float() for name, p in rounded.items()})
    forward = ClipForward(vae, convolution=trainer.forward.convolution)
    if trainer.statistics is None or not trainer.decoder_only:
        trainer.statistics = latent_statistics(forward, plan, device)
    mean, std = trainer.statistics
    saved = new_autoencoder({**CONFIG, "latents_mean": mean, "latents_std": std})
    saved.load_state_dict({name: p.float() for name, p in rounded.items()})
    saved.to(torch.float16).save_pretrained(out / "vae", safe_serialization=True)
    size = (out / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size
    report = {
        "parameters": sum(p.numel() for p in vae.parameters()),
        "bytes": size,
        "steps": trainer.step,
        "trained_s": round(trainer.trained_s, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "convolution": forward.convolution,
        "fused": trainer.fused,
        "skipped_steps": int(trainer.num_skipped),
        "latents_mean": mean,
        "latents_std": std,
    }
    loaded: AutoencoderKLWan = AutoencoderKLWan.from_pretrained(str(out / "vae"), torch_dtype=torch.float32)
    report |= evaluate(loaded.to(device).eval(), plan, device, forward.convolution, out / "vae.png")
    (out / "vae.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def run(arguments: argparse.Namespace) -> None:
    """Train for the given time, checkpoint, finish."""
    began = time.monotonic()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device)
    plan = TINY if arguments.tiny else Plan()
    trainer = Trainer(plan, device, arguments.learning_rate, decoder_only=arguments.decoder_only)
    if arguments.resume:
        trainer.load(arguments.resume)
    reserve_s = arguments.reserve_seconds or (40.0 if device.type == "cuda" else 0.4 * arguments.seconds)
    until = began + arguments.seconds - reserve_s
    train_began = checkpointed = printed = time.monotonic()
    earlier_s, first_step, printed_step = trainer.trained_s, trainer.step, trainer.step
    while (now := time.monotonic()) < until or trainer.step == first_step:
        loss, square = trainer.train_step((now - train_began) / max(until - train_began, 1e-3))
        trainer.trained_s = earlier_s + time.monotonic() - train_began
        if time.monotonic() - printed > 5:
            ms = (time.monotonic() - printed) / (trainer.step - printed_step) * 1e3
            print(
                f"{time.monotonic() - began:6.1f} s  step {trainer.step}  loss {loss.item():.4f}  "
                f"PSNR {psnr(square / 4).item():.2f} dB  {ms:.1f} ms a step",
                flush=True,
            )
            printed, printed_step = time.monotonic(), trainer.step
            if trainer.num_skipped > 100:
                raise RuntimeError(f"{int(trainer.num_skipped)} steps had no finite gradient: lower --learning-rate")
        if time.monotonic() - checkpointed > CHECKPOINT_EVERY_S:
            trainer.save(out / "state.pt")
            checkpointed = time.monotonic()
    trainer.save(out / "state.pt")
    if trainer.store is not None:
        trainer.store.close()
    report = finish(trainer, out)
    trainer.save(out / "state.pt")  # with the latents' statistics
    print(json.dumps({name: value for name, value in report.items() if name.startswith("psnr")}, indent=1))
    print(f"done in {time.monotonic() - began:.1f} s of {arguments.seconds:.0f} s", flush=True)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Train mini's VAE on the procedural world.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=820.0, help="total, everything included")
    parser.add_argument("--reserve-seconds", type=float, default=0.0, help="of these, kept for the end; 0: a default")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--decoder-only", action="store_true", help="leave the encoder as it is; needs --resume")
    parser.add_argument("--tiny", action="store_true", help="a smoke test")
    arguments = parser.parse_args()
    if arguments.decoder_only and not arguments.resume:
        parser.error("--decoder-only needs --resume: a state or the folder of a saved model")
    run(arguments)


if __name__ == "__main__":
    main()
