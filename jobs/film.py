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
from longtake.jobs.film_settings import SETTINGS_KEYS, Settings, read_settings
from longtake.jobs.quantities import format_duration, parse_duration
from longtake.jobs.shotlog import DIRECTOR_LOG
from longtake.jobs.source import Source, Table, nearest, parse_source, quote, read_source
from longtake.jobs.toml_lines import TomlPath

SWITCHES = ("keep", "recache", "flush", "cut")
MAX_DURATION_S = 7 * 24 * 3600
MAX_NAME = 64
MAX_TITLE = 120
_FILM_KEYS = ("title", "cluster", *SETTINGS_KEYS)
_START_KEYS = ("image", "clip", "video")
_SHOT_KEYS = ("name", "duration", "prompt", "beat", "after", "after_blocks", *_START_KEYS, "strength", *SETTINGS_KEYS)
_BEAT_KEYS = ("at", "prompt", "switch", "transition")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # a terminal or a log would act on these
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


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
    settings: Settings = field(default_factory=Settings)


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
    title = table.text("title", '"Harbour"') or Path(source.path).stem[:MAX_TITLE]
    if len(title) > MAX_TITLE or _CONTROL.search(title) is not None:
        message = f'{quote(title)} is no title; write a line of at most {MAX_TITLE} characters, like title = "Harbour"'
        raise table.error("title", message)
    defaults = read_settings(table, Settings())
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
    if f"{name.lower()}.log" == DIRECTOR_LOG:
        raise table.error("name", f'{quote(name)} is what the film\'s own log is called; write another, like "arrival"')
    table.required("duration", '"45s"')
    duration_s = _read_time(table, "duration")
    assert duration_s is not None
    if duration_s > MAX_DURATION_S:
        raise table.error("duration", f"{format_duration(duration_s)} is more than a week; split the shot")
    table.required("prompt", '"pan right slowly"')
    prompt = table.text("prompt", '"pan right slowly"')
    assert prompt is not None
    after = table.text("after", '"arrival"')
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
        settings=read_settings(table, defaults),
    )


def _read_time(table: Table, key: str) -> Fraction | None:
    """A time above zero."""
    text = table.value(key, str, '"12s"')
    if text is None:
        return None
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
