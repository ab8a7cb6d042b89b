"""The job of a film as a thread of the test."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from longtake.jobs.film import load_film
from longtake.jobs.filmorder import FarmOptions, FilmOrder
from longtake.jobs.ledger import FilmRecord
from tests.ray.films import wait_for


def film_order(
    film: Path,
    out: Path,
    *,
    priority: int = 0,
    sizes: tuple[int, ...] = (1,),
    max_tries: int = 10,
    device: str = "cpu",
) -> FilmOrder:
    """What submitting the film says, with a director that is quick to lose patience."""
    loaded = load_film(film)
    record = FilmRecord(
        title=loaded.title,
        content_hash=loaded.content_hash,
        toml=film.read_text(),
        source=str(film),
        priority=priority,
        gang_sizes=sizes,
        backoff_s=0.2,
        max_tries=max_tries,
        device=device,
    )
    return FilmOrder(directory=str(out), record=record, options=FarmOptions(lease_s=8.0, watch_s=0.5))


class Following(threading.Thread):
    """`follow` in a thread: the job of a film, in this process."""

    def __init__(self, film: Path, out: Path, **how: Any) -> None:
        super().__init__(daemon=True)
        self.out, self.lines, self.code, self.stop = out, list[str](), -1, False
        self.order = film_order(film, out, **how)
        self.start()

    def run(self) -> None:
        from longtake.jobs.driver import follow

        self.code = follow(self.order, stop=lambda: self.stop, say=self.lines.append, interval_s=0.2)

    def shot(self, name: str) -> dict[str, Any]:
        """Its entry in status.json; empty before there is one."""
        path = self.out / "status.json"
        entry: dict[str, Any] = json.loads(path.read_text())["shots"].get(name, {}) if path.exists() else {}
        return entry

    def log(self, shot: str) -> str:
        """What its gangs wrote about a shot."""
        path = self.out / f"{shot}.log"
        return path.read_text() if path.exists() else ""

    def wait_state(self, name: str, *states: str) -> None:
        wait_for(lambda: self.shot(name).get("state") in states)

    def wait_blocks(self, name: str, blocks: int) -> None:
        wait_for(lambda: self.shot(name).get("blocks_done", 0) >= blocks)
