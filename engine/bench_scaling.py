"""``longtake bench scaling``: seconds a block on gangs of GPUs, by axis, and where they go.

Protocol: the geometry of a published model with random weights on every rank of the gang that a launcher started, a
window of history filled with encoded random K/V to the asked length (the block itself included), all steps and the
commit pass of each block, every rank beginning each block together. A block's time is the slowest rank's, between
device synchronisations; medians over blocks after two of warm-up. The split is from two more blocks on rank 0, one with
events around the stages, one under the profiler, whose kernels are grouped by name; neither counts as a timed block.

    longtake bench scaling --json one.json                                                            one GPU
    torchrun --nproc-per-node 4 --no-python longtake bench scaling --json four.json --baseline one.json

A case that the budget of seconds has no room for is skipped and listed; figures are written after every case.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longtake.engine import record
from longtake.engine.bench_rollout import GEOMETRIES, RolloutBench, made_up_basis, make_shot
from longtake.engine.config import ModelConfig, Precision, ShotConfig
from longtake.engine.fp8_linear import quantise_linears
from longtake.engine.gang import Gang, join
from longtake.engine.mesh import ALONE, Mesh, open_mesh, parse_mesh
from longtake.engine.random_model import randomise
from longtake.engine.rollout import Rollout
from longtake.engine.shotcache import open_cache
from longtake.engine.tensor_parallel import ShardedWan
from longtake.engine.timing import StageClock, await_device

_WARM_UP_BLOCKS = 2
_NUM_NAMES, _NAME_LENGTH = 30, 110
# Kernels by what they are for: the first pattern that a name matches.
_KINDS = (
    ("elementwise", r"^triton_"),  # the compiler's; their names list all that was fused, attention and copies as well
    ("communication", r"nccl|ncclDevKernel|symm_mem|two_shot|one_shot"),
    ("attention", r"attend|fmha|flash|sdpa|cudnn.*(attn|attention|fprop)|softmax"),
    ("materialise", r"materialise|unpack|dequant"),
    ("encode", r"encode|quantise|fit"),
    ("matrices", r"gemm|cutlass|nvjet|xmma|cublas|wgmma|matmul"),
    ("copies", r"memcpy|memset|copy|CatArray"),
    ("elementwise", r"elementwise|vectorized|reduce|norm|rotary|gelu|restore|calibrate"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingCase:
    """One configuration; ``kv_tokens`` that a block attends, its own included."""

    geometry: str
    mesh: str
    kv_tokens: int
    codec: str
    attention: str
    weights: str
    height: int
    width: int
    blocks: int
    compile_layers: bool
    device: str

    def shot(self) -> ShotConfig:
        """A shot with that window."""
        bench = RolloutBench(
            geometry=self.geometry,
            codec=self.codec,
            attention=self.attention,
            weights=self.weights,
            height=self.height,
            width=self.width,
        )
        tokens = make_shot(bench).tokens_per_block
        window = max(2, round(self.kv_tokens / tokens) - 1)
        return make_shot(dataclasses.replace(bench, window_blocks=window))


def random_sharded(
    config: ModelConfig, mesh: Mesh, device: torch.device, dtype: torch.dtype, precision: Precision
) -> ShardedWan:
    """This rank's part of a model with random weights, made on the device."""
    with torch.device("meta"):
        model = ShardedWan(config, mesh)
    randomise(model, device, dtype)
    if precision is Precision.FP8:
        quantise_linears(model)
    return model


def fill_history(rollout: Rollout, num_blocks: int) -> None:
    """Commit blocks of random K/V, encoded as any other, without running the model."""
    cache, form, geometry = rollout.cache, rollout.forms[0], rollout.codec.geometry
    shape = (geometry.num_tokens, len(rollout.model.heads), geometry.head_dim)
    torch.manual_seed(1)
    k, v = (torch.randn(shape, device=rollout.device, dtype=rollout.dtype) for _ in range(2))
    for block in range(num_blocks):
        commit = cache.begin_commit(block)
        for layer in range(rollout.model.config.num_layers):
            for part in commit.parts:
                assert part is not None, "one form"
                form.encode(layer, k, v, part.page(layer))
        commit.complete()
        cache.retain(rollout.timeline.needed_later(block + 1))


