"""``longtake bench memory``: what a rollout remembers, against the procedural world's own truth.

Return visits. In a held-out world a camera pans at a constant speed for one turn and a little more. The true latents
of the whole turn are committed as history; then a few blocks are generated and compared with the world itself: what
they show was last seen one turn ago, and only the history can tell how it looked. A faster camera returns sooner, so
speeds give ages.

Retrieval. True blocks of a pan over several turns, and of one that turns round half way, are committed under a window
of 4 into which others come back. One of those is right if it looks within one block's pan of where the block looks that
it came back for; counted are blocks for which there were as many right ones to be had.

Consistency. The model renders a film of its own over several turns; frames at equal camera angles are compared with
each other: what it invented must still be there a turn later.

Both without actors, in clear weather, in every light; PSNR of 8-bit frames in dB, over worlds of the mean over frames.
Figures are written part by part; a part that fails is printed, and listed in the file's "failed".
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.engine import record
from longtake.engine.config import (
    BeatConfig,
    CacheConfig,
    HistoryConfig,
    HistoryPolicy,
    ModelSpec,
    Positions,
    ShotConfig,
)
from longtake.engine.mini import palette
from longtake.engine.mini.prompts import Beat, Scene, Script, camera_path, describe, stage
from longtake.engine.mini.render import render
from longtake.engine.mini.world import FPS, RING_PX, build_worlds
from longtake.engine.model import CausalWan
from longtake.engine.quality import psnr
from longtake.engine.rollout import Prefix, Rollout, open_cache
from longtake.engine.shotcache import with_table
from longtake.engine.text import TextEncoder
from longtake.engine.vae import StreamingDecoder, StreamingEncoder, from_uint8, load_vae
from longtake.engine.weights import load_transformer, read_spec
from longtake.kernels.clock import survive

FIRST_SEED = 10_000_000
FULL = HistoryConfig(policy=HistoryPolicy.FULL, positions=Positions.ABSOLUTE)


def window(blocks: int, sinks: int = 1) -> HistoryConfig:
    """A window of ``blocks`` blocks of history, ``sinks`` of them the first ones."""
    return HistoryConfig(sink_blocks=sinks, recent_blocks=blocks - sinks)


RETRIEVE = dataclasses.replace(
    window(4, 0), policy=HistoryPolicy.RETRIEVE, retrieved_blocks=4, positions=Positions.BOUNDED, trained_frames=60
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to remember: a history policy and a codec."""

    name: str
    history: HistoryConfig
    codec: str


