"""``longtake bench rollout``: seconds a block of a rollout, and where they go.

Protocol: the geometry of a published model with random weights (``--geometry``: a size, with Self-Forcing's steps and a
window as asked for; or a preset, with its own), or a fetched model (``--model``); a window of history that is full when
timing starts, all steps and the commit pass of each block, VAE decoding apart. Times are medians over blocks after
warm-up; the split by stage comes from a block of its own with events around each stage, so that the total is not slowed
by them. Figures are written case by case; a case that fails is printed, and listed in the file's "failed".
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from longtake.engine import record
from longtake.engine.config import (
    WAN_1_3B,
    WAN_5B,
    WAN_14B,
    BeatConfig,
    CacheConfig,
    HistoryConfig,
    HistoryTable,
    ModelConfig,
    ModelSpec,
    Precision,
    SamplerConfig,
    ShotConfig,
)
from longtake.engine.fp8_linear import quantise_linears
from longtake.engine.ledger import read_ledger, release_workspaces, reset_peak
from longtake.engine.model import CausalWan
from longtake.engine.presets import PRESETS, preset_spec
from longtake.engine.random_model import randomise
from longtake.engine.rollout import Rollout
from longtake.engine.shotcache import open_cache, wants_basis, with_table
from longtake.engine.timing import StageClock, await_device
from longtake.engine.vae import StreamingDecoder, load_vae
from longtake.engine.vae_fast import make_fast
from longtake.engine.weights import load_transformer, read_spec
from longtake.kernels.clock import survive
from longtake.kernels.principal import HistoryBasis
from longtake.kernels.synthetic import random_basis

GEOMETRIES = {
    "1.3b": WAN_1_3B,
    "5b": WAN_5B,
    "14b": WAN_14B,
    "tiny": ModelConfig(num_heads=2, head_dim=64, num_layers=2, ffn_dim=256, text_dim=64),
}


CAUSAL = [name for name, preset in PRESETS.items() if preset.few_step]
MADE_UP_QUARTERS = ((4, 18, 6, 9), (6, 22, 8, 12), (10, 24, 13, 17))  # 2.31, 3 and 4 bits in the mean
_MOST_WARM_UP = 24  # blocks; a full history is never full
# of Wan2.2-TI2V-5B, but for the statistics of its latents
WAN_2_2_VAE: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBench:
    """What to run; height and width of 0 are the model's own."""

    geometry: str = "1.3b"
    model: str | None = None
    codec: str = "bf16"
    attention: str = "dense"
    weights: str = "model"
    height: int = 0
    width: int = 0
    window_blocks: int = 6
    blocks: int = 8
    compile_layers: bool = True
    device: str = "cuda"
    vae: bool = True


def make_spec(bench: RolloutBench) -> ModelSpec:
    """The model of a benchmark."""
    spec = _make_spec(bench)
    weights = dataclasses.replace(spec.weights, precision=Precision(bench.weights))
    return dataclasses.replace(spec, weights=weights)


def _make_spec(bench: RolloutBench) -> ModelSpec:
    if bench.model is not None:
        return read_spec(bench.model)
    if bench.geometry in PRESETS:
        return preset_spec(bench.geometry, Path("random"))
    wide = bench.geometry == "5b"
    return ModelSpec(
        path=Path("random"),
        name=f"random-{bench.geometry}",
        transformer=GEOMETRIES[bench.geometry],
        sampler=SamplerConfig(),
        block_frames=3,
        fps=24 if wide else 16,
        height=704 if wide else 480,
        width=1280 if wide else 832,
        text_len=512,
        history=HistoryConfig(sink_blocks=1, recent_blocks=bench.window_blocks - 1),
        spatial_stride=16 if wide else 8,
    )


