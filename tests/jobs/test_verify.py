"""What ``longtake verify`` says of records that are torn, of another version or gone: the right file, and no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longtake.jobs import cli
from longtake.jobs.verify import Damage, verify

SHOTS = "".join(f'[[shot]]\nname = "{name}"\nduration = "1s"\nprompt = "p"\n' for name in ("a", "b"))


@pytest.fixture(scope="module")
def rendered(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished film of two shots."""
    home = tmp_path_factory.mktemp("rendered")
    (home / "film.toml").write_text(f'[film]\nmodel = "{tiny_model}"\n{SHOTS}')
    assert cli.run(["render", str(home / "film.toml"), "--out", str(home / "out"), "--device", "cpu"]) == 0
    return home / "out"


@pytest.fixture
def out(rendered: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered, tmp_path / "out"))


def change_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        path = out / "a" / "config.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return damage


def test_a_whole_film(out: Path) -> None:
    verdict = verify(out)
    assert (verdict.shots, verdict.damages, verdict.num_segments) == (("a", "b"), (), 2)


@pytest.mark.parametrize(
    ("damage", "file", "what"),
    [
        (lambda out: (out / "a" / "config.json").write_text('{"format": 1,'), "a/config.json", "is damaged"),
        (lambda out: (out / "a" / "config.json").unlink(), "a/config.json", "are not there"),
        (change_config(lambda data: data.update(format=2)), "a/config.json", "format 2, this longtake reads 1"),
        (change_config(lambda data: data["config"].update(num_frames="x")), "a/config.json", "'x' is no count"),
        (change_config(lambda data: data["config"]["model"].update(temporal_stride=0)), "a/config.json", "0 is no"),
        (lambda out: (out / "a" / "journal").unlink(), "a/journal", "lists segments of 0 frames, and the shot's video"),
        (lambda out: shutil.rmtree(out / "a"), "a", "was finished, and its folder is not there"),
    ],
)
def test_one_damage_is_one_line(out: Path, damage: Callable[[Path], object], file: str, what: str) -> None:
    """A shot whose length is not known makes no other file bad: film.mp4 is as it was."""
    damage(out)
    (found,) = verify(out).damages
    assert isinstance(found, Damage) and (found.shot, found.file) == ("a", file)
    assert what in found.what and len(found.describe().splitlines()) == 1


def test_a_journal_lost_is_mended_as_it_says(out: Path, rendered: Path) -> None:
    (out / "a" / "journal").unlink()
    (out / "a" / "a.mp4").unlink()
    film = rendered.parent / "film.toml"
    assert cli.run(["render", str(film), "--out", str(out), "--device", "cpu"]) == 0
    assert not verify(out).damages
    assert (out / "film.mp4").read_bytes() == (rendered / "film.mp4").read_bytes()
