"""Shots whose history is kept in several forms: stopped, torn apart, damaged, on a gang, and the same bytes again."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path

import pytest
import torch

from longtake.engine.config import ModelConfig, ShotConfig
from longtake.engine.gang import join
from longtake.engine.latents import LatentLog
from longtake.engine.random_model import write_random_model
from longtake.engine.shot import BlockProgress, ShotRenderer
from longtake.engine.shotfolder import LATENTS_NAME
from longtake.engine.weights import read_spec
from longtake.jobs.film import parse_film
from longtake.jobs.recipe import Recipe
from longtake.jobs.resolve import resolve
from longtake.jobs.verify import verify
from longtake.kernels.errors import StorageError
from tests.engine.gangs import run_ranks

FILM = """\
[film]
model = "{model}"
codec = "rtn2"
cache = {{ tiers = {{ 1 = "bf16" }} }}
[film.history]
policy = "full"
prune = {{ recent_blocks = 2, important = 0.1, keep = 0.3, merge = [1, 3] }}
[[shot]]
name = "a"
duration = "9s"
prompt = "p"
[[shot]]
name = "b"
duration = "{seconds}"
after = "a"
after_blocks = 3
prompt = "q"
"""
FORMS = {"bf16", "rtn2-mean1x3"}
TWO_HEADS = ModelConfig(num_heads=2, head_dim=32, num_layers=2, ffn_dim=90, text_dim=32, freq_dim=32)


def shots(model: Path, seconds: str = "9s") -> dict[str, ShotConfig]:
    return dict(resolve(parse_film(FILM.format(model=model, seconds=seconds)), lambda name: read_spec(str(model))))


class Film:
    def __init__(self, model: Path) -> None:
        self.shots = shots(model)
        self.renderer = ShotRenderer()

    def render(self, name: str, out: Path, *, blocks: int | None = None) -> bool:
        """Render, to the end or until so many blocks are done; whether it is finished."""
        (out / name).mkdir(exist_ok=True)
        Recipe(config=self.shots[name]).keep_in(out / name)
        done = [0]

        def progress(report: BlockProgress) -> None:
            done[0] = report.block

        def stop() -> bool:
            return blocks is not None and done[0] >= blocks

        return self.renderer(self.shots[name], out / name, "cpu", stop=stop, progress=progress).finished


def contents(folder: Path) -> dict[str, str]:
    """Hashes of what must be the same whatever happened in between."""
    parts = ("segments", "kv.zarr", "latents.zarr", *(f"forms/{form}/kv.zarr" for form in FORMS))
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in parts
        for path in sorted((folder / part).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Film:
    return Film(write_random_model(tmp_path_factory.mktemp("model") / "tiny", transformer=TWO_HEADS))


@pytest.fixture(scope="module")
def undisturbed(film: Film, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert film.render("a", out) and film.render("b", out)
    assert {path.name for path in (out / "b" / "forms").iterdir()} == FORMS
    verdict = verify(out)
    assert not verdict.damages
    return out


@pytest.fixture
def out(undisturbed: Path, tmp_path: Path) -> Path:
    shutil.copytree(undisturbed / "a", tmp_path / "a")
    return tmp_path


def test_stopped_at_any_block(film: Film, undisturbed: Path, out: Path) -> None:
    for blocks in (1, 4, 5):
        assert not film.render("b", out, blocks=blocks)
    assert film.render("b", out)
    assert contents(out / "b") == contents(undisturbed / "b")


@pytest.mark.parametrize("ahead", ["first form", "other forms"])
def test_forms_of_different_length(film: Film, undisturbed: Path, out: Path, ahead: str) -> None:
    """A process that died when some forms of a block were durable and others were not."""
    short = out / "short"
    short.mkdir()
    shutil.copytree(undisturbed / "a", short / "a")
    film.render("b", short, blocks=3)
    film.render("b", out, blocks=6)
    if ahead == "first form":
        shutil.rmtree(out / "b" / "forms")
        shutil.copytree(short / "b" / "forms", out / "b" / "forms")
    else:
        shutil.rmtree(short / "b" / "forms")
        shutil.copytree(out / "b" / "forms", short / "b" / "forms")
        shutil.rmtree(out / "b")
        shutil.copytree(short / "b", out / "b")
    assert film.render("b", out)
    assert contents(out / "b") == contents(undisturbed / "b")


def test_damage_in_a_form_names_the_block_to_go_on_from(film: Film, undisturbed: Path, out: Path) -> None:
    film.render("b", out, blocks=8)
    timeline_block = 7  # of the shot; three blocks of prefix before it, all of them kept in this form
    chunk = next((out / "b" / "forms" / "bf16" / "kv.zarr").glob(f"*/c.{timeline_block + 3}.*"))
    chunk.write_bytes(bytes(chunk.stat().st_size))
    damages = verify(out).damages
    assert {damage.file for damage in damages} == {str(chunk.relative_to(out))}
    with pytest.raises(StorageError) as caught:
        film.render("b", out)
    latents = out / "b" / "latents.zarr" / f"c.{timeline_block}.0.0.0.0"
    assert f"delete {latents} and run again" in str(caught.value)
    latents.unlink()
    assert film.render("b", out)
    assert contents(out / "b") == contents(undisturbed / "b")


def render_rank(rank: int, model: Path, folder: Path, blocks: int | None) -> bool:
    asked = [0]

    def stop() -> bool:
        asked[0] += 1
        return blocks is not None and asked[0] > blocks

    with join() as gang:
        shot = dataclasses.replace(shots(model)["a"], attention="dense")
        return ShotRenderer(gang)(shot, folder, "cpu", stop=stop, progress=lambda _: None).finished


def test_gangs_of_changing_size(film: Film, undisturbed: Path, tmp_path: Path) -> None:
    model = film.shots["a"].model.path
    for num_ranks, blocks in ((2, 3), (1, None)):
        found = run_ranks(render_rank, num_ranks, model, tmp_path / "a", blocks, LONGTAKE_MESH="")
        assert found == [blocks is None] * num_ranks
    read = [LatentLog.existing(out / "a" / LATENTS_NAME).read(0, 5) for out in (undisturbed, tmp_path)]
    torch.testing.assert_close(read[1], read[0], rtol=0, atol=0.05)  # 2-bit codes turn over on float32 rounding
