"""A film whose whole Ray was killed is submitted again; apart, since a machine's second Ray takes no jobs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ray.films import digest, kill_tree, render_undisturbed, wait_for

pytestmark = pytest.mark.ray


def test_everything_killed_and_submitted_again(film_of: Callable[..., Path], tmp_path: Path) -> None:
    film = film_of("gone", shots=(("a", 60, None), ("b", 4, "a")), title="Gone")
    out = tmp_path / "out-gone"
    command = ["longtake", "submit", str(film), "--out", str(out), "--device", "cpu"]
    with open(tmp_path / "first.txt", "w") as output:
        first = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    log = out / "a.log"
    wait_for(lambda: log.exists() and "block 4/" in log.read_text())
    kill_tree(first)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"block \d+/\d+ goes on from here", log.read_text())
    assert digest(out / "film.mp4") == render_undisturbed(film, tmp_path / "undisturbed")
