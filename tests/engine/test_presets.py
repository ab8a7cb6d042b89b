"""The page of models and the presets say the same."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from longtake.engine.config import WAN_5B, HistoryPolicy, Loop
from longtake.engine.hub import settings_of
from longtake.engine.presets import PRESETS

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()


def row(name: str) -> str:
    return next(line for line in PAGE.splitlines() if line.startswith("| `") and f"`{name}`" in line.split("|")[1])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_on_the_page(name: str) -> None:
    preset, cells = PRESETS[name], [cell.strip() for cell in row(name).split("|")[1:-1]]
    assert (preset.licence or "see its card") == cells[2]
    assert str(preset.block_frames) == cells[4].split()[0]
    assert preset.switch.value in cells[7]
    if preset.few_step:
        assert cells[3].startswith(" ".join(f"{step:g}" for step in preset.sampler.timesteps))
        window = preset.history.sink_blocks + preset.history.recent_blocks + 1
        numbers = f"{window * preset.block_frames}, {preset.history.sink_blocks * preset.block_frames}"
        assert cells[5].startswith(numbers)
        assert bool(preset.unverified) == bool(cells[8])
        for files in preset.files:
            assert f"`{files.repo}`" in PAGE
            if files.into and name != "infinity-rope":
                assert all(f"`{pattern}`" in cells[1] for pattern in files.patterns)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_together(name: str) -> None:
    preset = PRESETS[name]
    window = (preset.history.sink_blocks + preset.history.recent_blocks + 1) * preset.block_frames
    if preset.history.policy is HistoryPolicy.WINDOW:
        assert window <= preset.history.trained_frames
    if preset.sampler.loop is Loop.ROLLING:
        assert len(preset.sampler.timesteps) + preset.history.sink_blocks <= window / preset.block_frames
    assert (preset.spatial_stride == 16) == (preset.transformer == WAN_5B)
    unit = 2 * preset.spatial_stride
    assert preset.height % unit == 0 and preset.width % unit == 0
    named = [pattern.split("/")[-1] for files in preset.files if files.into for pattern in files.patterns]
    if named:
        assert {*preset.weights.files, *([preset.weights.lora] if preset.weights.lora else [])} == set(named)


def test_every_key_of_a_models_settings_is_on_the_page() -> None:
    preset = PRESETS["longlive"]
    history = asdict(preset.history).keys() - {"prune"}  # which a film says, not a model
    keys = {*settings_of("longlive", preset), *history, *asdict(preset.weights), "temporal_stride"}
    assert {key for key in keys if f"`{key}`" not in PAGE} == set()
