"""``longtake bench codecs`` on a file of keys and values, and on made-up ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from longtake.engine.bench_codecs import main
from longtake.jobs import cli
from longtake.kernels.errors import ConfigError
from tests.kernels.test_compare import METADATA, tensors


def test_a_file_and_made_up_inputs(tmp_path: Path) -> None:
    path, written = tmp_path / "layers.safetensors", tmp_path / "codecs.json"
    save_file(tensors(), path, METADATA)
    arguments = ["bench", "codecs", "--json", str(written), "--data", str(path), "--kinds", "noise", "--small"]
    assert cli.run([*arguments, "--codecs", "k=bf16,v=int8;int8", "--queries", "16"]) == 0
    found = json.loads(written.read_text())
    rows = [(row["kind"], row["codec"]) for row in found["results"]]
    assert rows == [(kind, codec) for kind in ("layers", "noise") for codec in ("k=bf16,v=int8", "int8")]
    assert all(0 < row["output_error"] < 0.02 for row in found["results"])


def test_nothing_to_encode(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --model, --data or --kinds"):
        main(["--json", str(tmp_path / "codecs.json"), "--model", "none"])