def run_case(case: ScalingCase, gang: Gang, model: ShardedWan, device: torch.device) -> dict[str, Any]:
    """Time one configuration; every rank calls it.

    Returns:
        Seconds a block (median and spread over blocks, of the slowest rank) and a layer and pass; seconds until the
        last launch of a block; stages; kernels; bytes of this rank by name.
    """
    shot = case.shot()
    text = torch.zeros(1, shot.model.text_len, model.config.text_dim, device=device)
    with torch.inference_mode():
        contexts = [model.text_context(text)]
    cache = open_cache(shot, device, heads=model.heads)
    basis = made_up_basis(shot, len(model.heads), device)
    with closing(cache), closing(Rollout(shot, model, contexts, cache, basis=basis)) as rollout:
        return measure(rollout, case, gang, device)


def measure(rollout: Rollout, case: ScalingCase, gang: Gang, device: torch.device) -> dict[str, Any]:
    """As run_case, of a rollout that has not begun."""
    shot, model = rollout.shot, rollout.model
    assert isinstance(model, ShardedWan)
    with torch.inference_mode():
        fill_history(rollout, shot.history.sink_blocks + shot.history.recent_blocks)
    started = time.perf_counter()
    for _ in range(_WARM_UP_BLOCKS):
        _block(rollout, gang)
    warm_up_s = time.perf_counter() - started
    blocks, issues = zip(*(_block(rollout, gang) for _ in range(case.blocks)), strict=True)
    passes = len(shot.sampler.timesteps) + 1
    return {
        "seconds_a_block": record.summary(blocks),
        "seconds_until_launched": record.summary(issues),
        "ms_a_layer": 1e3 * record.summary(blocks)["median"] / passes / model.config.num_layers,
        "kv_tokens": (shot.history.sink_blocks + shot.history.recent_blocks + 1) * shot.tokens_per_block,
        "heads_a_rank": len(model.heads),
        "warm_up_s": warm_up_s,
        "stages_s": _stages(rollout, model, gang),
        "kernels_s": _kernels(rollout, gang, device),
        "memory_bytes": rollout.memory(),
        "bits_per_element": rollout.codec.bits_per_element,
    }


def _block(rollout: Rollout, gang: Gang) -> tuple[float, float]:
    """Seconds of a block on the slowest rank, and until this rank had launched it."""
    await_device(rollout.device)
    gang.any(False)
    started = time.perf_counter()
    rollout.step()
    issued = time.perf_counter() - started
    await_device(rollout.device)
    seconds = time.perf_counter() - started
    return gang.agree(seconds, max), issued


def _stages(rollout: Rollout, model: ShardedWan, gang: Gang) -> dict[str, float]:
    timer = StageClock(rollout.device)
    before = rollout._timer, model.timer
    rollout._timer, model.timer = timer, timer
    gang.any(False)
    with timer("block"):
        rollout.step()
    rollout._timer, model.timer = before
    await_device(rollout.device)
    stages = timer.seconds()
    block = stages.pop("block")
    return {"block": block, **stages, "linear and rest": block - sum(stages.values())}


def _kernels(rollout: Rollout, gang: Gang, device: torch.device) -> dict[str, Any]:
    """Seconds of kernels by kind in one block, those that overlap counted each, the longest ones by name with their
    number; how long the device did nothing."""
    await_device(device)
    gang.any(False)
    if device.type != "cuda" or not gang.leads:
        rollout.step()
        await_device(device)
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        rollout.step()
        await_device(device)
    kinds: dict[str, Any] = defaultdict(float)
    names: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    spans = []
    for event in profile.events():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
        if not on_device or event.name.startswith("nccl:"):  # an annotation around kernels that are listed too
            continue
        begin, end = event.time_range.start, event.time_range.end
        spans.append((begin, end))
        kinds[kernel_kind(event.name)] += (end - begin) / 1e6
        names[event.name[:_NAME_LENGTH]][0] += 1
        names[event.name[:_NAME_LENGTH]][1] += (end - begin) / 1e6
    busy, until = 0.0, -math.inf
    for begin, end in sorted(spans):
        busy += max(0.0, end - max(begin, until)) / 1e6
        until = max(until, end)
    if spans:
        kinds["idle"] = (until - min(spans)[0]) / 1e6 - busy
        kinds["launches"] = len(spans)
    longest = sorted(names.items(), key=lambda item: -item[1][1])[:_NUM_NAMES]
    kinds["longest"] = [[name, int(count), seconds] for name, (count, seconds) in longest]
    return dict(kinds)


