"""Training state on disk: a folder of safetensors, each file small enough to carry about, none of them pickled.

Weights are kept in float32, the optimisers' moments and the average in bfloat16 (a resumed run differs by that
rounding).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from longtake.engine.mini.distiller import Distiller
    from longtake.engine.mini.train_dit import Trainer

FILE_BYTES = 14_000_000


def save_state(folder: Path, trainer: Trainer) -> None:
    """Write weights, moments and counters; each file is replaced whole."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainer.model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        tensors[f"average.{name}"] = trainer.average[name].bfloat16()
        if parameter in trainer.muon.state:
            tensors[f"momentum.{name}"] = trainer.muon.state[parameter]["momentum"].bfloat16()
        if parameter in trainer.adam.state:
            moments = trainer.adam.state[parameter]
            tensors[f"mean.{name}"] = moments["exp_avg"].bfloat16()
            # the root keeps bfloat16's few bits where they matter
            tensors[f"deviation.{name}"] = moments["exp_avg_sq"].sqrt().bfloat16()
    _write(folder, tensors, trainer.step, trainer.elapsed_s)


def load_state(folder: Path, trainer: Trainer) -> None:
    """Go on from a saved state; one of another model raises KeyError or RuntimeError."""
    tensors, counters = _read(folder, trainer.device)
    for name, parameter in trainer.model.named_parameters():
        with torch.no_grad():
            parameter.copy_(tensors[f"weight.{name}"])
            trainer.average[name].copy_(tensors[f"average.{name}"])
        if f"momentum.{name}" in tensors and name in trainer.matrices:
            trainer.muon.state[parameter] = {"momentum": tensors[f"momentum.{name}"].float()}
        if f"mean.{name}" in tensors and name not in trainer.matrices:
            trainer.adam.state[parameter] = {
                "step": torch.tensor(float(counters["step"]), device=trainer.device),
                "exp_avg": tensors[f"mean.{name}"].float(),
                "exp_avg_sq": tensors[f"deviation.{name}"].float().square(),
            }
    trainer.step, trainer.elapsed_s = counters["step"], counters["elapsed_s"]


def load_weights(folder: Path, trainer: Trainer) -> None:
    """Start from an exported model or a training state: its averaged weights, and nothing of an optimiser.

    Raises:
        KeyError: the folder lacks a weight.
    """
    fill(trainer.model, folder, trainer.device)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            trainer.average[name].copy_(parameter)


@torch.no_grad()
def fill(model: nn.Module, folder: Path, device: torch.device) -> None:
    """Fill a ``Trainee`` with the weights of a model's folder (hub layout), or with the averages of a training state.

    Raises:
        KeyError: the folder lacks a weight.
    """
    tensors: dict[str, Tensor] = {}
    if (folder / "state.json").exists():
        state, _ = _read(folder, device)
        tensors = {name.removeprefix("average."): t for name, t in state.items() if name.startswith("average.")}
    for part in ("transformer", "text_encoder"):
        for file in sorted((folder / part).glob("*.safetensors")):
            tensors |= {f"{part}.{name}": t for name, t in load_file(file, device=str(device)).items()}
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])


def save_distilled(folder: Path, distiller: Distiller) -> None:
    """Write the student, its average and the fake score (no moments: a resumed run warms up anew)."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in distiller.model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        tensors[f"average.{name}"] = distiller.average[name].bfloat16()
    for name, parameter in distiller.fake.named_parameters():
        tensors[f"fake.{name}"] = parameter.detach().bfloat16()
    _write(folder, tensors, distiller.step, distiller.elapsed_s)


@torch.no_grad()
def load_distilled(folder: Path, distiller: Distiller) -> None:
    """Go on from what :func:`save_distilled` wrote; another model's raises KeyError or RuntimeError."""
    tensors, counters = _read(folder, distiller.device)
    for name, parameter in distiller.model.named_parameters():
        parameter.copy_(tensors[f"weight.{name}"])
        distiller.average[name].copy_(tensors[f"average.{name}"])
    for name, parameter in distiller.fake.named_parameters():
        parameter.copy_(tensors[f"fake.{name}"])
    distiller.step, distiller.elapsed_s = counters["step"], counters["elapsed_s"]


def _write(folder: Path, tensors: dict[str, Tensor], step: int, elapsed_s: float) -> None:
    """Write tensors as shards of at most ``FILE_BYTES``, each replaced whole, and the counters last."""
    shard: dict[str, Tensor] = {}
    shards: list[dict[str, Tensor]] = [shard]
    size = 0
    for name, tensor in sorted(tensors.items()):
        num_bytes = tensor.numel() * tensor.element_size()
        if size + num_bytes > FILE_BYTES:
            shard, size = {}, 0
            shards.append(shard)
        shard[name] = tensor.cpu().contiguous()
        size += num_bytes
    for index, part in enumerate(shards):
        temporary = folder / f".state-{index}.partial"
        save_file(part, temporary)
        os.replace(temporary, folder / f"state-{index}.safetensors")
    counters = {"step": step, "elapsed_s": elapsed_s, "num_files": len(shards)}
    (folder / "state.json").write_text(json.dumps(counters))


def _read(folder: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and counters that :func:`_write` wrote."""
    counters: dict[str, Any] = json.loads((folder / "state.json").read_text())
    tensors: dict[str, Tensor] = {}
    for index in range(counters["num_files"]):
        tensors |= load_file(folder / f"state-{index}.safetensors", device=str(device))
    return tensors, counters
