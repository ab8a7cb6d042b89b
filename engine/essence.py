"""A shot's configuration as data: written beside what is made from it, and compared before anyone goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from longtake.engine.config import CacheConfig, ShotConfig


def to_json(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON-able data; paths as text, enums as their values."""
    data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return data


# settings that earlier versions had not: without them a shot is the one that it was then
_LATER_KEYS = ("prune", "head_jitter")
_CODEC_KEYS = ("codec", "tiers", "refresh", "first", "first_blocks", "important")


def essence(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a shot's JSON that decides its bytes: without where its files lie and without budgets."""
    located = {
        name: {key: value for key, value in config[name].items() if key != "path"}
        for name in ("model", "clip", "image", "guide")
        if config.get(name)
    }
    defaults = located["model"]["history"]
    located["model"]["history"] = {key: value for key, value in defaults.items() if key != "head_jitter" or value}
    history = {key: value for key, value in config["history"].items() if key not in _LATER_KEYS or value}
    plain = to_json(CacheConfig())
    cache = {key: value for key, value in config["cache"].items() if key in _CODEC_KEYS and value != plain[key]}
    whole = {key: value for key, value in config.items() if key != "history_basis" or value}
    return {**whole, **located, "history": history, "cache": {"codec": config["cache"]["codec"], **cache}}


def fingerprint(shot: ShotConfig) -> str:
    """Content hash (hex, 16 characters) of a shot's essence: equal shots, equal hash, on any machine."""
    text = json.dumps(essence(to_json(shot)), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
