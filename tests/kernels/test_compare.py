"""Codecs side by side: errors in the order of their bits, files of K/V read or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longtake.kernels import compare, synthetic
from longtake.kernels.codec import codec_names
from longtake.kernels.errors import ConfigError

SMALL = synthetic.Grid(frames=3, height=3, width=5)
METADATA = {"frames": "3", "height": "3", "width": "5"}


def tensors(prefix: str = "", blocks: int = 2) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    rows = {"k_THD": blocks * 45, "v_THD": blocks * 45, "q_THD": 45}
    made = {prefix + name: torch.randn(n, 2, 64, generator=g) for name, n in rows.items()}
    return made | {prefix + "positions": torch.arange(3 * blocks + 3)}


@pytest.mark.parametrize("kind", ["noise", "structured"])
def test_every_codec(kind: str) -> None:
    samples = [compare.synthetic_sample(kind, SMALL, blocks=2, heads=2, dim=64, seed=0)]
    rows = [compare.measure(kind, name, samples, num_queries=16) for name in codec_names()]
    error = {row.codec: row.output_error for row in rows}
    assert {"bf16", "kivi2", "qvg-pro", "nvfp4"} <= error.keys()
    assert error["fp32"] < 1e-5 < error["bf16"] < error["int8"] < error["rtn2"]
    assert [line.split()[1] for line in compare.table(rows).splitlines()[1:]][-1] == "fp32"


def test_a_model_s_own_tensors(tmp_path: Path) -> None:
    path = tmp_path / "layers.safetensors"
    save_file(tensors("a.") | tensors("b."), path, METADATA)
    samples = compare.load_samples(path)
    assert len(samples) == 2
    mixed, plain = (compare.measure("layers", name, samples, 16) for name in ("k=bf16,v=int8", "int8"))
    assert mixed.k_error < 0.003 < plain.k_error < 0.01


def test_bad_inputs_are_named(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    with pytest.raises(ConfigError, match="there is no such file"):
        compare.load_samples(path)
    save_file({k: v for k, v in tensors().items() if k != "v_THD"}, path, METADATA)
    with pytest.raises(ConfigError, match="lacks v_THD"):
        compare.load_samples(path)
    save_file(tensors() | {"positions": torch.arange(4)}, path, METADATA)
    with pytest.raises(ConfigError, match="do not fit 4 positions"):
        compare.load_samples(path)
    with pytest.raises(ConfigError, match="'nois' is no kind of made-up input; use noise or structured"):
        compare.synthetic_sample("nois", SMALL, blocks=2, heads=2, dim=64, seed=0)
