"""Train mini's AutoencoderKLWan on the world, rendered on the fly.

    python -m longtake.engine.mini.train_vae --out DIR --seconds 500 [--resume DIR/state.pt]

Everything is included in `--seconds`: the last part goes to the latents' statistics, the evaluation of the weights as
saved, and DIR/vae/, DIR/vae.json, DIR/vae.png. DIR/state.pt is written every minute. `--device cpu --seconds 60 --tiny`
is a smoke test.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import Tensor

from .autoencoder import CONFIG, CONVOLUTIONS, ClipForward, new_autoencoder
from .draws import choice, uniform
from .panorama import Panorama, paint
from .render import render
from .world import FPS, HEIGHT, NEVER_S, NUM_EVENTS, RING_PX, WIDTH, WorldSpec, build_worlds

HELD_OUT_SEED = 10_000_000
MAX_SPEED = 4
CHECKPOINT_EVERY_S = 60.0
KL_WEIGHT = 3e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much of everything; `--tiny` shrinks it for a smoke test."""

    pool_worlds: int = 384
    pool_steps: int = 48  # steps a pool serves
    shapes: tuple[tuple[int, int], ...] = ((32, 17), (16, 33), (32, 17), (8, 65))  # clips, frames: taken in turn
    eval_worlds: int = 72
    eval_frames: int = 33
    long_worlds: int = 8
    long_frames: int = 161
    stats_worlds: int = 288


TINY = Plan(
    pool_worlds=4,
    pool_steps=20,
    shapes=((1, 5), (1, 9)),
    eval_worlds=9,
    eval_frames=5,
    long_worlds=1,
    long_frames=17,
    stats_worlds=4,
)


def random_worlds(seeds: list[int], device: torch.device) -> WorldSpec:
    """Make worlds of which every third changes light or weather at 3 s."""
    worlds = build_worlds(seeds)
    u = uniform(seeds, "change", 3)
    times, weathers = worlds.event_time_WE.numpy().copy(), worlds.event_weather_WE.numpy().copy()
    moments = np.full((len(seeds), NUM_EVENTS), NEVER_S)
    moments[:, 0] = 0.0
    moments[:, 1] = np.where(u[:, 0] < 1 / 3, 3.0, NEVER_S)
    times[:, 1:], weathers[:, 1:] = choice(u[:, 1:2], 4), choice(u[:, 2:3], 4)
    return worlds.set_events(moments, times, weathers).to(device)


class Pool:
    """Painted worlds on the device, from which clips are cut."""

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        self.worlds = random_worlds(seeds, device)
        parts = [
            paint(self.worlds.take(torch.arange(n, min(n + 64, len(seeds)), device=device)))
            for n in range(0, len(seeds), 64)
        ]
        self.painted = Panorama(
            far_WNCY=torch.cat([p.far_WNCY for p in parts]),
            mid_WNCY=torch.cat([p.mid_WNCY for p in parts]),
            near_WNCY=torch.cat([p.near_WNCY for p in parts]),
        )

    def cut(self, index: Tensor, angle_px: Tensor, time_s: Tensor) -> Tensor:
        """Render clips of the worlds at `index` [R]; angle_px and time_s [R, T]; returns [R, 3, T, Y, X] in [-1, 1]."""
        index = index.to(self.worlds.seeds_W.device)
        worlds = self.worlds.take(index)
        frames = render(worlds, angle_px, time_s, painted=self.painted, painted_row_W=index)
        return frames.transpose(1, 2).contiguous() * 2 - 1


