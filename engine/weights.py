"""Model folders: where they are, what their longtake.json says, and how their weights become a model.

A folder has the hub's layout: model_index.json, transformer/, vae/, text_encoder/, tokenizer/, scheduler/, and
longtake.json beside them with what the hub's files do not say (block size, steps, frame rate, size, history).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from longtake.engine.config import HistoryConfig, HistoryPolicy, ModelConfig, ModelSpec, Positions, SamplerConfig
from longtake.engine.model import CausalWan
from longtake.kernels.errors import ConfigError, StorageError

SHIPPED = {"mini": Path(__file__).parent / "mini" / "model"}


def find_model(name: str) -> Path:
    """Folder of a model given by a shipped name or a path.

    Raises:
        ConfigError: there is no such model; names the nearest shipped one.
    """
    if name in SHIPPED:
        return SHIPPED[name]
    folder = Path(name).expanduser()
    if (folder / "transformer" / "config.json").is_file():
        return folder
    near = difflib.get_close_matches(name, SHIPPED, n=1)
    known = f"give a folder in the hub's layout or one of: {', '.join(SHIPPED)}"
    hint = f"did you mean {near[0]!r}?" if near else known
    raise ConfigError(f"unknown model {name!r}: {hint}")


def read_spec(name: str) -> ModelSpec:
    """Everything a rollout must know of a model before its weights are read.

    Raises:
        ConfigError: a file is missing or says something that cannot be.
    """
    folder = find_model(name)
    settings = _read_json(folder / "longtake.json")
    history = settings.get("history", {})
    try:
        return ModelSpec(
            path=folder,
            name=settings["name"],
            transformer=ModelConfig.from_hub(
                _read_json(folder / "transformer" / "config.json"), str(folder / "transformer" / "config.json")
            ),
            sampler=SamplerConfig(timesteps=tuple(settings["timesteps"]), shift=settings["shift"]),
            block_frames=settings["block_frames"],
            fps=settings["fps"],
            height=settings["height"],
            width=settings["width"],
            text_len=settings["text_len"],
            history=HistoryConfig(
                policy=HistoryPolicy(history.get("policy", "window")),
                sink_blocks=history.get("sink_blocks", 1),
                recent_blocks=history.get("recent_blocks", 6),
                positions=Positions(history.get("positions", "relative")),
            ),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder / 'longtake.json'}: {error!r}; see docs/models.md for the keys it must have"
        ) from error


def load_transformer(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> CausalWan:
    """The transformer with its weights, in evaluation mode, without a second copy of them in memory.

    Args:
        spec: the model.
        device: where the weights go.
        dtype: of the weights, but for the few that the family keeps in float32.

    Raises:
        ConfigError: tensors are missing, left over or of the wrong shape; lists them all.
        StorageError: a weights file is not there.
    """
    with torch.device("meta"):
        model = CausalWan(spec.transformer)
    found = dict(_tensors(spec.path / "transformer"))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"missing {name} {list(wanted[name])}" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"not of this model: {name}" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{name} is {list(found[name].shape)}, expected {list(wanted[name])}"
        for name in sorted(wanted.keys() & found.keys())
        if tuple(found[name].shape) != wanted[name]
    ]
    if problems:
        raise ConfigError(f"{spec.path / 'transformer'}: weights do not fit config.json: {'; '.join(problems)}")
    model.load_state_dict(found, assign=True)
    return model.cast(dtype).to(device).eval().requires_grad_(False)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a folder's safetensors files, memory-mapped, sharded or not."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise StorageError(f"no .safetensors file in {folder}: the model is incomplete, fetch it again")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                yield name, tensors.get_tensor(name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing: {path.parent} is not a model folder that longtake can run") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    return data
