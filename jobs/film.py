"""A film: the TOML that a studio writes, read into frozen data. Every mistake is one line: file, line, key, mend.

Film-level settings are defaults; a shot that names the same key overrides it. ``None`` means "as the model says": what
a model prefers is known only when its folder is read, see `longtake.jobs.resolve`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from longtake.jobs.film_cluster import ClusterSettings, read_cluster
from longtake.jobs.quantities import format_duration, parse_bytes, parse_duration
from longtake.jobs.source import Source, Table, nearest, parse_source, quote, read_source
from longtake.jobs.toml_lines import TomlPath

POLICIES = ("full", "window", "retrieve")
POSITIONS = ("absolute", "relative", "sink", "bounded")
WEIGHTS = ("model", "fp8")
ATTENTION = ("dense", "fp8", "fp8-bf16v")
SWITCHES = ("keep", "recache", "flush", "cut")
SIZES = {"480p": (480, 832), "720p": (720, 1280)}
DEFAULT_MODEL = "mini"
DEFAULT_CODEC = "int4"  # on mini 0.2 dB below bf16 where a view returns; docs/codecs.md
MAX_DURATION_S = 7 * 24 * 3600
MAX_NAME = 64

_SHARED_KEYS = ("model", "weights", "codec", "attention", "size", "fps", "seed", "steps", "history", "cache")
_FILM_KEYS = ("title", "cluster", *_SHARED_KEYS)
_START_KEYS = ("image", "clip", "video")
_SHOT_KEYS = ("name", "duration", "prompt", "beat", "after", "after_blocks", *_START_KEYS, "strength", *_SHARED_KEYS)
_BEAT_KEYS = ("at", "prompt", "switch", "transition")
_HISTORY_KEYS = ("policy", "sink_blocks", "recent_blocks", "retrieved_blocks", "positions", "jitter", "prune")
_PRUNE_KEYS = ("recent_blocks", "important", "keep", "merge")
_BUDGETS = ("device", "host", "disk")
KEEPS = ("all", "needed")
DISK_IO = ("auto", "system", "deepnvme")
_CACHE_KEYS = (*_BUDGETS, "keep", "disk_io", "tiers", "refresh", "first", "first_blocks", "important")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


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
    codec: str = DEFAULT_CODEC
    attention: str | None = None
    size: tuple[int, int] | None = None
    fps: int | None = None
    steps: int | None = None
    history: History = History()
    cache: Cache = Cache()


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """The prompt from a moment of its shot on; ``switch`` says what becomes of the history."""

    at_s: Fraction
    prompt: str
    switch: str | None = None
    transition_s: Fraction = Fraction(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """One rollout; ``settings`` has the film's defaults filled in. Files are as the film names them."""

    name: str
    duration_s: Fraction
    prompt: str
    beats: tuple[Beat, ...] = ()
    after: str | None = None
    after_blocks: int | None = None
    image: str | None = None
    clip: str | None = None
    video: str | None = None
    strength: float | None = None
    settings: Settings = Settings()


