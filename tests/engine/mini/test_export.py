"""A model folder made of training states: what is loaded from it, and how a student and its teacher are blended."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from longtake.engine.mini import clips, export
from longtake.engine.mini.train_dit import Trainee
from longtake.engine.weights import load_transformer, read_spec

VAE = Path(clips.__file__).parent / "model" / "vae"


def write_state(folder: Path, value: float) -> Path:
    """A training state whose averages are all one number."""
    folder.mkdir()
    averages = {f"average.{name}": torch.full_like(p, value) for name, p in Trainee().named_parameters()}
    save_file(averages, folder / "state-0.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": 1, "elapsed_s": 1.0, "num_files": 1}))
    return folder


def weights_of(folder: Path) -> Tensor:
    model = load_transformer(read_spec(str(folder)), torch.device("cpu"), torch.float32)
    return torch.cat([p.flatten() for p in model.parameters()])


def test_a_student_and_its_teacher_are_blended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = write_state(tmp_path / "student", 4.0), write_state(tmp_path / "teacher", 2.0)

    def exported(name: str, *more: str) -> set[float]:
        out = tmp_path / name
        command = ["export", "--vae", str(VAE), "--state", str(student), "--out", str(out), *more]
        monkeypatch.setattr(sys, "argv", command)
        export.main()
        return set(weights_of(out).tolist())

    assert exported("alone") == {4.0}
    assert exported("blend", "--teacher", str(teacher), "--share", "0.25") == {2.5}
