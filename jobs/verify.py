"""``longtake verify DIR``: every checksum of every shot, without changing anything; a render may be going on.

Checked are the journals, every payload of the history, every block of latents, the segments, and that the videos made
from them can be read and have all their frames.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtake.engine.latents import LatentLog
from longtake.engine.segments import SEGMENTS_NAME
from longtake.engine.shotfolder import LATENTS_NAME
from longtake.engine.video import probe
from longtake.jobs.recipe import RECIPE_NAME, read_recipe
from longtake.jobs.status import FILM_NAME, State, read_status
from longtake.kernels.errors import ConfigError, LongtakeError, StorageError
from longtake.offload.journal import replay
from longtake.offload.records import history
from longtake.offload.run import journals, kept_blocks
from longtake.offload.verify import KV_FOLDER
from longtake.offload.verify import verify as verify_history

_PLACE = re.compile(r"layers? (\d+)(?:-(\d+))?, heads? (\d+)(?:-(\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One bad file.

    Args:
        shot: whose it is; None: the film's.
        file: relative to DIR.
        block: of the history for payloads (the blocks that a shot starts from come first), of the shot for latents.
        layers, heads: first and last one concerned, for payloads.
        what: what is wrong with it.
    """

    shot: str | None
    file: str
    what: str
    block: int | None = None
    layers: tuple[int, int] | None = None
    heads: tuple[int, int] | None = None

    def describe(self) -> str:
        """A line for people."""
        place = [f"block {self.block}"] if self.block is not None else []
        place += [f"{name} {_span(span)}" for name, span in (("layer", self.layers), ("head", self.heads)) if span]
        return f"{self.file}: {', '.join(place)}{': ' if place else ''}{self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was read and what is bad, by DIR's shots.

    Args:
        shots: their names.
        num_blocks, num_latents, num_segments: blocks of history, of latents, and segments that were read.
        damages: the list of what is bad.
    """

    shots: tuple[str, ...]
    num_blocks: int
    num_latents: int
    num_segments: int
    damages: tuple[Damage, ...]


def verify(directory: Path) -> Verdict:
    """Read everything that a film's directory holds.

    Raises:
        ConfigError: it is no film's directory.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory}: there is no such directory; name the --out of a render")
    shots = [_Shot(directory, path.name) for path in sorted(directory.iterdir()) if _is_shot(path)]
    if not shots:
        raise ConfigError(f"{directory}: no shot was rendered here; name the --out of a render")
    damages = [damage for shot in shots for damage in shot.damages()]
    missing = list(_missing_shots(directory, {shot.name for shot in shots}))
    lengths = [shot.facts.num_frames for shot in shots if shot.facts is not None]
    is_known = len(lengths) == len(shots) and not missing
    damages += [*missing, *_film_damages(directory, sum(lengths) if is_known else None)]
    return Verdict(
        shots=tuple(shot.name for shot in shots),
        num_blocks=sum(shot.num_blocks for shot in shots),
        num_latents=sum(shot.num_latents for shot in shots),
        num_segments=sum(shot.num_segments for shot in shots),
        damages=tuple(damages),
    )


