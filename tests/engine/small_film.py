"""Two shots of a tiny model, rendered with and without interruptions, for tests."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

from longtake.engine.config import Switch
from longtake.engine.shot import BlockProgress, ShotRenderer, ShotResult
from longtake.engine.weights import read_spec
from longtake.jobs.film import parse_film
from longtake.jobs.recipe import Recipe
from longtake.jobs.resolve import resolve

FILM = """\
[film]
model = "{model}"
[[shot]]
name = "a"
duration = "13s"
prompt = "p"
[[shot.beat]]
at = "5s"
prompt = "q"
[[shot]]
name = "b"
duration = "11s"
after = "a"
prompt = "r"
"""


def nobody() -> bool:
    return False


def ignore(progress: BlockProgress) -> None:
    pass


class Film:
    """Two shots of two segments each; `b` starts from `a`, whose second beat commits history anew."""

    def __init__(self, model: Path) -> None:
        film = parse_film(FILM.format(model=model))
        self.shots = dict(resolve(film, lambda name: read_spec(str(model))))
        first, second = self.shots["a"].beats
        beats = (first, dataclasses.replace(second, switch=Switch.RECACHE))  # some history is committed twice
        self.shots["a"] = dataclasses.replace(self.shots["a"], beats=beats)
        self.renderer = ShotRenderer()

    def render(
        self,
        name: str,
        out: Path,
        *,
        stop: Callable[[], bool] = nobody,
        progress: Callable[[BlockProgress], None] = ignore,
    ) -> ShotResult:
        (out / name).mkdir(exist_ok=True)
        Recipe(config=self.shots[name]).keep_in(out / name)
        return self.renderer(self.shots[name], out / name, "cpu", stop=stop, progress=progress)

    def stop_after(self, name: str, out: Path, num_blocks: int) -> ShotResult:
        """Render until the shot has so many blocks."""
        done = [0]

        def progress(report: BlockProgress) -> None:
            done[0] = report.block

        return self.render(name, out, stop=lambda: done[0] >= num_blocks, progress=progress)


def contents(folder: Path) -> dict[str, str]:
    """Hashes of what must be the same whatever happened in between."""
    paths = [path for part in ("segments", "kv.zarr", "latents.zarr") for path in (folder / part).rglob("*")]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(paths)
        if path.is_file()
    }