def random_cameras(count: int, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw camera paths of whole pixels a frame, half of them changing speed once; angle [count, frames], time in s."""

    def speeds() -> Tensor:
        return torch.randint(-MAX_SPEED, MAX_SPEED + 1, (count, 1), generator=generator)

    first, second = speeds(), speeds()
    change = torch.randint(0, 2 * frames, (count, 1), generator=generator)
    step = torch.where(torch.arange(frames) < change, first, second)
    angle = torch.randint(0, RING_PX, (count, 1), generator=generator) + torch.cumsum(step, 1)
    start = torch.randint(0, 6 * FPS, (count, 1), generator=generator)
    return angle.double(), (start + torch.arange(frames)).double() / FPS


def losses(target: Tensor, output: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and the mean square error of video [B, 3, T, Y, X] in [-1, 1], given the posterior."""
    output = output.float()
    difference = output - target
    square = difference.square().mean()
    loss = (difference.square() + 1e-6).sqrt().mean() + 10 * square
    for dim in (3, 4):  # edges
        loss = loss + 0.5 * difference.diff(dim=dim).abs().mean()
    loss = loss + 0.25 * difference.diff(dim=2).abs().mean()
    mean, log_variance = moments.float().chunk(2, 1)
    log_variance = log_variance.clamp(-30, 20)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return loss + KL_WEIGHT * kl, square


def sample(moments: Tensor) -> Tensor:
    """Draw latents from the posterior."""
    mean, log_variance = moments.float().chunk(2, 1)
    return mean + torch.randn_like(mean) * (0.5 * log_variance.clamp(-30, 20)).exp()


class Trainer:
    """The state of a run: weights, their moving average, optimiser, step."""

    def __init__(self, plan: Plan, device: torch.device, learning_rate: float) -> None:
        self.plan, self.device, self.learning_rate = plan, device, learning_rate
        torch.manual_seed(0)
        self.vae = new_autoencoder().to(device).train()
        self.average = {name: p.detach().clone() for name, p in self.vae.named_parameters()}
        self.optimiser = torch.optim.AdamW(
            self.vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=device.type == "cuda"
        )
        self.step = 0
        self.trained_s = 0.0
        self.generator = torch.Generator().manual_seed(1)
        self.pool: Pool | None = None
        self.recent: deque[Tensor] = deque(maxlen=12)
        self.num_skipped = torch.zeros((), device=device)
        self.forward = ClipForward(self.vae)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def choose_convolution(self) -> None:
        """Time each way to compute the convolutions on a real step and keep the fastest (CUDA)."""
        if self.device.type != "cuda":
            return
        torch.backends.cudnn.benchmark = True
        clips, frames = self.plan.shapes[0]
        video = torch.rand(clips, 3, frames, HEIGHT, WIDTH, device=self.device) * 2 - 1
        best = math.inf
        for convolution, fuse in [(name, False) for name in CONVOLUTIONS] + [("", True)]:
            name = convolution or self.forward.convolution  # the compiler is tried on the best alone
            try:
                forward = ClipForward(self.vae, convolution=name, fuse=fuse)
                seconds = self._time(forward, video)
            except Exception as error:  # a compiler that is not there must not end the run
                print(f"{name}, fused {fuse}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                continue
            print(f"{name}, fused {fuse}: {seconds * 1e3:.1f} ms a step", flush=True)
            if seconds < best:
                best, self.forward = seconds, forward
        self.vae.zero_grad(set_to_none=True)
        print(f"chosen: {self.forward.convolution}", flush=True)

    def _time(self, forward: ClipForward, video: Tensor) -> float:
        start = 0.0
        for trial in range(6):
            if trial == 3:
                torch.cuda.synchronize()
                start = time.perf_counter()
            self._loss(forward, video)[0].backward()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / 3

    def _loss(self, forward: ClipForward, video: Tensor) -> tuple[Tensor, Tensor]:
        with self.autocast():
            moments = forward.encode(video)
            output = forward.decode(sample(moments))
        return losses(video, output, moments)

    def batch(self) -> Tensor:
        """Render the next step's clips."""
        plan = self.plan
        if self.pool is None or self.step % plan.pool_steps == 0:
            first = 1 + (self.step // plan.pool_steps) * plan.pool_worlds
            self.pool = None
            self.pool = Pool(list(range(first, first + plan.pool_worlds)), self.device)
        if self.step % 3 and self.recent:  # rendering takes as long as a step: a clip serves about three times
            chosen = int(torch.randint(0, len(self.recent), (1,), generator=self.generator))
            return self.recent[chosen].flip(-1)
        clips, frames = plan.shapes[self.step // 3 % len(plan.shapes)]
        angle, seconds = random_cameras(clips, frames, self.generator)
        index = torch.randint(0, plan.pool_worlds, (clips,), generator=self.generator)
        video = self.pool.cut(index, angle, seconds)
        self.recent.append(video)
        return video

    def train_step(self, progress: float) -> tuple[Tensor, Tensor]:
        """Make one step; `progress` in [0, 1] of the run sets the learning rate."""
        video = self.batch()
        warm = min(1.0, (self.step + 1) / 150)
        rate = self.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss, square = self._loss(self.forward, video)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        finite = norm.isfinite()  # a step whose gradient is not is left out, without waiting for the device
        self.num_skipped += ~finite
        for parameter in self.vae.parameters():
            if parameter.grad is not None:
                parameter.grad = torch.where(finite, parameter.grad, 0.0)
        self.optimiser.step()
        self.step += 1
        keep = min(0.999, self.step / (10.0 + self.step))
        with torch.no_grad():
            parameters = dict(self.vae.named_parameters())
            torch._foreach_lerp_(list(self.average.values()), [parameters[name] for name in self.average], 1 - keep)
        return loss.detach(), square.detach()

    def save(self, path: Path) -> None:
        """Write the state, at most 16 MiB: Adam's first moments go as bfloat16."""
        optimiser = self.optimiser.state_dict()  # its entries are the optimiser's own: not to be changed
        optimiser["state"] = {
            index: {**entry, "exp_avg": entry["exp_avg"].to(torch.bfloat16)}
            for index, entry in optimiser["state"].items()
        }
        state = {
            "weights": {name: p.detach().clone() for name, p in self.vae.named_parameters()},
            "average": self.average,
            "optimiser": optimiser,
            "step": self.step,
            "trained_s": self.trained_s,
            "generator": self.generator.get_state(),
        }
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Read a state that `save` wrote."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        with torch.no_grad():
            for name, parameter in self.vae.named_parameters():
                parameter.copy_(state["weights"][name])
        self.average = state["average"]
        for entry in state["optimiser"]["state"].values():
            entry["exp_avg"] = entry["exp_avg"].float()
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.trained_s = state["step"], state["trained_s"]
        self.generator.set_state(state["generator"].cpu())


@torch.no_grad()
def finish(trainer: Trainer, out: Path) -> dict[str, Any]:
    """Measure the latents, write the model with rounded weights, evaluate it as saved on held-out worlds."""
    plan, device = trainer.plan, trainer.device
    torch.backends.cudnn.benchmark = False  # few shapes come twice here
    torch.backends.cudnn.allow_tf32 = False
    rounded = {name: p.to(torch.float16) for name, p in trainer.average.items()}
    vae = new_autoencoder().to(device).eval()
    vae.load_state_dict({name: p.float() for name, p in rounded.items()})
    forward = ClipForward(vae, convolution=trainer.forward.convolution)
    mean, std = latent_statistics(forward, plan, device)
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
        "latents_mean": mean,
        "latents_std": std,
    }
    loaded: AutoencoderKLWan = AutoencoderKLWan.from_pretrained(str(out / "vae"), torch_dtype=torch.float32)
    report |= evaluate(loaded.to(device).eval(), plan, device, forward.convolution, out / "vae.png")
    (out / "vae.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def held_out(count: int, frames: int, device: torch.device, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Render held-out worlds, the camera's speed going round -4..4; returns clips [W, 3, T, Y, X] and speeds [W]."""
    pool = Pool([HELD_OUT_SEED + offset + n for n in range(count)], device)
    speed = torch.arange(count) % (2 * MAX_SPEED + 1) - MAX_SPEED
    angle = (torch.arange(count) * 97 % RING_PX)[:, None] + speed[:, None] * torch.arange(frames)
    seconds = torch.full((count, 1), 2.5) + torch.arange(frames) / FPS
    return pool.cut(torch.arange(count), angle.double(), seconds.double()), speed


def latent_statistics(forward: ClipForward, plan: Plan, device: torch.device) -> tuple[list[float], list[float]]:
    """Measure each latent channel's mean and standard deviation over training worlds."""
    total, squares, count = torch.zeros(16, device=device), torch.zeros(16, device=device), 0
    generator = torch.Generator().manual_seed(2)
    for first in range(0, plan.stats_worlds, 32):
        number = min(32, plan.stats_worlds - first)
        angle, seconds = random_cameras(number, plan.eval_frames, generator)
        pool = Pool(list(range(5_000_000 + first, 5_000_000 + first + number)), device)
        latents = forward.encode(pool.cut(torch.arange(number), angle, seconds))[:, :16].double()
        total, squares = total + latents.sum((0, 2, 3, 4)), squares + latents.square().sum((0, 2, 3, 4))
        count += latents.numel() // 16
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(1e-8).sqrt()
    return [round(v, 5) for v in mean.tolist()], [round(v, 5) for v in std.tolist()]


def psnr(mean_square: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean square error on the scale [0, 1]."""
    return -10 * torch.log10(mean_square.clamp_min(1e-12))


@torch.no_grad()
def evaluate(
    vae: AutoencoderKLWan, plan: Plan, device: torch.device, convolution: str, picture: Path
) -> dict[str, Any]:
    """Measure reconstruction on held-out worlds by motion, light and weather, and late in a long clip; draw a sheet."""
    forward = ClipForward(vae, convolution=convolution)

    def reconstruct(video: Tensor) -> Tensor:
        clips = [forward.decode(forward.encode(c)[:, :16]) for c in video.split(8)]
        # As a viewer gets it: eight bits a channel.
        return ((torch.cat(clips).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1

    video, speed = held_out(plan.eval_worlds, plan.eval_frames, device)
    output = reconstruct(video)
    error = ((output - video) / 2).square().mean((1, 3, 4))  # [W, T]
    report: dict[str, Any] = {
        "psnr": float(psnr(error.mean())),
        "psnr_mean_of_clips": float(psnr(error.mean(1)).mean()),
        "psnr_worst_clip": float(psnr(error.mean(1)).min()),
        "psnr_first_frame": float(psnr(error[:, 0].mean())),
        "psnr_by_speed": {
            str(s): float(psnr(error[(speed.abs() == s).to(device)].mean())) for s in sorted(set(speed.abs().tolist()))
        },
    }
    for name in ("weather", "time"):
        kinds = getattr(
            Pool([HELD_OUT_SEED + n for n in range(plan.eval_worlds)], torch.device("cpu")).worlds, f"event_{name}_WE"
        )
        report[f"psnr_by_{name}"] = {
            str(k): float(psnr(error[(kinds[:, 0] == k).to(device)].mean())) for k in sorted(set(kinds[:, 0].tolist()))
        }
    own = vae.decode(vae.encode(video[:2]).latent_dist.mode()).sample
    report["max_difference_from_chunked"] = float(
        (own - forward.decode(forward.encode(video[:2])[:, :16]).clamp(-1, 1)).abs().max()
    )
    contact_sheet(video, output, picture)
    long, _ = held_out(plan.long_worlds, plan.long_frames, device, offset=100_000)
    error = ((reconstruct(long) - long) / 2).square().mean((1, 3, 4))
    half = plan.long_frames // 2
    report["psnr_long_clip"] = {
        "first half": float(psnr(error[:, :half].mean())),
        "second half": float(psnr(error[:, half:].mean())),
    }
    return report


def contact_sheet(video: Tensor, output: Tensor, path: Path, columns: int = 6, rows: int = 3) -> None:
    """Draw the last frames of clips: each row of truth over its row of reconstructions."""
    frames = torch.stack([video[:, :, -1], output[:, :, -1]], 1)[: columns * rows].cpu()  # [W, 2, 3, Y, X]
    sheet = torch.ones(2 * rows * (HEIGHT + 4), columns * (WIDTH + 4), 3)
    for n, pair in enumerate(frames):
        row, column = divmod(n, columns)
        for which in range(2):
            top, left = (2 * row + which) * (HEIGHT + 4) + 2, column * (WIDTH + 4) + 2
            sheet[top : top + HEIGHT, left : left + WIDTH] = (pair[which].permute(1, 2, 0) + 1) / 2
    Image.fromarray((sheet.clamp(0, 1) * 255).round().byte().numpy()).save(path, optimize=True)


def run(arguments: argparse.Namespace) -> None:
    """Train for the given time, checkpoint, finish."""
    began = time.monotonic()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device)
    trainer = Trainer(TINY if arguments.tiny else Plan(), device, arguments.learning_rate)
    if arguments.resume:
        trainer.load(arguments.resume)
    trainer.choose_convolution()
    reserve_s = arguments.reserve_seconds or (50.0 if device.type == "cuda" else 0.4 * arguments.seconds)
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
    trainer.pool = None
    report = finish(trainer, out)
    print(json.dumps({name: value for name, value in report.items() if name.startswith("psnr")}, indent=1))
    print(f"done in {time.monotonic() - began:.1f} s of {arguments.seconds:.0f} s", flush=True)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Train mini's VAE on the procedural world.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=500.0, help="total, everything included")
    parser.add_argument("--reserve-seconds", type=float, default=0.0, help="of these, kept for the end; 0: a default")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--tiny", action="store_true", help="a smoke test")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
