"""The methods that ``longtake bench methods`` compares: ``methods.toml``, whose lines are a film's own keys."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from longtake.engine.config import CacheConfig, HistoryConfig, PruneConfig, ShotConfig, TierConfig

FILE = "methods.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to keep a history.

    Args:
        name: of the method.
        group: of the file: "study" for the 33 of arXiv 2603.27469.
        line: its line of the file, in braces: keys of a film.
        cache: codecs by age and importance.
        prune: what is left out or merged.
        attention: how it is attended.
    """

    name: str
    group: str
    line: str
    cache: CacheConfig
    prune: PruneConfig | None = None
    attention: str = "dense"

    def applied_to(self, shot: ShotConfig) -> ShotConfig:
        """The shot with its history kept so; its window stays."""
        history: HistoryConfig = dataclasses.replace(shot.history, prune=self.prune)
        return dataclasses.replace(shot, cache=self.cache, history=history, attention=self.attention)


def methods() -> dict[str, Method]:
    """All of them by name, in the file's order."""
    text = resources.files("longtake.engine").joinpath(FILE).read_text()
    lines = dict(line.split(" = ", 1) for line in text.splitlines() if " = {" in line)
    return {
        name: _method(name, group, lines[name], keys)
        for group, of_group in tomllib.loads(text).items()
        for name, keys in of_group.items()
    }


def _method(name: str, group: str, line: str, keys: Mapping[str, Any]) -> Method:
    cache = dict(keys.get("cache", {}))
    tiers = sorted((int(age), codec) for age, codec in cache.pop("tiers", {}).items())
    prune = dict(keys.get("history", {}).get("prune", {}))
    if "merge" in prune:
        prune["merge"] = tuple(prune["merge"])
    return Method(
        name=name,
        group=group,
        line=line,
        cache=CacheConfig(
            codec=keys["codec"], tiers=tuple(TierConfig(age=age, codec=codec) for age, codec in tiers), **cache
        ),
        prune=PruneConfig(**prune) if prune else None,
        attention=keys.get("attention", "dense"),
    )
