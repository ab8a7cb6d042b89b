"""``longtake bench rollout``: seconds a block of a rollout with random weights, and where they go.

Protocol: the geometry of a published model with random weights, a window of history that is full when timing starts,
all steps and the commit pass of each block, VAE decoding apart. Times are medians over blocks after warm-up; the split
by stage comes from a block of its own with events around each stage, so that the total is not slowed by them.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from longtake.engine import record
from longtake.engine.config import (
    WAN_1_3B,
    WAN_14B,
    BeatConfig,
    CacheConfig,
    HistoryConfig,
    ModelConfig,
    ModelSpec,
    SamplerConfig,
    ShotConfig,
)
from longtake.engine.model import CausalWan
from longtake.engine.rollout import Rollout, open_cache
from longtake.engine.timing import EventTimer
from longtake.engine.vae import StreamingDecoder

GEOMETRIES = {
    "1.3b": WAN_1_3B,
    "14b": WAN_14B,
    "tiny": ModelConfig(num_heads=2, head_dim=64, num_layers=2, ffn_dim=256, text_dim=64),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBench:
    """What to run."""

    geometry: str = "1.3b"
    codec: str = "bf16"
    attention: str = "dense"
    height: int = 480
    width: int = 832
    window_blocks: int = 6
    blocks: int = 8
    compile_layers: bool = True
    device: str = "cuda"
    vae: bool = True


def make_shot(bench: RolloutBench) -> ShotConfig:
    """A shot of the benchmark's geometry: window of ``window_blocks`` blocks of history, no sink apart."""
    sampler = SamplerConfig()
    history = HistoryConfig(sink_blocks=1, recent_blocks=bench.window_blocks - 1)
    spec = ModelSpec(
        path=Path("random"),
        name=f"random-{bench.geometry}",
        transformer=GEOMETRIES[bench.geometry],
        sampler=sampler,
        block_frames=3,
        fps=16,
        height=bench.height,
        width=bench.width,
        text_len=512,
        history=history,
    )
    return ShotConfig(
        name="bench",
        model=spec,
        num_frames=16 * 3600,
        fps=16,
        height=bench.height,
        width=bench.width,
        seed=0,
        beats=(BeatConfig(at_s=0, prompt=""),),
        sampler=sampler,
        history=history,
        cache=CacheConfig(codec=bench.codec),
        attention=bench.attention,
    )


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> CausalWan:
    """A model with random weights of about the trained ones' size, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = CausalWan(config)
    return model.cast(dtype).eval().requires_grad_(False)


def run_rollout(bench: RolloutBench) -> dict[str, Any]:
    """Run one configuration.

    Returns:
        Seconds a block (median and spread), seconds by stage, bytes by name, the allocator's peak.
    """
    device = torch.device(bench.device)
    cuda = device.type == "cuda"
    shot = make_shot(bench)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    model = random_model(shot.model.transformer, device, torch.bfloat16 if cuda else torch.float32)
    if cuda and bench.compile_layers:
        model.compile_layers()
    text = torch.randn(1, shot.model.text_len, model.config.text_dim, device=device)
    with torch.inference_mode():
        contexts = [model.text_context(text)]
    rollout = Rollout(shot, model, contexts, open_cache(shot, device))
    started = time.perf_counter()
    for _ in range(bench.window_blocks + 2):
        rollout.step()
    _wait(device)
    warm_up_s = time.perf_counter() - started
    seconds = []
    for _ in range(bench.blocks):
        started = time.perf_counter()
        clean = rollout.step()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    result = {
        "seconds_a_block": record.summary(seconds),
        "warm_up_s": warm_up_s,
        "stages_s": _stages(rollout, device),
        "memory_bytes": rollout.memory(),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "bits_per_element": rollout.codec.bits_per_element,
    }
    if bench.vae:
        result["vae"] = _vae(clean, device)
    return result


def _stages(rollout: Rollout, device: torch.device) -> dict[str, float]:
    timer = EventTimer(device)
    rollout._timer = timer
    with timer("block"):
        rollout.step()
    stages = timer.totals()
    block = stages.pop("block")
    return {"block": block, **stages, "linear and rest": block - sum(stages.values())}


def _vae(clean: torch.Tensor, device: torch.device) -> dict[str, Any]:
    """Decode blocks with the full-size Wan2.1 decoder, random weights, bfloat16 on a GPU."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        vae = AutoencoderKLWan().to(dtype).eval().requires_grad_(False)
    decoder = StreamingDecoder(vae)
    latents = torch.randn_like(clean)
    seconds = []
    for index in range(5):
        started = time.perf_counter()
        frames = decoder.decode(latents)
        _wait(device)
        if index >= 2:
            seconds.append(time.perf_counter() - started)
    return {"seconds_a_block": record.summary(seconds), "frames": len(frames), "state_bytes": decoder.state_bytes}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: list[str]) -> None:
    """Command line of ``longtake bench rollout``."""
    parser = argparse.ArgumentParser(prog="longtake bench rollout", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="1.3b")
    parser.add_argument(
        "--cases", default="bf16,int4,int4/fp8", help="CODEC or CODEC/ATTENTION (dense, fp8, fp8-bf16v), one run each"
    )
    parser.add_argument("--window", type=int, default=6, help="blocks of history")
    parser.add_argument("--blocks", type=int, default=8, help="timed blocks")
    parser.add_argument("--size", default="480x832")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args(arguments)
    height, width = (int(side) for side in options.size.split("x"))
    runs = []
    for index, case in enumerate(options.cases.split(",")):
        codec, _, attention = case.partition("/")
        bench = RolloutBench(
            geometry=options.geometry,
            codec=codec,
            attention=attention or "dense",
            height=height,
            width=width,
            window_blocks=options.window,
            blocks=options.blocks,
            compile_layers=not options.no_compile,
            device=options.device,
            vae=index == 0,
        )
        result = run_rollout(bench)
        runs.append({"config": asdict(bench), "result": result})
        print(f"{case}: {result['seconds_a_block']['median']:.4f} s a block, stages {result['stages_s']}", flush=True)
    record.write(options.json, "rollout", {"arguments": arguments}, runs)
