"""What a film sets for all its shots and a shot may override: model, codec, size, history, cache."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from longtake.jobs.quantities import parse_bytes
from longtake.jobs.source import Table, quote

POLICIES = ("full", "window", "retrieve")
POSITIONS = ("absolute", "relative", "sink", "bounded")
WEIGHTS = ("model", "fp8")
ATTENTION = ("dense", "fp8")
SIZES = {"480p": (480, 832), "720p": (720, 1280)}
KEEPS = ("all", "needed")
DISK_IO = ("auto", "system", "deepnvme")
DEFAULT_MODEL = "mini"
SETTINGS_KEYS = ("model", "weights", "codec", "attention", "size", "fps", "seed", "steps", "history", "cache")
_HISTORY_KEYS = (
    "policy",
    "sink_blocks",
    "recent_blocks",
    "retrieved_blocks",
    "positions",
    "jitter",
    "head_jitter",
    "prune",
)
_PRUNE_KEYS = ("recent_blocks", "important", "keep", "merge")
_BUDGETS = ("device", "host", "disk")
_CACHE_KEYS = (*_BUDGETS, "keep", "disk_io", "tiers", "refresh", "first", "first_blocks", "important")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prune:
    """Which older blocks are left out or merged."""

    recent_blocks: int
    important: float | None = None
    keep: float | None = None
    merge: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What a block attends of the history."""

    policy: str | None = None
    sink_blocks: int | None = None
    recent_blocks: int | None = None
    retrieved_blocks: int | None = None
    positions: str | None = None
    jitter: float | None = None
    head_jitter: float | None = None
    prune: Prune | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """Budgets in bytes, what stays on the disk and how it is reached, and the codecs of some blocks.

    ``tiers`` are (age, codec), by age.
    """

    device_bytes: int | None = None
    host_bytes: int | None = None
    disk_bytes: int | None = None
    keep: str | None = None
    disk_io: str | None = None
    tiers: tuple[tuple[int, str], ...] | None = None
    refresh: int | None = None
    first: str | None = None
    first_blocks: int | None = None
    important: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a film sets for all shots and a shot may override."""

    model: str = DEFAULT_MODEL
    seed: int = 0
    weights: str | None = None
    codec: str | None = None
    attention: str | None = None
    size: tuple[int, int] | None = None
    fps: int | None = None
    steps: int | None = None
    history: History = History()
    cache: Cache = Cache()


def read_settings(table: Table, defaults: Settings) -> Settings:
    """The settings of ``[film]`` or a shot, over ``defaults``."""
    own: dict[str, Any] = {
        "model": table.text("model", f'"{DEFAULT_MODEL}"'),
        "seed": table.integer("seed", minimum=0, maximum=2**63 - 1, example="7"),
        "weights": table.choice("weights", WEIGHTS),
        "codec": table.text("codec", '"int4"'),
        "attention": table.choice("attention", ATTENTION),
        "size": _read_size(table),
        "fps": table.integer("fps", minimum=1, maximum=240, example="16"),
        "steps": table.integer("steps", minimum=1, maximum=1000, example="4"),
    }
    return dataclasses.replace(
        defaults,
        history=_read_history(table, defaults.history),
        cache=_read_cache(table, defaults.cache),
        **{key: value for key, value in own.items() if value is not None},
    )


def _read_size(table: Table) -> tuple[int, int] | None:
    """``[height, width]`` in pixels, or a name."""
    value = table.raw("size")
    if value is None:
        return None
    if isinstance(value, str):
        if value not in SIZES:
            raise table.error("size", f"{quote(value)} is no size; write [height, width] or one of {', '.join(SIZES)}")
        return SIZES[value]
    if not isinstance(value, list) or len(value) != 2 or any(type(side) is not int for side in value):
        raise table.error("size", f"{quote(value)} is no size; write size = [height, width], like [96, 160]")
    if any(not 16 <= side <= 8192 for side in value):
        raise table.error("size", f"{quote(value)} is out of bounds; height and width lie between 16 and 8192")
    return value[0], value[1]


def _read_history(parent: Table, defaults: History) -> History:
    table = Table(parent.source, (*parent.path, "history"), _HISTORY_KEYS)
    own: dict[str, Any] = {
        "policy": table.choice("policy", POLICIES),
        "sink_blocks": table.integer("sink_blocks", minimum=0, maximum=10**6, example="1"),
        "recent_blocks": table.integer("recent_blocks", minimum=1, maximum=10**6, example="6"),
        "retrieved_blocks": table.integer("retrieved_blocks", minimum=1, maximum=10**6, example="4"),
        "positions": table.choice("positions", POSITIONS),
        "jitter": table.number("jitter", above=None, most=8, example="0.5"),
        "head_jitter": table.number("head_jitter", above=None, most=0.9, example="0.8"),
        "prune": _read_prune(table),
    }
    merged = dataclasses.replace(defaults, **{key: value for key, value in own.items() if value is not None})
    meaningless: dict[str | None, tuple[str, ...]] = {
        "full": ("sink_blocks", "recent_blocks", "retrieved_blocks"),
        "window": ("retrieved_blocks",),
    }
    unused = meaningless.get(merged.policy, ())
    for key in unused:
        if key in table:
            raise table.error(key, f'has no meaning with policy = "{merged.policy}"; remove it or change the policy')
    return dataclasses.replace(merged, **dict.fromkeys(unused))


def _read_prune(history: Table) -> Prune | None:
    """A shot's prune replaces the film's as a whole."""
    if "prune" not in history:
        return None
    table = Table(history.source, (*history.path, "prune"), _PRUNE_KEYS)
    table.required("recent_blocks", "6")
    recent = table.integer("recent_blocks", minimum=1, maximum=10**6, example="6")
    assert recent is not None
    merge = table.raw("merge")
    if merge is not None and (
        not isinstance(merge, list) or len(merge) != 2 or any(type(n) is not int or n < 1 for n in merge)
    ):
        raise table.error("merge", f"{quote(merge)} is no window; write merge = [rows, columns], like [2, 2]")
    return Prune(
        recent_blocks=recent,
        important=table.number("important", above=None, most=1, example="0.1"),
        keep=table.number("keep", above=None, most=1, example="0.3"),
        merge=None if merge is None else (merge[0], merge[1]),
    )


def _read_cache(parent: Table, defaults: Cache) -> Cache:
    table = Table(parent.source, (*parent.path, "cache"), _CACHE_KEYS)
    own: dict[str, Any] = {
        "tiers": _read_tiers(table),
        "refresh": table.integer("refresh", minimum=1, maximum=10**6, example="4"),
        "first": table.text("first", '"bf16"'),
        "first_blocks": table.integer("first_blocks", minimum=1, maximum=10**6, example="1"),
        "keep": table.choice("keep", KEEPS),
        "disk_io": table.choice("disk_io", DISK_IO),
        "important": table.text("important", '"int4"'),
    }
    for key in _BUDGETS:
        text = table.value(key, str, '"6GiB"')
        if text is None:
            continue
        try:
            own[f"{key}_bytes"] = parse_bytes(text.strip())
        except ValueError as error:
            raise table.error(key, str(error)) from error
    merged = dataclasses.replace(defaults, **{key: value for key, value in own.items() if value is not None})
    for key, needed in (("refresh", "tiers"), ("first_blocks", "first")):
        if key in table and not getattr(merged, needed):
            raise table.error(key, f"has no meaning without {needed}; add {needed} or remove it")
    return merged


def _read_tiers(table: Table) -> tuple[tuple[int, str], ...] | None:
    """``{ 2 = "bf16", 6 = "int4" }``: up to that age in blocks, that codec."""
    values = table.value("tiers", dict, '{ 2 = "bf16" }')
    if values is None:
        return None
    tiers = []
    for age, codec in values.items():
        if re.fullmatch("[0-9]{1,6}", age) is None or type(codec) is not str or not codec.strip():
            message = f'{quote({age: codec})} is no tier; write an age in blocks and a codec, like {{ 2 = "bf16" }}'
            raise table.source.error((*table.path, "tiers", age), message)
        tiers.append((int(age), codec.strip()))
    return tuple(sorted(tiers))
