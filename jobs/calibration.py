"""How long a film takes, from what ``longtake bench rollout`` measured on the hardware that is to render it.

A block's time is taken apart into work that is counted for the benchmark's shot and for the film's alike:

- attention: passes x layers x query tokens x attended tokens x width,
- everything between attentions: passes x tokens x weights of the layers,
- reading history: passes x layers x attended tokens x width,
- decoding: voxels of video x weights of the VAE's decoder.

So a benchmark of one size tells of others, as far as the hardware is used alike: best measured with the model, the size
and the codec that are to be rendered. Decoding is added to it, though it runs beside it; loading models is left out.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtake.engine.config import ModelConfig, ShotConfig
from longtake.kernels.errors import ConfigError

SHIPPED = Path(__file__).parent / "calibrations"
_MOST_SAMPLES = 64
_WAN_DECODER_WEIGHTS = 73_000_000  # of Wan 2.1's VAE, which the benchmark decodes with


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a block takes, in counts."""

    attention: float
    layers: float
    history: float
    voxels: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Seconds for one of each count.

    Args:
        source: where it was measured, for people.
        codec, attention: of the history that was read, and how it was attended.
        attention_s, layers_s, history_s, decode_s: seconds a count of `Work`.
        activation_bytes: what a pass computed in between, a token and unit of width; 0 if not known.
    """

    source: str
    codec: str
    attention: str
    attention_s: float
    layers_s: float
    history_s: float
    decode_s: float
    activation_bytes: float

    def seconds(self, work: Work) -> float:
        """Of one block."""
        return (
            self.attention_s * work.attention
            + self.layers_s * work.layers
            + self.history_s * work.history
            + self.decode_s * work.voxels
        )


def read_calibrations(path: Path) -> list[Calibration]:
    """What a benchmark's file says, one for each of its runs.

    Raises:
        ConfigError: it is no file of ``longtake bench rollout``.
    """
    hint = "longtake bench rollout --json FILE makes one"
    try:
        data = json.loads(path.read_bytes())
        kind = data["benchmark"]
        found = [_calibration(run, _hardware(data["environment"])) for run in data["results"] if kind == "rollout"]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {hint}") from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ConfigError(f"{path}: no file of longtake bench rollout ({error!r}); {hint}") from error
    if kind != "rollout" or not found:
        raise ConfigError(f"{path}: this is bench {kind} with {len(data['results'])} results; {hint}")
    decode_s = next((one.decode_s for one in found if one.decode_s), 0.0)  # only the first run decodes
    return [dataclasses.replace(one, decode_s=one.decode_s or decode_s) for one in found]


def shipped_calibration(device: str) -> Path:
    """What this project measured itself: on an H200, or on two cores of a CPU."""
    return SHIPPED / ("rollout_mini_cpu.json" if device == "cpu" else "rollout_h200.json")


def choose(calibrations: Sequence[Calibration], codec: str, attention: str) -> Calibration:
    """The one that was measured with a way of attending and a codec: the way counts more; the first of equals."""
    return max(calibrations, key=lambda one: (one.attention == attention, one.codec == codec))


def _hardware(environment: dict[str, Any]) -> str:
    devices = [device["name"] for device in environment["devices"]]
    return devices[0] if devices else f"{environment['num_threads']} CPU threads"


def _calibration(run: dict[str, Any], hardware: str) -> Calibration:
    from longtake.engine.bench_rollout import RolloutBench, make_shot

    known = {field.name for field in dataclasses.fields(RolloutBench)}
    config, result = {key: value for key, value in run["config"].items() if key in known}, run["result"]
    shot = make_shot(RolloutBench(**config))
    history = shot.history
    attended = (history.sink_blocks or 0) + (history.recent_blocks or 0)
    vae, stages = result.get("vae"), result["stages_s"]
    work = count(shot, attended, (vae or {}).get("decoder_weights", _WAN_DECODER_WEIGHTS))
    named = result.get("ledger", {}).get("bytes_by_name", {})
    spare = named.get("activations", result["memory_bytes"].get("recorded_passes", 0))
    seconds = result["seconds_a_block"]["median"] / stages["block"]
    if not 0 < seconds < math.inf:
        raise ValueError(f"a block took {seconds} of its stages")
    return Calibration(
        source=f"{hardware}, {config.get('model') or config['geometry']} at {shot.height}x{shot.width}",
        codec=shot.cache.codec,
        attention=shot.attention,
        attention_s=seconds * stages["attention"] / work.attention,
        layers_s=seconds * (stages["linear and rest"] + stages.get("encode", 0.0)) / work.layers,
        history_s=seconds * (stages.get("materialise", 0.0) + stages.get("rotary", 0.0)) / work.history,
        decode_s=vae["seconds_a_block"]["median"] / work.voxels if vae else 0.0,
        activation_bytes=spare / (shot.tokens_per_block * shot.model.transformer.dim),
    )


def count(shot: ShotConfig, attended_blocks: float, decoder_weights: float) -> Work:
    """The work of a shot's block that attends so many blocks of history."""
    model, tokens = shot.model.transformer, shot.tokens_per_block
    passes = len(shot.sampler.timesteps) + 1
    per_layer = passes * model.num_layers
    return Work(
        attention=per_layer * tokens * (attended_blocks + 1) * tokens * model.dim,
        layers=passes * tokens * model.num_layers * _layer_weights(model),
        history=per_layer * (attended_blocks + 1) * tokens * model.dim,
        voxels=shot.model.block_frames * shot.model.temporal_stride * shot.height * shot.width * decoder_weights,
    )


def _layer_weights(model: ModelConfig) -> int:
    """Weights that a token meets in one layer: q, k, v, o, the cross attention's q and o, the feed-forward's two."""
    return 6 * model.dim * model.dim + 2 * model.dim * model.ffn_dim


def shot_seconds(shot: ShotConfig, calibration: Calibration, decoder_weights: float | None = None) -> float:
    """Seconds that a shot takes on one device, loading apart.

    Args:
        decoder_weights: of its VAE's decoder; None: as many as Wan 2.1's.
    """
    weights = _WAN_DECODER_WEIGHTS if decoder_weights is None else decoder_weights
    samples = [calibration.seconds(count(shot, attended, weights)) for attended in _attended(shot)]
    return sum(samples) / len(samples) * shot.num_blocks


def _attended(shot: ShotConfig) -> Iterator[int]:
    """History blocks that are attended, at blocks spread evenly over a shot."""
    from longtake.engine.timeline import Timeline

    timeline = Timeline(shot, shot.after_blocks)
    step = max(1, shot.num_blocks // _MOST_SAMPLES)
    for block in range(0, shot.num_blocks, step):
        yield len(timeline.read_plan(timeline.entry(timeline.index_of(block))).blocks)


def film_seconds(shots: Sequence[tuple[str, str | None, float]], num_gangs: int) -> float:
    """Seconds until all shots are done, given to gangs in the film's order as each is free and what it needs is there.

    Args:
        shots: (name, the shot that it starts from, seconds).
    """
    ends: dict[str, float] = {}
    free = [0.0] * max(1, num_gangs)
    waiting = list(shots)
    while waiting:
        gang = free.index(min(free))
        ready = [shot for shot in waiting if shot[1] is None or shot[1] in ends]
        begins = [max(free[gang], ends.get(shot[1] or "", 0.0)) for shot in ready]
        begin = min(begins)
        shot = ready[begins.index(begin)]
        waiting.remove(shot)
        free[gang] = ends[shot[0]] = begin + shot[2]
    return max(ends.values(), default=0.0)
