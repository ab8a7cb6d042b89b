"""Ray on loopback with two CPUs, the tiny model, and films for it. Nothing is left running behind."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.ray.films import write_film
from tests.ray.following import Following

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as Ray sets it for a worker with one CPU: the same sums, the same bits


def _jobs_fixtures() -> ModuleType:
    path = Path(__file__).parent.parent / "jobs" / "conftest.py"
    spec = importlib.util.spec_from_file_location("jobs_fixtures", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny_model = _jobs_fixtures().tiny_model


@pytest.fixture
def film_of(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a film: film_of("name", scale=2, ...), of the tiny model or of another."""

    def make(name: str = "film", *, model: Path = tiny_model, **options: Any) -> Path:
        return write_film(tmp_path / f"{name}.toml", model, **options)

    return make


@pytest.fixture(autouse=True)
def no_other_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that an earlier test ran in this process named its own cluster to the job interface."""
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def local_cluster() -> Iterator[str]:
    """Ray of this process, with its dashboard; yields the dashboard's address."""
    from longtake.jobs.local_ray import local_ray

    with local_ray(num_cpus=2) as address:
        yield address


@pytest.fixture
def following(local_cluster: str, tmp_path: Path) -> Iterator[Callable[..., Following]]:
    """Submits films; those that a test leaves open are cancelled."""
    begun: list[Following] = []

    def follow(film: Path, **options: Any) -> Following:
        begun.append(Following(film, tmp_path / f"out-{film.stem}", **options))
        return begun[-1]

    yield follow
    for one in begun:
        one.stop = True
        one.join(60)
