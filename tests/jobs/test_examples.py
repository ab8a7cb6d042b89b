from __future__ import annotations

from pathlib import Path

import pytest

from longtake.engine.config import ModelSpec
from longtake.engine.mini.grammar import DEFAULT_SCENE, MAX_PROMPT_BYTES, Scene, parse
from longtake.jobs.film import Film, load_film, parse_film
from longtake.jobs.resolve import resolve

ROOT = Path(__file__).parents[2]


def films() -> list[Path]:
    return sorted((ROOT / "examples").glob("*.toml"))


def fenced(path: Path) -> list[str]:
    """The TOML blocks of a page that are whole films."""
    blocks = path.read_text().split("```toml\n")[1:]
    return [text for block in blocks if "[[shot]]" in (text := block.split("```")[0])]


@pytest.mark.parametrize("path", films(), ids=lambda path: path.name)
def test_examples_resolve(path: Path, spec: ModelSpec) -> None:
    assert resolve(load_film(path), lambda name: spec)


def test_the_quickstart_is_8_seconds_in_two_shots(spec: ModelSpec) -> None:
    configs = resolve(load_film(ROOT / "examples" / "quickstart.toml"), lambda name: spec)
    first, second = configs.values()
    assert abs((first.num_frames + second.num_frames) / 16 - 8) < 0.1
    assert second.after == first.name
    assert [first.beat_of_block(block) for block in range(first.num_blocks)] == [0, 0, 0, 0, 1, 1, 1]


def test_mini_understands_the_quickstart() -> None:
    """Every prompt says something in mini's grammar, in the bytes that it reads."""
    film = load_film(ROOT / "examples" / "quickstart.toml")
    for shot in film.shots:
        previous: Scene | None = None
        for prompt in (shot.prompt, *(beat.prompt for beat in shot.beats)):
            assert len(prompt.encode()) <= MAX_PROMPT_BYTES
            scene = parse(prompt, previous)
            assert scene != (previous or DEFAULT_SCENE)
            previous = scene


@pytest.mark.parametrize("page", ["README.md", "docs/film.md"])
def test_films_in_the_pages(page: str) -> None:
    texts = fenced(ROOT / page)
    assert texts
    for text in texts:
        assert isinstance(parse_film(text), Film)


def test_every_key_is_on_the_page() -> None:
    from longtake.jobs import film, film_settings

    page = (ROOT / "docs" / "film.md").read_text()
    settings = (*film_settings._HISTORY_KEYS, *film_settings._CACHE_KEYS, *film_settings._PRUNE_KEYS)
    keys = {*film._FILM_KEYS, *film._SHOT_KEYS, *film._BEAT_KEYS, *settings}
    assert {key for key in keys if f"`{key}`" not in page and f"[[shot.{key}]]" not in page} == set()
