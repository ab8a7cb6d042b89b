"""Training state on disk: a folder of safetensors, each file small enough to carry about, none of them pickled.

Weights are kept in float32, Adam's moments and the average in bfloat16 (a resumed run differs by that rounding).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from longtake.engine.mini.train_dit import Trainer

FILE_BYTES = 14_000_000


def save_state(folder: Path, trainer: Trainer) -> None:
    """Write weights, moments and counters; each file is replaced whole."""
    moments = trainer.optimizer.state
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainer.model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        tensors[f"average.{name}"] = trainer.average[name].bfloat16()
        tensors[f"mean.{name}"] = moments[parameter]["exp_avg"].bfloat16()
        # the root keeps bfloat16's few bits where they matter
        tensors[f"deviation.{name}"] = moments[parameter]["exp_avg_sq"].sqrt().bfloat16()
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
    counters = {"step": trainer.step, "elapsed_s": trainer.elapsed_s, "num_files": len(shards)}
    (folder / "state.json").write_text(json.dumps(counters))


def load_state(folder: Path, trainer: Trainer) -> None:
    """Go on from a saved state; one of another model raises KeyError or RuntimeError."""
    counters = json.loads((folder / "state.json").read_text())
    tensors: dict[str, Tensor] = {}
    for index in range(counters["num_files"]):
        tensors |= load_file(folder / f"state-{index}.safetensors", device=str(trainer.device))
    for name, parameter in trainer.model.named_parameters():
        with torch.no_grad():
            parameter.copy_(tensors[f"weight.{name}"])
            trainer.average[name].copy_(tensors[f"average.{name}"])
        trainer.optimizer.state[parameter] = {
            "step": torch.tensor(float(counters["step"]), device=trainer.device),
            "exp_avg": tensors[f"mean.{name}"].float(),
            "exp_avg_sq": tensors[f"deviation.{name}"].float().square(),
        }
    trainer.step, trainer.elapsed_s = counters["step"], counters["elapsed_s"]
