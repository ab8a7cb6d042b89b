from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from longtake.engine.config import BeatConfig, CacheConfig, HistoryTable, ModelSpec, ShotConfig
from longtake.engine.essence import essence, to_json
from longtake.jobs.recipe import RECIPE_NAME, Recipe
from longtake.kernels.errors import ConfigError, StorageError


@pytest.fixture
def config(spec: ModelSpec) -> ShotConfig:
    return ShotConfig(
        name="a",
        model=spec,
        num_frames=80,
        fps=16,
        height=96,
        width=160,
        seed=1,
        beats=(BeatConfig(at_s=0.0, prompt="p"),),
        sampler=spec.sampler,
        history=spec.history,
    )


def test_kept_once_and_recognised(config: ShotConfig, tmp_path: Path) -> None:
    recipe = Recipe(config=config)
    assert not recipe.is_in(tmp_path)
    recipe.keep_in(tmp_path)
    assert recipe.is_in(tmp_path)
    before = (tmp_path / RECIPE_NAME).read_bytes()
    recipe.keep_in(tmp_path)
    assert (tmp_path / RECIPE_NAME).read_bytes() == before
    assert json.loads(before)["config"]["beats"][0] == {
        "at_s": 0.0,
        "prompt": "p",
        "switch": "keep",
        "transition_s": 0.0,
    }
    assert [path.name for path in tmp_path.iterdir()] == [RECIPE_NAME]


def test_what_does_not_change_the_frames_does_not_count(config: ShotConfig, tmp_path: Path) -> None:
    Recipe(config=config).keep_in(tmp_path)
    moved = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=Path("/elsewhere")),
        cache=CacheConfig(device_bytes=1 << 30, host_bytes=1, disk_bytes=2),
    )
    Recipe(config=moved).keep_in(tmp_path)
    assert Recipe(config=moved).content_hash == Recipe(config=config).content_hash


def test_differences_are_named(config: ShotConfig, tmp_path: Path) -> None:
    Recipe(config=config, starts_from="1").keep_in(tmp_path)
    changed = dataclasses.replace(
        config, seed=2, beats=(BeatConfig(at_s=0.0, prompt="x" * 99),), cache=CacheConfig(codec="int4"), fps=24
    )
    for recipe, message in (
        (Recipe(config=changed, starts_from="1"), r"fps: 16 -> 24; seed: 1 -> 2; beats\[0\]\.prompt: .* and 1 more\)"),
        (Recipe(config=config, starts_from="2"), "the shot that it starts from changed"),
        (Recipe(config=config), 'starts_from: "1" -> null'),
    ):
        assert not recipe.is_in(tmp_path)
        with pytest.raises(ConfigError, match=message) as caught:
            recipe.keep_in(tmp_path)
        assert len(str(caught.value).splitlines()) == 1


def test_another_table_of_the_models_heads_is_another_film(config: ShotConfig, tmp_path: Path) -> None:
    tables = [HistoryTable(hash=digest * 8, quarters=((9, 9), (12, 12), (16, 16))) for digest in ("0a", "1b")]
    before, after = (Recipe(config=dataclasses.replace(config, history_basis=table)) for table in tables)
    before.keep_in(tmp_path)
    before.keep_in(tmp_path)
    with pytest.raises(ConfigError, match=r'another film \(history_basis.hash: "0a0a.*" -> "1b1b.*"\); .* --fresh'):
        after.keep_in(tmp_path)
    path = tmp_path / RECIPE_NAME
    record = json.loads(path.read_text())
    record["config"]["history_basis"] = "0a" * 8
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r'\(history_basis: "0a0a.*" -> \{"hash".*\); .* --fresh to render') as caught:
        before.keep_in(tmp_path)
    assert len(str(caught.value).splitlines()) == 1, "a record of an earlier longtake, whose layers had the same bits"
    assert "history_basis" not in essence(to_json(config)), "a shot without one is the shot that it was"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 1, "starts_from": null, "config": 3}']
)
def test_a_damaged_recipe(config: ShotConfig, tmp_path: Path, text: str) -> None:
    (tmp_path / RECIPE_NAME).write_text(text)
    with pytest.raises(StorageError, match="is damaged; render the shot anew with --fresh"):
        Recipe(config=config).keep_in(tmp_path)


def test_a_recipe_of_another_format(config: ShotConfig, tmp_path: Path) -> None:
    (tmp_path / RECIPE_NAME).write_text('{"format": 99}')
    with pytest.raises(ConfigError, match="format 99"):
        Recipe(config=config).keep_in(tmp_path)


def test_a_directory_that_cannot_be_written(config: ShotConfig, tmp_path: Path) -> None:
    (tmp_path / f"{RECIPE_NAME}.partial").mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        Recipe(config=config).keep_in(tmp_path)
    (tmp_path / RECIPE_NAME).mkdir()
    with pytest.raises(StorageError, match="cannot be read"):
        Recipe(config=config).keep_in(tmp_path)