def make_shot(bench: RolloutBench) -> ShotConfig:
    """An hour of the benchmark's model."""
    spec = make_spec(bench)
    shot = ShotConfig(
        name="bench",
        model=spec,
        num_frames=spec.fps * 3600,
        fps=spec.fps,
        height=bench.height or spec.height,
        width=bench.width or spec.width,
        seed=0,
        beats=(BeatConfig(at_s=0, prompt=""),),
        sampler=spec.sampler,
        history=spec.history,
        cache=CacheConfig(codec=bench.codec),
        attention=bench.attention,
    )
    return with_made_up_table(shot) if bench.model is None else shot


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> CausalWan:
    """A model with random weights, made on the device."""
    with torch.device("meta"):
        model = CausalWan(config)
    return randomise(model, device, dtype)


def with_made_up_table(shot: ShotConfig) -> ShotConfig:
    """The shot with rates that differ from layer to layer, if a codec wants a table."""
    if not wants_basis(shot):
        return shot
    repeats = -(-shot.model.transformer.num_layers // len(MADE_UP_QUARTERS[0]))
    rates = tuple((quarters * repeats)[: shot.model.transformer.num_layers] for quarters in MADE_UP_QUARTERS)
    return dataclasses.replace(shot, history_basis=HistoryTable(hash="made up", quarters=rates))


def made_up_basis(shot: ShotConfig, num_heads: int, device: torch.device) -> HistoryBasis | None:
    """A table of random weights' heads, as many as are attended here, if a codec of the shot wants one."""
    config = shot.model.transformer
    return random_basis(config.num_layers, num_heads, config.head_dim, device) if wants_basis(shot) else None


def run_rollout(bench: RolloutBench, failed: dict[str, str]) -> dict[str, Any]:
    """Run one configuration.

    Args:
        failed: told if the VAE fails; what the rollout took is returned all the same.

    Returns:
        Seconds a block (median and spread), seconds by stage, bytes by name, the allocator's peak.
    """
    device = torch.device(bench.device)
    cuda = device.type == "cuda"
    shot = make_shot(bench)
    left_bytes = _forget_earlier_cases(device)
    dtype = torch.bfloat16 if cuda else torch.float32
    if bench.model is None:
        model = random_model(shot.model.transformer, device, dtype)
        if shot.model.weights.precision is Precision.FP8:
            quantise_linears(model)
    else:
        shot = with_table(shot)
        model = load_transformer(shot.model, device, dtype)
    if cuda and bench.compile_layers:
        model.compile_layers()
    text = torch.randn(1, shot.model.text_len, model.config.text_dim, device=device)
    with torch.inference_mode():
        contexts = [model.text_context(text)]
    del text
    basis = made_up_basis(shot, shot.model.transformer.num_heads, device) if bench.model is None else None
    with closing(Rollout(shot, model, contexts, open_cache(shot, device), basis=basis)) as rollout:
        result, clean = _run_blocks(rollout, bench.blocks)
    result["left_by_earlier_cases_bytes"] = left_bytes
    if bench.vae:
        with survive(failed, "vae"):
            result["vae"] = _vae(clean, device, shot.model.path if bench.model else None)
    return result


def _forget_earlier_cases(device: torch.device) -> int:
    """Let what earlier cases left go; bytes that are still there."""
    if device.type != "cuda":
        return 0
    torch.compiler.reset()  # compiled layers may hold the model that they were compiled for
    gc.collect()
    release_workspaces(device)
    torch.cuda.empty_cache()
    reset_peak(device)
    return torch.cuda.memory_allocated(device)


def _run_blocks(rollout: Rollout, num_blocks: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Time blocks once the history is full; what they took, and the last one's latents."""
    device, shot = rollout.device, rollout.shot
    started = time.perf_counter()
    for _ in range(min(rollout.timeline.max_attended, _MOST_WARM_UP) + 2):
        rollout.step()
    await_device(device)
    warm_up_s, warm_up_peak = time.perf_counter() - started, reset_peak(device)
    seconds = []
    for _ in range(num_blocks):
        started = time.perf_counter()
        clean = rollout.step()
        await_device(device)
        seconds.append(time.perf_counter() - started)
    ledger = read_ledger(rollout)
    result = {
        "seconds_a_block": record.summary(seconds),
        "warm_up_s": warm_up_s,
        "memory_bytes": rollout.memory(),
        "peak_bytes": max(warm_up_peak, ledger.peak_bytes) if ledger else None,
        "ledger": ledger.to_json() if ledger else {},
        "stages_s": _stages(rollout, device),
        "bits_per_element": rollout.codec.bits_per_element,
        "frames_a_block": shot.model.block_frames * shot.model.temporal_stride,
        "height": shot.height,
        "width": shot.width,
    }
    return result, clean


def _stages(rollout: Rollout, device: torch.device) -> dict[str, float]:
    timer = StageClock(device)
    rollout._timer = timer
    with timer("block"):
        rollout.step()
    await_device(device)
    stages = timer.seconds()
    block = stages.pop("block")
    return {"block": block, **stages, "linear and rest": block - sum(stages.values())}


def _vae(clean: torch.Tensor, device: torch.device, folder: Path | None) -> dict[str, Any]:
    """Decode blocks with the model's own VAE, or the full-size Wan2.1 decoder (Wan2.2's for 48 channels) with random
    weights, bfloat16 on a GPU; as the engine does, and with diffusers' own layers."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if folder is not None:
        vae = load_vae(folder, dtype=dtype, device=device)
    else:
        with torch.device(device):
            vae = AutoencoderKLWan(**(WAN_2_2_VAE if clean.shape[0] == 48 else {}))
        vae = vae.to(dtype).eval().requires_grad_(False)
    plain = _decode(StreamingDecoder(vae), clean)
    if device.type != "cuda":
        return plain
    return {**_decode(StreamingDecoder(make_fast(vae)), clean), "plain": plain}


def _decode(decoder: StreamingDecoder, like: torch.Tensor) -> dict[str, Any]:
    latents, seconds = torch.randn_like(like), []
    for index in range(6):
        started = time.perf_counter()
        frames = decoder.decode(latents)
        await_device(like.device)
        if index >= 2:
            seconds.append(time.perf_counter() - started)
    return {
        "seconds_a_block": record.summary(seconds),
        "frames": len(frames),
        "state_bytes": decoder.state_bytes,
        "decoder_weights": sum(p.numel() for p in decoder.vae.decoder.parameters()),
    }


def main(arguments: list[str]) -> int:
    """Command line of ``longtake bench rollout``."""
    parser = argparse.ArgumentParser(prog="longtake bench rollout", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--geometry", choices=[*sorted(GEOMETRIES), *CAUSAL], default="1.3b", metavar="SIZE|PRESET")
    parser.add_argument("--model", help="a fetched model or a folder, with its weights, instead of random ones")
    parser.add_argument(
        "--cases",
        default="bf16,int4,int4/fp8",
        help="CODEC[/ATTENTION[/WEIGHTS]], one run each; attention: dense, fp8; weights: model, fp8",
    )
    parser.add_argument("--window", type=int, default=6, help="blocks of history; presets and models have their own")
    parser.add_argument("--blocks", type=int, default=8, help="timed blocks")
    parser.add_argument("--size", default="0x0", help="HEIGHTxWIDTH; default: the model's")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args(arguments)
    height, width = (int(side) for side in options.size.split("x"))
    runs: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for index, case in enumerate(options.cases.split(",")):
        codec, attention, weights = [*case.split("/"), "", ""][:3]
        bench = RolloutBench(
            geometry=options.geometry,
            model=options.model,
            codec=codec,
            attention=attention or "dense",
            weights=weights or "model",
            height=height,
            width=width,
            window_blocks=options.window,
            blocks=options.blocks,
            compile_layers=not options.no_compile,
            device=options.device,
            vae=index == 0,
        )
        with survive(failed, case):
            result = run_rollout(bench, failed)
            runs.append({"config": asdict(bench), "result": result})
            seconds = result["seconds_a_block"]["median"]
            print(f"{case}: {seconds:.4f} s a block, stages {result['stages_s']}", flush=True)
            if "vae" in result:
                print(f"vae: {result['vae']['seconds_a_block']['median']:.4f} s a block", flush=True)
        record.write(options.json, "rollout", {"arguments": arguments, "failed": failed}, runs)
    return 1 if failed else 0