@dataclass(frozen=True, slots=True, kw_only=True)
class Film:
    """A whole film, checked as far as it can be without its models."""

    title: str
    shots: tuple[Shot, ...]
    source: Source = field(repr=False, compare=False)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)

    def shot(self, name: str) -> Shot:
        """The shot of that name.

        Raises:
            ConfigError: there is none.
        """
        for shot in self.shots:
            if shot.name == name:
                return shot
        names = [shot.name for shot in self.shots]
        raise self.source.error(("shot",), f"there is no shot {quote(name)}; {nearest(name, names)}")

    def render_order(self) -> tuple[Shot, ...]:
        """Shots in the film's order, but each one behind the shot it starts from."""
        ordered: dict[str, Shot] = {}
        for shot in self.shots:
            chain = [shot]
            while chain[-1].after is not None and chain[-1].after not in ordered:
                chain.append(self.shot(chain[-1].after))
            ordered.update((link.name, link) for link in reversed(chain) if link.name not in ordered)
        return tuple(ordered.values())

    def key(self, shot: Shot, *keys: str) -> TomlPath:
        """Where a shot's setting stands in the file: in the shot, else in ``[film]``, else at the shot itself."""
        own: TomlPath = ("shot", self.shots.index(shot), *keys)
        inherited: TomlPath = ("film", *keys)
        return inherited if own not in self.source.lines and inherited in self.source.lines else own

    def to_json(self) -> dict[str, Any]:
        """The film with all defaults filled in, as JSON-able data; times are seconds."""
        data: dict[str, Any] = json.loads(
            json.dumps(
                {"title": self.title, "shots": [dataclasses.asdict(shot) for shot in self.shots]},
                default=lambda value: float(value),
            )
        )
        return data

    @property
    def content_hash(self) -> str:
        """Hash (hex, 32 characters) of what the film says: layout, comments and the file's name don't count."""
        text = json.dumps(self.to_json(), sort_keys=True, ensure_ascii=False)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def load_film(path: str | Path) -> Film:
    """Read a film.

    Raises:
        ConfigError: one line that names the file, the line, the key and the mend.
    """
    return _read_film(read_source(path))


def parse_film(text: str, path: str = "film.toml") -> Film:
    """Read a film from its text; ``path`` is what errors call it.

    Raises:
        ConfigError: as `load_film`.
    """
    return _read_film(parse_source(text, path))


def _read_film(source: Source) -> Film:
    root = Table(source, (), ("film", "shot"))
    table = Table(source, ("film",), _FILM_KEYS)
    title = table.text("title", '"Harbour"') or Path(source.path).stem
    defaults = _read_settings(table, Settings())
    num_shots = root.num_tables("shot")
    if num_shots == 0:
        raise source.error((), 'no shots; add [[shot]] with name = "arrival", duration = "45s" and prompt = "..."')
    shots: list[Shot] = []
    for index in range(num_shots):
        shot = _read_shot(Table(source, ("shot", index), _SHOT_KEYS), defaults)
        for other, earlier in enumerate(shots):
            if earlier.name.lower() == shot.name.lower():
                line = source.lines["shot", other, "name"]
                message = f"{quote(shot.name)} names a shot already (line {line}); names differ in more than case"
                raise source.error(("shot", index, "name"), message)
        shots.append(shot)
    film = Film(title=title, shots=tuple(shots), source=source, cluster=read_cluster(source))
    _check_after(film)
    return film


def _read_shot(table: Table, defaults: Settings) -> Shot:
    table.required("name", '"arrival"')
    name = table.value("name", str, '"arrival"')
    assert name is not None
    if _NAME.fullmatch(name) is None or len(name) > MAX_NAME:
        mend = re.sub(r"[^A-Za-z0-9_-]+", "-", name).lstrip("-")[:MAX_NAME].rstrip("-") or "arrival"
        allowed = f"letters, digits, '-' and '_', at most {MAX_NAME}, not '-' first"
        raise table.error(
            "name", f"{quote(name)} has other characters than allowed ({allowed}); write name = {quote(mend)}"
        )
    table.required("duration", '"45s"')
    duration_s = _read_time(table, "duration")
    assert duration_s is not None
    if duration_s > MAX_DURATION_S:
        raise table.error("duration", f"{format_duration(duration_s)} is more than a week; split the shot")
    table.required("prompt", '"pan right slowly"')
    prompt = table.text("prompt", '"pan right slowly"')
    assert prompt is not None
    after = table.value("after", str, '"arrival"')
    after_blocks = table.integer("after_blocks", minimum=0, maximum=10**6, example="3")
    starts = {key: table.text(key, f'"{key}.mp4"') for key in _START_KEYS}
    if after_blocks is not None and after is None and starts["clip"] is None:
        raise table.error("after_blocks", 'has no meaning without after or clip; add after = "..." or remove it')
    if after_blocks == 0 and starts["clip"] is not None:
        raise table.error("after_blocks", "0 leaves nothing of the clip; write at least 1, or image for a picture")
    given = [key for key in ("after", *_START_KEYS) if key in table]
    if len(given) > 1:
        raise table.error(given[1], f"a shot starts from one thing, and there is {given[0]} already; remove one")
    strength = table.number("strength", above=0, most=1, example="0.6")
    if strength is not None and starts["video"] is None:
        raise table.error("strength", 'has no meaning without video; add video = "..." or remove it')
    return Shot(
        name=name,
        duration_s=duration_s,
        prompt=prompt,
        beats=_read_beats(table, duration_s),
        after=after,
        after_blocks=after_blocks,
        strength=strength,
        **starts,
        settings=_read_settings(table, defaults),
    )


