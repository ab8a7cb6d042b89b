"""DIR/<shot>/config.json: what a shot was rendered from, so that going on with something else is refused.

    {"format": 1, "longtake": "0.1.0", "starts_from": <recipe's hash of the shot before> | null, "config": {...}}

Where the model's folder lies does not count: a run may go on on another machine.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtake.engine.config import ShotConfig
from longtake.engine.essence import essence, to_json
from longtake.kernels.errors import ConfigError, StorageError
from longtake.offload.files import FileOps, as_bytes, fsync_dir, write_file

FORMAT = 1
RECIPE_NAME = "config.json"
_MAX_DIFFERENCES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A shot's resolved configuration and the hash of the recipe that it starts from."""

    config: ShotConfig
    starts_from: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As written to the file."""
        return {
            "format": FORMAT,
            "longtake": importlib.metadata.version("longtake"),
            "starts_from": self.starts_from,
            "config": to_json(self.config),
        }

    @property
    def content_hash(self) -> str:
        """Hash (hex, 32 characters) of everything that decides the shot's frames."""
        text = json.dumps(_essence(self.to_json()), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def keep_in(self, directory: Path) -> None:
        """Write the recipe into the shot's directory, or check it against the one there.

        Raises:
            ConfigError: the directory holds a shot rendered from something else; says what differs.
            StorageError: the recipe there is damaged, or none can be written.
        """
        path = directory / RECIPE_NAME
        existing = read_recipe(path)
        if existing is None:
            _write(path, self.to_json())
            return
        differences = self._differences(existing)
        if differences:
            listed = "; ".join(differences[:_MAX_DIFFERENCES])
            more = f" and {len(differences) - _MAX_DIFFERENCES} more" if len(differences) > _MAX_DIFFERENCES else ""
            raise ConfigError(
                f"{directory} was rendered from another film ({listed}{more}); "
                f"undo the change, name another --out, or add --fresh to render the shot anew"
            )

    def is_in(self, directory: Path) -> bool:
        """Whether the shot in that directory was rendered from this recipe.

        Raises:
            ConfigError, StorageError: as `keep_in`.
        """
        existing = read_recipe(directory / RECIPE_NAME)
        return existing is not None and not self._differences(existing)

    def _differences(self, existing: dict[str, Any]) -> list[str]:
        return list(_differences(_essence(existing), _essence(self.to_json()), ""))


def _essence(data: dict[str, Any]) -> dict[str, Any]:
    """The part of a recipe's JSON that decides the frames: no version, no paths, no budgets."""
    return {"starts_from": data["starts_from"], **essence(data["config"])}


def _differences(before: Any, now: Any, key: str) -> Iterator[str]:
    """``key: before -> now`` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*before, *(name for name in now if name not in before)]:
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(*pair, f"{key}[{index}]")
    elif before != now:
        chained = key == "starts_from" and before and now
        yield "the shot that it starts from changed" if chained else f"{key}: {_short(before)} -> {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."


def read_recipe(path: Path) -> dict[str, Any] | None:
    """The JSON of a recipe's file; None where there is none.

    Raises:
        ConfigError: it is of another format.
        StorageError: it is damaged or cannot be read.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_bytes())
        if data["format"] != FORMAT:
            message = f"the shot's settings are of format {_short(data['format'])}, this longtake reads {FORMAT}"
            raise ConfigError(f"{message}; render with --fresh", path=path)
        _essence(data)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"the shot's settings cannot be read: {error.strerror}", path=path) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise StorageError(
            "the record of the shot's settings is damaged; render the shot anew with --fresh", path=path
        ) from error
    return data


def _write(path: Path, data: dict[str, Any]) -> None:
    ops = FileOps()
    try:
        write_file(ops, path, [as_bytes(f"{json.dumps(data, indent=1)}\n".encode())])
        fsync_dir(ops, path.parent)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}; make room or mend the rights") from error