def to_json(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON-able data."""
    return {"format": 1, "whole": not verdict.damages, **dataclasses.asdict(verdict)}


def _is_shot(path: Path) -> bool:
    return not path.name.startswith(".") and ((path / RECIPE_NAME).exists() or (path / "journal").exists())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What a shot's config.json says that its files are checked against."""

    num_frames: int
    num_heads: int
    temporal_stride: int
    block_frames: int
    continues: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> _Facts:
        model = config["model"]
        return cls(
            num_frames=_count(config["num_frames"]),
            num_heads=_count(model["transformer"]["num_heads"]),
            temporal_stride=_count(model["temporal_stride"]),
            block_frames=_count(model["block_frames"]),
            continues=bool(config.get("after") or config.get("clip")),
        )

    def blocks_of(self, num_frames: int) -> int:
        """Blocks of latents that so many frames of the shot are decoded from; see ShotConfig.num_blocks."""
        first = 0 if self.continues else 1
        latents = first + -(-(num_frames - first) // self.temporal_stride) if num_frames else 0
        return -(-latents // self.block_frames)


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is no count")
    return value


class _Shot:
    """One shot's folder; the counts are of what `damages` read."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory, self.name, self.folder = directory, name, directory / name
        self.num_blocks = self.num_latents = self.num_segments = 0
        self.facts: _Facts | None = None

    def damages(self) -> Iterator[Damage]:
        """All that is bad."""
        for error in self._errors():
            yield _damage(self.directory, self.name, error)

    def _errors(self) -> Iterator[StorageError]:
        yield from self._recipe_errors()
        yield from verify_history(self.folder)
        yield from self._latent_errors((yield from self._journal_errors()))
        yield from self._video_errors()

    def _recipe_errors(self) -> Iterator[StorageError]:
        path = self.folder / RECIPE_NAME
        try:
            recipe = read_recipe(path)
            if recipe is None:
                yield StorageError("the shot's settings are not there; render the shot anew with --fresh", path=path)
            else:
                self.facts = _Facts.of(recipe["config"])
        except (ConfigError, StorageError) as error:
            yield StorageError(str(error.args[0]), path=path)
        except (ValueError, KeyError, TypeError) as error:
            yield StorageError(f"the shot's settings are none ({error!r}); render it anew with --fresh", path=path)

    def _journal_errors(self) -> Generator[StorageError, None, int]:
        """That a finished shot's segments are all listed. Returns the blocks that the listed ones show."""
        if self.facts is None:
            return 0
        try:
            self.num_blocks = kept_blocks(self.folder, self.facts.num_heads)
            records = [history(replay(journal).records) for journal in journals(self.folder).values()]
        except StorageError:
            return 0  # the damage is in the list already
        self.num_segments = sum(len(record.segments) for record in records)
        num_frames = sum(segment.num_frames for record in records for segment in record.segments)
        if num_frames < self.facts.num_frames and any(self._videos()):
            yield StorageError(
                f"it lists segments of {num_frames} frames, and the shot's video of {self.facts.num_frames} is there; "
                "delete that and render again, to go on from what is listed",
                path=self.folder / "journal",
            )
        return self.facts.blocks_of(num_frames)

    def _videos(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.name}.m??"))

    def _latent_errors(self, num_shown: int) -> Iterator[StorageError]:
        """Blocks that are there, and those before them or shown by a segment; a run killed may lack the last few."""
        path = self.folder / LATENTS_NAME
        begun = (path / "zarr.json").exists() or any(path.glob("c.*"))
        if not begun and num_shown <= 0:  # a run killed as it began may leave a bare folder
            return
        try:
            log = LatentLog.existing(path)
        except StorageError as error:
            yield error
            return
        self.num_latents = max(num_shown, log.num_blocks_there)
        yield from log.damages(self.num_latents)

    def _video_errors(self) -> Iterator[StorageError]:
        for path in self._videos():
            yield from _video_errors(path, None if self.facts is None else self.facts.num_frames)


def _missing_shots(directory: Path, there: Collection[str]) -> Iterator[Damage]:
    """Shots that were finished and have no folder; where the status cannot be read, nobody knows of them."""
    with suppress(LongtakeError, OSError):
        for name, entry in read_status(directory).shots.items():
            if entry.state is State.SUCCEEDED and name not in there:
                yield Damage(shot=name, file=name, what="the shot was finished, and its folder is not there")


def _film_damages(directory: Path, num_frames: int | None) -> Iterator[Damage]:
    path = directory / FILM_NAME
    if path.exists():
        for error in _video_errors(path, num_frames):
            yield _damage(directory, None, error)


def _video_errors(path: Path, num_frames: int | None) -> Iterator[StorageError]:
    try:
        found = probe(path).frames
    except StorageError as error:
        yield error
        return
    if num_frames is not None and found != num_frames:
        yield StorageError(f"{found} frames, not {num_frames}", path=path)


def _damage(directory: Path, shot: str | None, error: StorageError) -> Damage:
    path = Path(error.path or directory)
    place = _PLACE.search(str(error.args[0]))
    layers = heads = None
    if place is not None:
        first_layer, last_layer, first_head, last_head = place.groups()
        layers = (int(first_layer), int(last_layer or first_layer))
        heads = (int(first_head), int(last_head or first_head))
    what = str(error.args[0])
    return Damage(
        shot=shot,
        file=str(path.relative_to(directory) if path.is_relative_to(directory) else path),
        what=what[place.end() :].lstrip(": ") if place is not None else what,
        block=error.block,
        layers=layers,
        heads=heads,
    )


def _span(span: tuple[int, int]) -> str:
    first, last = span
    return str(first) if first == last else f"{first}-{last}"


def mends(verdict: Verdict) -> list[str]:
    """What to do about the damage, a line for each kind of it."""
    files = {part for damage in verdict.damages for part in Path(damage.file).parts}
    videos = {damage.file for damage in verdict.damages if Path(damage.file).suffix in (".mp4", ".mov", ".mkv")}
    lines = []
    if SEGMENTS_NAME in files:
        lines.append("a segment: delete the shot's video and render again; segments are made from the latents")
    if LATENTS_NAME in files:
        lines.append("latents: delete the bad file and the shot's video and render again, to go on from that block")
    if KV_FOLDER in files:
        lines.append(
            "history: delete the shot's video and the latents of that block (less those that the shot starts from) "
            "and render again, to go on from there; if no later block reads it, the film is not concerned"
        )
    if any(SEGMENTS_NAME not in Path(video).parts for video in videos):
        lines.append("a video: delete it and render again; it is joined from the segments")
    return lines