def kernel_kind(name: str) -> str:
    """What a kernel is for, by its name."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def default_meshes(num_ranks: int) -> list[str]:
    """Each axis alone, tensor parallelism with split norms too."""
    return ["tp=1"] if num_ranks == 1 else [f"sp={num_ranks}", f"tp={num_ranks}", f"tp={num_ranks},norms"]


def run_all(
    cases: list[ScalingCase],
    gang: Gang,
    budget_s: float,
    write: Callable[[list[dict[str, Any]], list[dict[str, Any]]], None],
) -> None:
    """Run the cases, a model for each run of equal geometry and mesh.

    Args:
        write: on rank 0, given what was run and what was skipped, after every case.
    """
    started, longest = time.perf_counter(), 0.0
    device = torch.device(gang.device(cases[0].device))
    results: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    model: ShardedWan | None = None
    made: tuple[str, str] | None = None
    for case in cases:
        if gang.any(time.perf_counter() - started + longest > budget_s):
            skipped.append(dataclasses.asdict(case))
            if gang.leads:
                write(results, skipped)
            continue
        began = time.perf_counter()
        config = GEOMETRIES[case.geometry]
        if model is None or made != (case.geometry, case.mesh):
            model = None
            if device.type == "cuda":
                torch.cuda.empty_cache()
            mesh = ALONE if gang.size == 1 else open_mesh(parse_mesh(case.mesh))
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            model, made = (
                random_sharded(config, mesh, device, dtype, Precision(case.weights)),
                (case.geometry, case.mesh),
            )
            if device.type == "cuda" and case.compile_layers:
                model.compile_layers()
        result = run_case(case, gang, model, device)
        longest = max(longest, time.perf_counter() - began)
        results.append({"config": dataclasses.asdict(case), "num_ranks": gang.size, "result": result})
        if gang.leads:
            seconds = result["seconds_a_block"]["median"]
            print(f"{case.geometry} {case.mesh} kv {result['kv_tokens']}: {seconds:.4f} s a block", flush=True)
            write(results, skipped)


def speedups(results: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each result's block time against that of the same case on one GPU."""
    found = []
    for one in results:
        for other in baseline:
            keys = ("geometry", "kv_tokens", "codec", "attention", "weights", "height", "width")
            if all(one["config"][key] == other["config"][key] for key in keys):
                medians = [each["result"]["seconds_a_block"]["median"] for each in (other, one)]
                case = {key: one["config"][key] for key in ("geometry", "mesh", "kv_tokens")}
                found.append({**case, "num_ranks": one["num_ranks"], "times_faster": medians[0] / medians[1]})
    return found


def main(arguments: list[str]) -> None:
    """Command line of ``longtake bench scaling``; every rank runs it, rank 0 writes."""
    parser = argparse.ArgumentParser(prog="longtake bench scaling", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--geometries", default="1.3b,14b")
    parser.add_argument("--kv", default="32760,131040", help="tokens that a block attends, its own included")
    parser.add_argument("--meshes", help="separated by ; like sp=4;tp=4,norms (default: each axis alone)")
    parser.add_argument("--codec", default="int4")
    parser.add_argument("--attention", default="fp8")
    parser.add_argument("--weights", choices=[*Precision], default="model")
    parser.add_argument("--size", default="480x832")
    parser.add_argument("--blocks", type=int, default=4, help="timed blocks")
    parser.add_argument("--budget", type=float, default=120, help="seconds after which no further case begins")
    parser.add_argument("--baseline", type=Path, help="JSON of one GPU, to say how many times faster this is")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args(arguments)
    height, width = (int(side) for side in options.size.split("x"))
    with join() as gang:
        meshes = options.meshes.split(";") if options.meshes else default_meshes(gang.size)
        cases = [
            ScalingCase(
                geometry=geometry,
                mesh=mesh,
                kv_tokens=int(kv_tokens),
                codec=options.codec,
                attention=options.attention,
                weights=options.weights,
                height=height,
                width=width,
                blocks=options.blocks,
                compile_layers=not options.no_compile,
                device=options.device,
            )
            for geometry in options.geometries.split(",")
            for mesh in meshes
            for kv_tokens in options.kv.split(",")
        ]
        baseline = json.loads(options.baseline.read_text())["results"]["cases"] if options.baseline else []

        def write(results: list[dict[str, Any]], skipped: list[dict[str, Any]]) -> None:
            found = {"cases": results, "skipped": skipped, "speedups": speedups(results, baseline)}
            record.write(options.json, "scaling", {"arguments": arguments}, found)

        run_all(cases, gang, options.budget, write)
