"""DIR/.wishes: what people ask of a film from the command line, as files that the director takes in order.

A wish needs no connection to the cluster, only the run's directory, and waits there when the cluster is gone.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from longtake.jobs.orders import Action
from longtake.offload.files import FileOps, as_bytes, fsync_dir, write_file

WISHES_NAME = ".wishes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """One thing asked for; ``shot`` None means the whole film. All of them can be fulfilled twice without harm."""

    path: Path
    action: Action
    shot: str | None

    def done(self) -> None:
        """It is in the ledger; forget it."""
        self.path.unlink(missing_ok=True)


def make_wish(directory: Path, action: Action, shot: str | None) -> Wish:
    """Leave a wish for the director.

    Raises:
        OSError: the directory cannot be written.
    """
    folder = directory / WISHES_NAME
    folder.mkdir(exist_ok=True)
    path = folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.json"
    ops = FileOps()
    write_file(ops, path, [as_bytes(json.dumps({"action": str(action), "shot": shot}).encode())])
    fsync_dir(ops, folder)
    return Wish(path=path, action=action, shot=shot)


def take_wishes(directory: str | os.PathLike[str]) -> Iterator[Wish]:
    """The wishes that wait, oldest first; files that are none are removed."""
    folder = Path(directory) / WISHES_NAME
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(".json"))
    except FileNotFoundError:
        return
    for name in names:
        path = folder / name
        try:
            data = json.loads(path.read_text())
            shot = data["shot"]
            if shot is not None and not isinstance(shot, str):
                raise ValueError("no shot's name")
            wish = Wish(path=path, action=Action(data["action"]), shot=shot)
        except (ValueError, KeyError, TypeError):
            path.unlink(missing_ok=True)
            continue
        except FileNotFoundError:
            continue
        yield wish
