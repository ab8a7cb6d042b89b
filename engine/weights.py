"""Model folders: where they are, what their longtake.json says, and how their weights become a model.

A folder has the hub's layout: model_index.json, transformer/, vae/, text_encoder/, tokenizer/, scheduler/, and
longtake.json beside them with what the hub's files do not say (block size, steps, frame rate, size, history).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from longtake.engine.config import (
    HistoryConfig,
    HistoryPolicy,
    Loop,
    ModelConfig,
    ModelSpec,
    Positions,
    Precision,
    SamplerConfig,
    Switch,
    WeightsConfig,
    WriteBack,
)
from longtake.engine.fp8_linear import quantise_linears
from longtake.engine.mesh import ALONE, Mesh
from longtake.engine.model import CausalWan
from longtake.engine.presets import PRESETS
from longtake.engine.store import model_folder
from longtake.engine.tensor_files import check_tensors, merge_lora, read_file, read_tensors, rename
from longtake.engine.tensor_parallel import ShardedWan
from longtake.kernels.errors import ConfigError

_KEYS = (
    *("name", "block_frames", "fps", "height", "width", "text_len", "spatial_stride", "temporal_stride"),
    *("timesteps", "first_timesteps", "shift", "context_timestep", "loop", "write_back"),
    *("history", "switch", "weights"),
)

SHIPPED = {"mini": Path(__file__).parent / "mini" / "model"}


def find_model(name: str) -> Path:
    """Folder of a model given by a name (shipped or fetched) or a path.

    Raises:
        ConfigError: there is no such model, or it is not fetched yet; names the nearest known one.
    """
    if name in SHIPPED:
        return SHIPPED[name]
    folder = Path(name).expanduser()
    if (folder / "transformer" / "config.json").is_file():
        return folder
    if "/" not in name and name not in (".", ".."):
        fetched = model_folder(name)
        if (fetched / "longtake.json").is_file():
            return fetched
        if name in PRESETS:
            raise ConfigError(f"model {name!r} is not here yet: run  longtake pull {name}")
    known = [*SHIPPED, *PRESETS]
    near = difflib.get_close_matches(name, known, n=1)
    all_known = f"give a folder in the hub's layout or one of: {', '.join(known)}"
    hint = f"did you mean {near[0]!r}?" if near else all_known
    raise ConfigError(f"unknown model {name!r}: {hint}")


def read_spec(name: str) -> ModelSpec:
    """Everything a rollout must know of a model before its weights are read.

    Raises:
        ConfigError: a file is missing or says something that cannot be.
    """
    folder = find_model(name)
    settings = _read_json(folder / "longtake.json")
    try:
        _check_keys(settings, _KEYS)
        for key, kind in (("history", HistoryConfig), ("weights", WeightsConfig)):
            _check_keys(settings.get(key, {}), (field.name for field in fields(kind)))
        return ModelSpec(
            path=folder,
            name=settings["name"],
            transformer=ModelConfig.from_hub(
                _read_json(folder / "transformer" / "config.json"), str(folder / "transformer" / "config.json")
            ),
            sampler=_sampler(settings),
            block_frames=settings["block_frames"],
            fps=settings["fps"],
            height=settings["height"],
            width=settings["width"],
            text_len=settings["text_len"],
            history=_history(settings.get("history", {})),
            spatial_stride=settings.get("spatial_stride", 8),
            temporal_stride=settings.get("temporal_stride", 4),
            weights=_weights(settings.get("weights", {})),
            switch=Switch(settings.get("switch", "keep")),
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{folder / 'longtake.json'}: {_reason(error)}; see docs/models.md for the keys it must have"
        ) from error


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _check_keys(settings: dict[str, Any], known: Iterable[str]) -> None:
    """Refuse a key that would be ignored."""
    known = sorted(known)
    for key in settings:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"no such key: {key}; did you mean {nearest}?")


def _sampler(settings: dict[str, Any]) -> SamplerConfig:
    first = settings.get("first_timesteps")
    return SamplerConfig(
        timesteps=tuple(settings["timesteps"]),
        shift=settings["shift"],
        context_timestep=settings.get("context_timestep", 0.0),
        first_timesteps=None if first is None else tuple(first),
        loop=Loop(settings.get("loop", "blocks")),
        write_back=WriteBack(settings.get("write_back", "clean")),
    )


def _history(history: dict[str, Any]) -> HistoryConfig:
    return HistoryConfig(
        policy=HistoryPolicy(history.get("policy", "window")),
        sink_blocks=history.get("sink_blocks", 1),
        recent_blocks=history.get("recent_blocks", 6),
        retrieved_blocks=history.get("retrieved_blocks", 0),
        positions=Positions(history.get("positions", "relative")),
        trained_frames=history.get("trained_frames", 21),
        jitter=history.get("jitter", 0.0),
        head_jitter=history.get("head_jitter", 0.0),
    )


def _weights(weights: dict[str, Any]) -> WeightsConfig:
    files, precision = tuple(weights.get("files", ("*.safetensors",))), Precision(weights.get("precision", "model"))
    return WeightsConfig(**{**weights, "files": files, "precision": precision})


def load_transformer(spec: ModelSpec, device: torch.device, dtype: torch.dtype, mesh: Mesh = ALONE) -> CausalWan:
    """The transformer with its weights, in evaluation mode, without a second copy of them in memory.

    Args:
        spec: the model.
        device: where the weights go.
        dtype: of the weights, but for the few that the family keeps in float32.
        mesh: of the gang that runs it together: of what is split, only this rank's slices are read.

    Raises:
        ConfigError: tensors are missing, left over or of the wrong shape; lists them all.
        StorageError: a weights file is not there.
    """
    folder, weights = spec.path / "transformer", spec.weights
    with torch.device("meta"):
        model = CausalWan(spec.transformer)
    found = rename(read_tensors(folder, weights.files, weights.key), str(folder))
    check_tensors(found, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, str(folder))
    if weights.lora is not None:
        lora = read_file(folder / weights.lora, weights.lora_key)
        found = merge_lora(found, lora, weights.lora_alpha, str(folder / weights.lora))
    if mesh.shape.size > 1:
        with torch.device("meta"):
            model = ShardedWan(spec.transformer, mesh)
        found = {name: model.own_part(name, tensor) for name, tensor in found.items()}
    model.load_state_dict(found, assign=True)
    model = model.cast(dtype)
    if weights.precision is Precision.FP8:
        quantise_linears(model)
    return model.to(device).eval().requires_grad_(False)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing: {path.parent} is not a model folder that longtake can run") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    return data
