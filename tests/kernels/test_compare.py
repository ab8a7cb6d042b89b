from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longtake.kernels import compare
from longtake.kernels.errors import ConfigError

SMALL = "--height 3 --width 5 --heads 2 --dim 64 --blocks 2 --queries 16"
METADATA = {"frames": "3", "height": "3", "width": "5"}


def run(monkeypatch: pytest.MonkeyPatch, target: Path, *more: str) -> list[dict[str, float | str]]:
    monkeypatch.setattr("sys.argv", ["compare", "--json", str(target), *SMALL.split(), *more])
    assert compare.main() == 0
    rows: list[dict[str, float | str]] = json.loads(target.read_text())["rows"]
    return rows


def tensors(prefix: str = "", blocks: int = 2) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    rows = {"k_THD": blocks * 45, "v_THD": blocks * 45, "q_THD": 45}
    made = {prefix + name: torch.randn(n, 2, 64, generator=g) for name, n in rows.items()}
    return made | {prefix + "positions": torch.arange(3 * blocks + 3)}


def test_every_codec_on_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(monkeypatch, tmp_path / "codecs.json")
    names = {row["codec"] for row in rows}
    assert {"bf16", "kivi2", "qvg-pro", "nvfp4"} <= names and len(rows) == 2 * len(names)
    error = {(row["kind"], row["codec"]): float(row["output_error"]) for row in rows}
    for kind in ("noise", "structured"):
        assert error[kind, "fp32"] < 1e-5 < error[kind, "bf16"] < error[kind, "int8"] < error[kind, "rtn2"]


def test_a_model_s_own_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "layers.safetensors"
    save_file(tensors("a.") | tensors("b."), path, METADATA)
    rows = run(monkeypatch, tmp_path / "codecs.json", "--data", str(path), "--codecs", "k=bf16,v=int8;int8")
    assert [(row["kind"], row["codec"]) for row in rows] == [("layers", "k=bf16,v=int8"), ("layers", "int8")]
    assert float(rows[0]["k_error"]) < 0.003 < float(rows[1]["k_error"]) < 0.01


def test_incomplete_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_file({k: v for k, v in tensors().items() if k != "v_THD"}, path, METADATA)
    with pytest.raises(ConfigError, match="lacks v_THD"):
        compare.load_samples(path)
    save_file(tensors() | {"positions": torch.arange(4)}, path, METADATA)
    with pytest.raises(ConfigError, match="do not fit 4 positions"):
        compare.load_samples(path)
