"""For tests of the engine: a small model with two prompts, and a film of two shots."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from longtake.engine.model import CausalWan, TextContext
from tests.engine.small_rollout import random_contexts, random_model

if TYPE_CHECKING:
    from tests.engine.small_film import Film


@pytest.fixture(scope="session")
def model() -> CausalWan:
    return random_model()


@pytest.fixture(scope="session")
def contexts(model: CausalWan) -> list[TextContext]:
    return random_contexts(model, 2)


@pytest.fixture(scope="session")
def film(tmp_path_factory: pytest.TempPathFactory) -> Film:
    from longtake.engine.random_model import write_random_model
    from tests.engine.small_film import Film

    return Film(write_random_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="session")
def undisturbed(film: Film, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    for name in ("a", "b"):
        result = film.render(name, out)
        assert result.finished
        assert [path.name for path in result.segments] == ["00000.mp4", "00001.mp4"]
        assert set(result.segments) == set((out / name / "segments").iterdir())
    return out


@pytest.fixture
def out(undisturbed: Path, tmp_path: Path) -> Path:
    """A directory with shot `a` finished and `b` not begun."""
    subprocess.run(["cp", "-r", str(undisturbed / "a"), str(tmp_path / "a")], check=True)
    return tmp_path


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [thread for thread in set(threading.enumerate()) - before if "zarr" not in thread.name]
    assert not [thread for thread in left if not thread.name.startswith(("asyncio", "ThreadPool"))], left
