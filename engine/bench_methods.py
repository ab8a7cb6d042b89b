"""``longtake bench methods``: the map of ways to keep a history (engine/methods.toml), on the shipped model.

Protocol. Every method renders the same shots: the same prompts, noise, window (the model's own) and weights; keys are
stored before RoPE and grids are asymmetric for all of them, the study's baselines included. Two questions are asked.

film: a film from the prompt alone is rendered, and compared frame by frame with the one that keeps its history in
bfloat16. Small errors grow, as each block builds on what the last ones show.

past: the true film of a held-out world up to a moment is committed as history, and the blocks after it are generated
and compared with bfloat16's, and with the world itself. From one turn of the camera on (8 s) what they show was seen
before, and only the history can tell how it looked: these are return visits. Nothing grows here.

ratio is bfloat16's bytes over the method's, as the caches of the film hold them: the arenas of all forms, with room for
the block being committed, allocated once and so the same at every moment. bits are 16 / ratio; encoded_bits those of
the first form's payloads; minute_ratio is the ratio for a film of a minute, by arithmetic. peak is the allocator's on a
GPU, and on a CPU the sum of weights, text, scratch and cache. PSNR (dB) and SSIM are means over seeds, in a film over
the frames of the second that ends at a moment, behind a past over two blocks.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from longtake.engine import record
from longtake.engine.bench_memory import FIRST_SEED, Case, Models, film_truth, load, make_shot, plain_script
from longtake.engine.config import ShotConfig
from longtake.engine.ledger import reset_peak
from longtake.engine.methods import Method, methods
from longtake.engine.mini.prompts import Script
from longtake.engine.model import TextContext
from longtake.engine.quality import psnr, ssim
from longtake.engine.rollout import Prefix, Rollout
from longtake.engine.shotcache import cache_budgets, kv_shape, open_cache
from longtake.engine.timeline import Timeline
from longtake.engine.timing import await_device
from longtake.engine.vae import StreamingDecoder, StreamingEncoder, from_uint8
from longtake.kernels.clock import survive
from longtake.kernels.errors import ConfigError

PAN_PX = 4
MOMENTS_S = (2, 10, 60)
PAST_BLOCKS = 2
REFERENCE = "BF16"
_NO_PREFIX = Prefix()


@dataclass(frozen=True, slots=True, kw_only=True)
class Film:
    """One rendered film: frames uint8 [N, Y, X, C] on the CPU, seconds of each block, and bytes by name."""

    frames: Tensor
    block_s: list[float]
    memory: dict[str, int]
    peak_bytes: int
    encoded_bits: float


class Stage:
    """The worlds that every method is shown, each made once.

    Args:
        models: mini's parts.
        seeds: how many worlds.
        seconds: of the films.
    """

    def __init__(self, models: Models, seeds: int, seconds: float) -> None:
        self.models, self.seconds = models, seconds
        self.seeds = range(FIRST_SEED, FIRST_SEED + seeds)
        self.moments = [moment for moment in MOMENTS_S if moment <= seconds] or [int(seconds)]
        spec = models.spec
        self._block_frames = spec.block_frames * spec.temporal_stride
        self._truths = {seed: self._truth(seed) for seed in self.seeds}

    def film(self, method: Method, seed: int) -> Film:
        """The film from the prompt alone."""
        spec, device = self.models.spec, self.models.device
        num_blocks = self._film_blocks(self.seconds)
        rollout = self._rollout(method, seed, num_blocks)
        decoder, frames, block_s, peak_bytes = StreamingDecoder(self.models.vae), [], [], 0
        for _ in range(num_blocks):
            reset_peak(device)
            started = time.perf_counter()
            clean = rollout.step()
            await_device(device)
            block_s.append(time.perf_counter() - started)
            peak_bytes = max(peak_bytes, reset_peak(device) or sum(rollout.memory().values()))
            frames.append(decoder.decode(clean).cpu())
        return Film(
            frames=torch.cat(frames)[: round(self.seconds * spec.fps)],
            block_s=block_s,
            memory=rollout.memory(),
            peak_bytes=peak_bytes,
            encoded_bits=rollout.codec.bits_per_element,
        )

    def past(self, method: Method, seed: int) -> dict[int, tuple[Tensor, Tensor]]:
        """At each moment the blocks generated from a true history, and the truth: uint8 clips on the CPU."""
        spec = self.models.spec
        truth, latents = self._truths[seed]
        found = {}
        for moment in self.moments:
            count = self._past_blocks(moment)
            past = latents[:, : count * spec.block_frames]
            prefix = Prefix(latents=past.split(spec.block_frames, dim=1))
            rollout = self._rollout(method, seed, PAST_BLOCKS, prefix)
            clean = [rollout.step() for _ in range(rollout.total_blocks)][count:]
            decoder = StreamingDecoder(self.models.vae)
            decoder.warm_up(past)
            clip = decoder.decode(torch.cat(clean, dim=1)).cpu()
            first = 1 + (count * spec.block_frames - 1) * spec.temporal_stride
            found[moment] = (clip, truth[first : first + len(clip)])
        return found

    def arena_bytes(self, method: Method, seconds: float) -> int:
        """What the cache of a film of that length would take on the device."""
        shot = self._shot(method, self.seeds[0], self._film_blocks(seconds), 0)
        budgets = cache_budgets(shot, Timeline(shot, 0))
        shapes = [kv_shape(shot, form=form) for form in range(len(budgets))]
        return sum(budget.num_frames(shape) * shape.block_bytes for budget, shape in zip(budgets, shapes, strict=True))

    def _film_blocks(self, seconds: float) -> int:
        """Blocks of a film; the first shows fewer frames than the others."""
        return -(-round(seconds * self.models.spec.fps) // self._block_frames) + 1

    def _past_blocks(self, moment: int) -> int:
        return max(1, round(moment * self.models.spec.fps / self._block_frames))

    def _truth(self, seed: int) -> tuple[Tensor, Tensor]:
        """The world's film (uint8, CPU) and its latents."""
        spec, device = self.models.spec, self.models.device
        blocks = self._past_blocks(self.moments[-1]) + PAST_BLOCKS
        num_frames = 1 + (blocks * spec.block_frames - 1) * spec.temporal_stride
        truth = film_truth(seed, self._script(seed), num_frames, device)
        with torch.inference_mode():
            return truth.cpu(), StreamingEncoder(self.models.vae).encode_float(from_uint8(truth))

    def _script(self, seed: int) -> Script:
        return plain_script(seed, PAN_PX)

    def _rollout(self, method: Method, seed: int, num_blocks: int, prefix: Prefix = _NO_PREFIX) -> Rollout:
        num_prefix = len(prefix.latents)
        shot = self._shot(method, seed, num_blocks, num_prefix)
        cache = open_cache(shot, self.models.device, num_prefix)
        return Rollout(shot, self.models.transformer, self._context(self._script(seed)), cache, prefix)

    def _shot(self, method: Method, seed: int, num_blocks: int, num_prefix: int) -> ShotConfig:
        case = Case(name=method.name, history=self.models.spec.history, codec="bf16")
        return method.applied_to(make_shot(self.models, seed, self._script(seed), case, num_blocks, num_prefix))

    def _context(self, script: Script) -> list[TextContext]:
        embeds = self.models.text.encode(script[0].prompt)[None].to(self.models.device)
        return [self.models.transformer.text_context(embeds)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What the other methods are compared with, by seed."""

    films: dict[int, Film]
    pasts: dict[int, dict[int, tuple[Tensor, Tensor]]]


@torch.inference_mode()
def render_reference(stage: Stage) -> Reference:
    """Bfloat16's films and blocks."""
    method = methods()[REFERENCE]
    return Reference(
        films={seed: stage.film(method, seed) for seed in stage.seeds},
        pasts={seed: stage.past(method, seed) for seed in stage.seeds},
    )


@torch.inference_mode()
def measure(stage: Stage, method: Method, reference: Reference) -> dict[str, Any]:
    """One method's row of the map; units are in the names."""
    if method.name == REFERENCE:
        films, pasts = reference.films, reference.pasts
    else:
        films = {seed: stage.film(method, seed) for seed in stage.seeds}
        pasts = {seed: stage.past(method, seed) for seed in stage.seeds}
    one, dense = films[stage.seeds[0]], reference.films[stage.seeds[0]]
    ratio = history_bytes(dense.memory) / history_bytes(one.memory)
    return {
        "group": method.group,
        "settings": method.line,
        "ratio": ratio,
        "bits": 16 / ratio,
        "encoded_bits": one.encoded_bits,
        "minute_ratio": stage.arena_bytes(methods()[REFERENCE], 60) / stage.arena_bytes(method, 60),
        "history_bytes": history_bytes(one.memory),
        "memory_bytes": one.memory,
        "peak_bytes": max(film.peak_bytes for film in films.values()),
        "film_s": fmean(sum(film.block_s) for film in films.values()),
        "block_s": record.summary([s for film in films.values() for s in film.block_s]),
        "film": _against_bf16(stage, films, reference),
        "past": {str(moment): _past(moment, pasts, reference) for moment in stage.moments},
    }


def history_bytes(memory: dict[str, int]) -> int:
    """What the cache holds, all forms and tables."""
    return sum(size for name, size in memory.items() if name.startswith("device"))


def _against_bf16(stage: Stage, films: dict[int, Film], reference: Reference) -> dict[str, Any]:
    fps = stage.models.spec.fps
    by_second: dict[str, list[float]] = {}
    for name, compare in (("psnr_db", psnr), ("ssim", ssim)):
        curves = [compare(films[seed].frames, reference.films[seed].frames) for seed in stage.seeds]
        mean = torch.stack(curves).mean(0)
        by_second[name] = [float(second.mean()) for second in mean.split(fps)]
    at = {
        str(moment): {name: curve[min(moment, len(curve)) - 1] for name, curve in by_second.items()}
        for moment in stage.moments
    }
    return {"at": at, "by_second": by_second}


def _past(moment: int, pasts: dict[int, dict[int, tuple[Tensor, Tensor]]], reference: Reference) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for seed, by_moment in pasts.items():
        clip, truth = by_moment[moment]
        for name, compare in (("psnr_db", psnr), ("ssim", ssim)):
            found.setdefault(f"world_{name}", []).append(float(compare(clip, truth).mean()))
            other = reference.pasts[seed][moment][0]
            found.setdefault(f"bf16_{name}", []).append(float(compare(clip, other).mean()))
    return {name: fmean(values) for name, values in found.items()}


def chosen(names: str | None) -> list[Method]:
    """The methods of a comma-separated list of names and groups; all without one.

    Raises:
        ConfigError: one is unknown.
    """
    known = methods()
    if names is None:
        return list(known.values())
    found: dict[str, Method] = {}
    for name in names.split(","):
        of_name = {key: method for key, method in known.items() if name in (key, method.group)}
        if not of_name:
            raise ConfigError(f"--methods: {name!r} is no method and no group; known: {', '.join(known)}")
        found.update(of_name)
    return list(found.values())


def _done(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Rows of an earlier run of the same protocol.

    Raises:
        ConfigError: the file is of another one.
    """
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text())
        data["config"].pop("failed", None)
        if data["config"] == json.loads(json.dumps(config)):
            return dict(data["results"])
    except (ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"--json {path}: holds figures of other settings; name another file or remove it")


def run_methods(path: Path, wanted: Sequence[Method], config: dict[str, Any], failed: dict[str, str]) -> dict[str, Any]:
    """Measure what the file does not have yet; it is written after each method, with what failed so far.

    Args:
        path: of the JSON.
        wanted: methods.
        config: model, device, seconds, seeds.
        failed: told of methods that fail; the others are measured.
    """
    results = _done(path, config)
    missing = [method for method in wanted if method.name not in results]
    if not missing:
        return results
    models = load(config["model"], torch.device(config["device"]))
    stage = Stage(models, config["seeds"], config["seconds"])
    reference = render_reference(stage)
    for method in missing:
        with survive(failed, method.name):
            row = results[method.name] = measure(stage, method, reference)
            print(_line(method.name, row), flush=True)
        record.write(path, "methods", {**config, "failed": failed}, results)
    return results


def _line(name: str, row: dict[str, Any]) -> str:
    film = ", ".join(f"{at} s {found['psnr_db']:.2f} dB {found['ssim']:.3f}" for at, found in row["film"]["at"].items())
    past = list(row["past"].values())[-1]
    return (
        f"{name}: ratio {row['ratio']:.2f}, {row['film_s']:.1f} s, film {film}; "
        f"past {past['bf16_psnr_db']:.2f} dB of bf16, {past['world_psnr_db']:.2f} dB of the world"
    )


def main(arguments: list[str]) -> int:
    """Command line of ``longtake bench methods``."""
    parser = argparse.ArgumentParser(
        prog="longtake bench methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="run again with the same file to go on")
    parser.add_argument("--methods", help="names and groups (study, codecs, policies), with commas; default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the films")
    parser.add_argument("--seeds", type=int, default=4, help="worlds")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the map; needs matplotlib")
    options = parser.parse_args(arguments)
    if options.seconds < 1 or options.seeds < 1:
        raise ConfigError("--seconds and --seeds begin at 1")
    config = {
        "protocol": __doc__,
        **{key: getattr(options, key) for key in ("model", "device", "seconds", "seeds")},
        "pan_px_a_frame": PAN_PX,
        "first_seed": FIRST_SEED,
        "past_blocks": PAST_BLOCKS,
    }
    failed: dict[str, str] = {}
    results = run_methods(options.json, chosen(options.methods), config, failed)
    if options.plots is not None:
        from longtake.engine.methods_plots import draw

        for path in draw(results, options.plots):
            print(path)
    return 1 if failed else 0
