"""longtake pull against a hub on loopback: fetched, checked, resumed, and usable by name."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from longtake.engine import store
from longtake.engine.hub import list_files, pull, settings_of
from longtake.engine.presets import PRESETS
from longtake.engine.weights import find_model, load_transformer, read_spec
from longtake.kernels.errors import CapacityError, ConfigError, StorageError
from tests.engine.fake_hub import FakeHub, serve
from tests.engine.plain_wan import random_state
from tests.engine.test_tensor_files import TINY, check_flow, prefixed

BASE, OWN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "gdhe17/Self-Forcing"
CHECKPOINT = "checkpoints/self_forcing_dmd.pt"


def checkpoint() -> bytes:
    data = io.BytesIO()
    torch.save({"generator_ema": prefixed(random_state(TINY), "model.")}, data)
    return data.getvalue()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("LONGTAKE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    base = {
        "README.md": b"not fetched",
        "model_index.json": b'{"_class_name": "WanPipeline"}',
        "vae/config.json": b'{"z_dim": 16}',
        "vae/diffusion_pytorch_model.safetensors": b"v" * 5000,
        "text_encoder/config.json": b"{}",
        "tokenizer/spiece.model": b"t" * 300,
        "transformer/diffusion_pytorch_model.safetensors": b"not fetched" * 100,
    }
    with serve(FakeHub({BASE: base, OWN: {CHECKPOINT: checkpoint(), "checkpoints/ode_init.pt": b"x" * 999}})) as hub:
        yield hub


def fetch(hub: FakeHub, name: str = "self-forcing") -> Path:
    return pull(list_files(name, hub.url), lambda file: None, hub.url)


def test_fetches_what_the_preset_names_and_nothing_else(hub: FakeHub, tmp_path: Path) -> None:
    listing = list_files("self-forcing", hub.url)
    assert dict(listing.licences) == {BASE: "apache-2.0", OWN: "apache-2.0"}
    assert listing.num_bytes == sum(file.num_bytes for file in listing.files)
    folder = fetch(hub)
    assert folder == tmp_path / "home" / "models" / "self-forcing"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "longtake.json",
        "model_index.json",
        "pulled.json",
        "text_encoder/config.json",
        "tokenizer/spiece.model",
        "transformer/config.json",
        "transformer/self_forcing_dmd.pt",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert store.fetched() == ["self-forcing"]
    assert "checkpoints/ode_init.pt" not in dict(hub.downloads)


def test_a_fetched_model_is_found_by_name_and_loads(hub: FakeHub) -> None:
    with pytest.raises(ConfigError, match="run  longtake pull self-forcing"):
        find_model("self-forcing")
    folder = fetch(hub)
    preset, spec = PRESETS["self-forcing"], read_spec("self-forcing")
    assert find_model("self-forcing") == folder
    assert (spec.transformer, spec.sampler, spec.history) == (preset.transformer, preset.sampler, preset.history)
    assert (spec.weights, spec.switch, spec.block_frames) == (preset.weights, preset.switch, preset.block_frames)
    with pytest.raises(ConfigError, match="weights do not fit"):
        load_transformer(spec, torch.device("cpu"), torch.float32)
    (folder / "transformer" / "config.json").write_text(json.dumps(TINY.to_hub()))
    model = load_transformer(read_spec("self-forcing"), torch.device("cpu"), torch.float32)
    check_flow(model, random_state(TINY))


@pytest.mark.parametrize("name", PRESETS)
def test_every_presets_settings_come_back(name: str, tmp_path: Path) -> None:
    preset, folder = PRESETS[name], tmp_path / "model"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(preset.transformer.to_hub()))
    (folder / "longtake.json").write_text(json.dumps(settings_of(name, preset)))
    spec = read_spec(str(folder))
    for key in ("transformer", "sampler", "history", "block_frames", "fps", "height", "width", "switch", "weights"):
        assert getattr(spec, key) == getattr(preset, key)
    assert spec.spatial_stride == preset.spatial_stride


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": 4}, "no such key: step; did you mean"),
        ({"history": {"recent": 3}}, "no such key: recent; did you mean recent_blocks?"),
        ({"weights": {"lora_aplha": 1}}, "did you mean lora_alpha?"),
        ({"shift": None}, "'shift' is missing"),
        ({"history": {"policy": "all"}}, "'all' is not a valid HistoryPolicy"),
    ],
)
def test_settings_that_cannot_be_are_one_line(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    preset = PRESETS["self-forcing"]
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(preset.transformer.to_hub()))
    settings = settings_of("self-forcing", preset) | change
    kept = {key: value for key, value in settings.items() if value is not None}
    (tmp_path / "longtake.json").write_text(json.dumps(kept))
    with pytest.raises(ConfigError, match=rf"longtake\.json: .*{re.escape(words)}.*docs/models\.md"):
        read_spec(str(tmp_path))


def test_a_broken_download_goes_on_where_it_stopped(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.cut = {CHECKPOINT}
    with pytest.raises(StorageError, match="run the same command again"):
        fetch(hub)
    assert store.fetched() == []
    hub.cut = set()
    before = len(hub.downloads)
    folder = fetch(hub)
    size = len(hub.repos[OWN][CHECKPOINT])
    again = hub.downloads[before:]
    assert [name for name, _ in again if name == CHECKPOINT] == [CHECKPOINT]
    assert 0 < dict(again)[CHECKPOINT] <= size // 2
    assert (folder / "transformer" / "self_forcing_dmd.pt").read_bytes() == hub.repos[OWN][CHECKPOINT]


def test_shared_files_are_fetched_once(hub: FakeHub) -> None:
    fetch(hub)
    before = len(hub.downloads)
    fetch(hub, "infinity-rope")
    assert len(hub.downloads) == before
    assert store.fetched() == ["infinity-rope", "self-forcing"]


@pytest.mark.parametrize("spoilt", [CHECKPOINT, "vae/config.json"])
def test_damaged_files_are_noticed_and_fetched_again(hub: FakeHub, spoilt: str) -> None:
    hub.spoilt = {spoilt}
    with pytest.raises(StorageError, match=f"{spoilt} came damaged"):
        fetch(hub)
    assert store.fetched() == []
    hub.spoilt = set()
    assert fetch(hub).is_dir()


def test_what_is_not_there_is_said(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean 'self-forcing'"):
        list_files("self-forcin", hub.url)
    with pytest.raises(StorageError, match="the hub has no tianweiy/CausVid"):
        list_files("causvid", hub.url)
    del hub.repos[OWN][CHECKPOINT]
    with pytest.raises(StorageError, match=f"{OWN} has no {CHECKPOINT}"):
        list_files("self-forcing", hub.url)
    with pytest.raises(StorageError, match="could not be fetched"):
        list_files("self-forcing", "http://127.0.0.1:9")


def test_a_full_disk_is_noticed_first(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(CapacityError, match="make room or set LONGTAKE_HOME"):
        fetch(hub)
    assert hub.downloads == []


def test_the_command(hub: FakeHub, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}

    def longtake(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["longtake", *arguments], env=environment, capture_output=True, text=True, timeout=240)

    result = longtake("pull", "self-forcing")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"licence of {OWN}: apache-2.0" in result.stdout
    assert result.stdout.splitlines()[-1] == f"self-forcing is in {tmp_path}/home/models/self-forcing"
    listed = longtake("models").stdout
    assert f"{tmp_path}/home/models/self-forcing" in listed
    assert "rolling-forcing" in listed.split("to be fetched")[1]
    failed = longtake("pull", "causvid")
    assert failed.returncode == 1
    assert failed.stderr.startswith("longtake: the hub has no ")