BROUGHT_BACK = Case(name="window 4 and 4 brought back", history=RETRIEVE, codec="bf16")
CASES = (
    Case(name="full", history=FULL, codec="bf16"),
    Case(name="full, int4", history=FULL, codec="int4"),
    Case(name="window 24", history=window(24), codec="bf16"),
    Case(name="window 4", history=window(4, 0), codec="bf16"),
    Case(name="window 8", history=window(8, 0), codec="bf16"),
    BROUGHT_BACK,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """A model with all its parts, loaded once."""

    spec: ModelSpec
    transformer: CausalWan
    vae: Any
    text: TextEncoder
    device: torch.device


def load(name: str, device: torch.device) -> Models:
    """Load a model trained on the procedural world."""
    spec = read_spec(name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Models(
        spec=spec,
        transformer=load_transformer(spec, device, dtype),
        vae=load_vae(spec.path / "vae", dtype=dtype, device=device),
        text=TextEncoder(spec.path, text_len=spec.text_len),
        device=device,
    )


def plain_script(seed: int, pan_px: int) -> Script:
    """One beat: a light that the seed chooses, clear weather, nobody there, a camera that pans all the time."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    light = palette.TIMES[seed % len(palette.TIMES)]
    scene = Scene(time=light, weather="clear", pan_px=pan_px, actors=(), landmark=None)
    return (Beat(at_s=0.0, scene=scene, prompt=describe(scene, None, rng)),)


def film_truth(seed: int, script: Script, num_frames: int, device: torch.device) -> Tensor:
    """The world itself: uint8 [N, height, width, 3]."""
    start = np.zeros(1)
    worlds = stage(build_worlds([seed]), [script], start).to(device)
    angle = torch.from_numpy(camera_path(script, num_frames, 0.0))[None].to(device)
    time_s = (torch.arange(num_frames, dtype=torch.float64, device=device) / FPS)[None]
    video = render(worlds, angle, time_s)[0]
    return (video * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def make_shot(
    models: Models, seed: int, script: Script, case: Case, num_blocks: int, num_prefix: int = 0
) -> ShotConfig:
    """A shot of ``num_blocks`` blocks under one prompt, behind ``num_prefix`` blocks that are given."""
    spec = models.spec
    latents = num_blocks * spec.block_frames
    shot = ShotConfig(
        name=f"world-{seed}",
        model=spec,
        num_frames=latents * spec.temporal_stride if num_prefix else 1 + (latents - 1) * spec.temporal_stride,
        fps=spec.fps,
        height=spec.height,
        width=spec.width,
        seed=seed,
        beats=(BeatConfig(at_s=0.0, prompt=script[0].prompt),),
        sampler=spec.sampler,
        history=case.history,
        cache=CacheConfig(codec=case.codec),
        after="truth" if num_prefix else None,
        after_blocks=num_prefix,
    )
    return with_table(shot)


@torch.inference_mode()
def return_visit(models: Models, seed: int, pan_px: int, cases: tuple[Case, ...], blocks: int) -> dict[str, float]:
    """PSNR of ``blocks`` generated blocks against the world, one turn after it was seen, for each case.

    The VAE's own loss is in all of them; ``vae`` is what it alone leaves.
    """
    spec, device = models.spec, models.device
    frames_a_block = spec.block_frames * spec.temporal_stride
    turn_frames = RING_PX // pan_px
    history_blocks = -(-(turn_frames + 3) // frames_a_block)
    num_frames = 1 + ((history_blocks + blocks) * spec.block_frames - 1) * spec.temporal_stride
    script = plain_script(seed, pan_px)
    truth = film_truth(seed, script, num_frames, device)
    latents = StreamingEncoder(models.vae).encode_float(from_uint8(truth))
    split = history_blocks * spec.block_frames
    past, target = latents[:, :split], truth[1 + (split - 1) * spec.temporal_stride :]
    prefix = Prefix(latents=past.split(spec.block_frames, dim=1))
    context = [models.transformer.text_context(models.text.encode(script[0].prompt)[None].to(device))]
    results = {}
    for case in cases:
        shot = make_shot(models, seed, script, case, blocks, history_blocks)
        rollout = Rollout(shot, models.transformer, context, open_cache(shot, device, history_blocks), prefix)
        clean = [rollout.step() for _ in range(rollout.total_blocks)][history_blocks:]
        results[case.name] = _decoded_psnr(models, past, torch.cat(clean, dim=1), target)
    results["vae"] = _decoded_psnr(models, past, latents[:, split:], target)
    return results


def _decoded_psnr(models: Models, past: Tensor, latents: Tensor, target: Tensor) -> float:
    decoder = StreamingDecoder(models.vae)
    decoder.warm_up(past)
    return float(psnr(decoder.decode(latents), target).mean())


@torch.inference_mode()
def retrieval(models: Models, seed: int, pan_px: int, blocks: int, turns_round: bool) -> dict[str, float]:
    """How many of the blocks that come back are right, and how many of those that could have come back are."""
    spec, device = models.spec, models.device
    frames_a_block = spec.block_frames * spec.temporal_stride
    script = plain_script(seed, pan_px)
    if turns_round:
        back = dataclasses.replace(script[0].scene, pan_px=-pan_px)
        script = (*script, dataclasses.replace(script[0], at_s=blocks // 2 * frames_a_block / FPS, scene=back))
    num_frames = 1 + (blocks * spec.block_frames - 1) * spec.temporal_stride
    latents = StreamingEncoder(models.vae).encode_float(from_uint8(film_truth(seed, script, num_frames, device)))
    prefix = Prefix(latents=latents.split(spec.block_frames, dim=1))
    context = [models.transformer.text_context(models.text.encode(script[0].prompt)[None].to(device))]
    shot = make_shot(models, seed, script, BROUGHT_BACK, 1, blocks)
    rollout = Rollout(shot, models.transformer, context, open_cache(shot, device, blocks), prefix)
    path = camera_path(script, num_frames, 0.0)[frames_a_block // 2 :: frames_a_block]

    def right(time: int, other: int) -> bool:
        apart = abs(float(path[time] - path[other])) % RING_PX
        return min(apart, RING_PX - apart) <= abs(pan_px) * frames_a_block

    found, chance = [], []
    for time in range(blocks):
        rollout.step()
        could = [right(time, other) for other in rollout.timeline.retrievable(rollout.timeline.entry(time))]
        if sum(could) >= RETRIEVE.retrieved_blocks:
            found.append(float(np.mean([right(time, other) for other in rollout.retrieved])))
            chance.append(float(np.mean(could)))
    return {"right": float(np.mean(found)), "by chance": float(np.mean(chance)), "blocks": len(found)}


@torch.inference_mode()
def own_film(models: Models, seed: int, pan_px: int, case: Case, seconds: float) -> Tensor:
    """A film from the prompt alone: uint8 [N, height, width, 3] on the device."""
    spec = models.spec
    script = plain_script(seed, pan_px)
    num_blocks = round(seconds * spec.fps / (spec.block_frames * spec.temporal_stride))
    shot = make_shot(models, seed, script, case, num_blocks)
    context = [models.transformer.text_context(models.text.encode(script[0].prompt)[None].to(models.device))]
    rollout = Rollout(shot, models.transformer, context, open_cache(shot, models.device))
    decoder = StreamingDecoder(models.vae)
    return torch.cat([decoder.decode(rollout.step()) for _ in range(num_blocks)])


def consistency(film: Tensor, pan_px: int) -> list[float]:
    """PSNR of each later turn of a film against its first, frame by frame at equal angles, from the second turn on."""
    turn = RING_PX // pan_px
    turns = len(film) // turn
    return [float(psnr(film[k * turn : (k + 1) * turn], film[:turn]).mean()) for k in range(1, turns)]


def run_memory(
    name: str,
    device: torch.device,
    *,
    worlds: int,
    blocks: int,
    speeds: tuple[int, ...],
    film_s: float,
    failed: dict[str, str],
    save: Callable[[dict[str, Any]], None] = lambda results: None,
    cases: tuple[Case, ...] = CASES,
) -> dict[str, Any]:
    """Cases at all ages; see the module's docstring.

    Args:
        name: of the model.
        device: where it runs.
        worlds: of each part.
        blocks: generated on a return visit.
        speeds: pixels a frame.
        film_s: seconds of the films; 0: none.
        failed: told of parts that fail.
        save: given the figures so far, part by part.
        cases: of return visits.
    """
    models = load(name, device)
    visits: dict[str, dict[str, dict[str, float]]] = {}
    brought_back: dict[str, list[dict[str, float]]] = {}
    films: dict[str, Any] = {}
    results = {
        "return_visit_psnr_db": visits,
        "brought_back": brought_back,
        "consistency_psnr_db_by_turn": films,
    }
    for speed in speeds:
        age = f"{RING_PX / speed / FPS:.1f} s"
        with survive(failed, f"return visits, {age}"):
            rows = [return_visit(models, FIRST_SEED + w, speed, cases, blocks) for w in range(worlds)]
            visits[age] = {case: record.summary([row[case] for row in rows]) for case in rows[0]}
            print(age, {case: round(found["median"], 2) for case, found in visits[age].items()}, flush=True)
        save(results)
    for path, turns_round in (("pan", False), ("pan that turns round", True)):
        with survive(failed, f"brought back, {path}"):
            brought_back[path] = [retrieval(models, FIRST_SEED + w, 4, 28, turns_round) for w in range(worlds)]
            print("brought back,", path, brought_back[path], flush=True)
        save(results)
    for case in (CASES[0], *CASES[2:]) if film_s else ():
        with survive(failed, f"films, {case.name}"):
            turns = [consistency(own_film(models, FIRST_SEED + w, 4, case, film_s), 4) for w in range(min(worlds, 4))]
            films[case.name] = [record.summary(found) for found in zip(*turns, strict=True)]
            print(case.name, [round(turn["median"], 2) for turn in films[case.name]], flush=True)
        save(results)
    return results


def main(arguments: list[str]) -> int:
    """Command line of ``longtake bench memory``."""
    parser = argparse.ArgumentParser(prog="longtake bench memory", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--worlds", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--speeds", default="4,3,2")
    parser.add_argument("--film-seconds", type=float, default=60.0)
    parser.add_argument("--cases", default=";".join(case.name for case in CASES), help="of return visits, NAME;NAME")
    options = parser.parse_args(arguments)
    cases = tuple(case for case in CASES if case.name in options.cases.split(";"))
    speeds = tuple(int(speed) for speed in options.speeds.split(","))
    failed: dict[str, str] = {}
    config = {
        "model": options.model,
        "device": options.device,
        "worlds": options.worlds,
        "blocks": options.blocks,
        "speeds_px_a_frame": speeds,
        "film_s": options.film_seconds,
        "cases": [dataclasses.asdict(case) for case in cases],
        "failed": failed,
    }
    run_memory(
        options.model,
        torch.device(options.device),
        worlds=options.worlds,
        blocks=options.blocks,
        speeds=speeds,
        film_s=options.film_seconds,
        failed=failed,
        save=lambda results: record.write(options.json, "memory", config, results),
        cases=cases,
    )
    return 1 if failed else 0