def _read_time(table: Table, key: str) -> Fraction | None:
    """A time above zero."""
    text = table.value(key, str, '"12s"')
    if text is None:
        return None
    if text.strip().startswith("-"):
        raise table.error(key, f'{quote(text)} is negative; write {key} = "{text.strip().lstrip("-")}"')
    try:
        seconds = parse_duration(text.strip())
    except ValueError as error:
        raise table.error(key, str(error)) from error
    if seconds == 0:
        raise table.error(key, f'{quote(text)} is zero; write a time above it, like {key} = "12s"')
    return seconds


def _read_beats(shot: Table, duration_s: Fraction) -> tuple[Beat, ...]:
    beats: list[Beat] = []
    for index in range(shot.num_tables("beat")):
        table = Table(shot.source, (*shot.path, "beat", index), _BEAT_KEYS)
        table.required("at", '"12s"')
        table.required("prompt", '"a red boat enters from the left"')
        at_s = _read_time(table, "at")
        prompt = table.text("prompt", '"a red boat enters from the left"')
        assert at_s is not None and prompt is not None
        if at_s >= duration_s:
            end = format_duration(duration_s)
            raise table.error("at", f"{quote(table.raw('at'))} is not before the shot's end ({end}); lengthen the shot")
        if beats and at_s <= beats[-1].at_s:
            before = format_duration(beats[-1].at_s)
            raise table.error(
                "at", f"{quote(table.raw('at'))} is not after the beat before it ({before}); order them by time"
            )
        switch = table.choice("switch", SWITCHES)
        transition_s = _read_time(table, "transition") or Fraction(0)
        beats.append(Beat(at_s=at_s, prompt=prompt, switch=switch, transition_s=transition_s))
    return tuple(beats)


def _read_settings(table: Table, defaults: Settings) -> Settings:
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
        if not age.isdecimal() or len(age) > 6 or type(codec) is not str or not codec.strip():
            message = f'{quote({age: codec})} is no tier; write an age in blocks and a codec, like {{ 2 = "bf16" }}'
            raise table.source.error((*table.path, "tiers", age), message)
        tiers.append((int(age), codec.strip()))
    return tuple(sorted(tiers))


def _check_after(film: Film) -> None:
    """Every ``after`` names another shot, and following them comes to an end."""
    by_name = {shot.name: shot for shot in film.shots}
    for shot in film.shots:
        if shot.after is not None and shot.after not in by_name:
            mend = (
                nearest(shot.after, [name for name in by_name if name != shot.name])
                if len(by_name) > 1
                else "remove it"
            )
            raise film.source.error(film.key(shot, "after"), f"there is no shot {quote(shot.after)}; {mend}")
    for shot in film.shots:
        chain = [shot.name]
        while (after := by_name[chain[-1]].after) is not None and after not in chain:
            chain.append(after)
        if after == shot.name:
            loop = " -> ".join(reversed([*chain, after]))
            raise film.source.error(
                film.key(shot, "after"), f"the shots wait for each other ({loop}); remove one after"
            )
