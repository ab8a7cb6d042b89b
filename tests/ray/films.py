"""Films for the cluster tests, and what is asked of processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

MINI = Path("mini")  # whose heads the kernels of a GPU take
SIX_SHOTS = (("a", 6, None), ("b", 4, "a"), ("c", 6, None), ("d", 3, "b"), ("e", 3, "c"), ("f", 5, None))


def write_film(
    path: Path,
    model: Path,
    *,
    scale: float = 1.0,
    title: str = "Six",
    shots: Any = SIX_SHOTS,
    seed: int = 3,
    film: tuple[str, ...] = (),
) -> Path:
    """A film of (name, seconds, after) shots, each ``scale`` times as long; ``film``: more lines of its table."""
    lines = ["[film]", f'title = "{title}"', f'model = "{model}"', f"seed = {seed}", *film]
    for name, seconds, after in shots:
        lines += ["[[shot]]", f'name = "{name}"', f'duration = "{seconds * scale:g}s"', f'prompt = "shot {name}"']
        lines += [f'after = "{after}"'] if after else []
    path.write_text("\n".join(lines) + "\n")
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def render_undisturbed(film: Path, out: Path) -> str:
    """Render without Ray; the film's hash."""
    command = ["longtake", "render", str(film), "--out", str(out), "--device", "cpu"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return digest(out / "film.mp4")


def wait_for(what: Callable[[], Any], timeout_s: float = 600.0, interval_s: float = 0.1) -> Any:
    """Poll until something is true."""
    until = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < until, f"waited {timeout_s} s in vain"
        time.sleep(interval_s)
    return found


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """SIGKILL a process and all that it started, and see that they are gone."""
    tree = processes(root=process.pid) if process.poll() is None else []
    process.kill()
    for one in tree:
        with contextlib.suppress(psutil.Error):
            one.kill()
    psutil.wait_procs(tree, timeout=120)
    process.wait(120)


def processes(*names: str, root: int | None = None) -> list[psutil.Process]:
    """Living descendants of a process (this one by default) whose title begins with one of the names."""
    found = []
    for process in psutil.Process(root).children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            if process.status() != psutil.STATUS_ZOMBIE and (not names or any(name in title[:200] for name in names)):
                found.append(process)
        except psutil.Error:
            continue
    return found
