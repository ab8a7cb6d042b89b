"""From a film to what the engine renders: defaults that only the model knows, and the checks that need it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from longtake.engine.config import (
    BeatConfig,
    CacheConfig,
    HistoryConfig,
    HistoryPolicy,
    Keep,
    ModelSpec,
    Positions,
    Precision,
    PruneConfig,
    SamplerConfig,
    ShotConfig,
    Switch,
    TierConfig,
)
from longtake.engine.forms import FormPolicy
from longtake.engine.timeline import Timeline
from longtake.jobs.film import Beat, Film, Shot
from longtake.jobs.film_settings import Cache, Prune, Settings
from longtake.jobs.media import check_length, clip_blocks, read_media, unreadable
from longtake.jobs.source import quote
from longtake.kernels.errors import ConfigError
from longtake.offload.chunkfiles import DiskIO

_RETRIEVED = 4  # blocks, unless the film or the model says

ReadModel: TypeAlias = Callable[[str], ModelSpec]


def resolve(film: Film, read_model: ReadModel) -> dict[str, ShotConfig]:
    """What each shot of a film is, with nothing left to default.

    Args:
        film: the film.
        read_model: reads a model by shipped name or absolute folder; its ConfigError gets the film's line.

    Returns:
        Configurations by shot name, in the order of rendering: each behind the one it starts from.

    Raises:
        ConfigError: unknown model or codec, a size that the model cannot have, shots that cannot follow each other.
    """
    models: dict[str, ModelSpec] = {}
    for shot in film.shots:
        name = shot.settings.model
        if name not in models:
            try:
                models[name] = read_model(_model_name(film, name))
            except ConfigError as error:
                raise film.source.error(film.key(shot, "model"), str(error)) from error
            except (OSError, ValueError, RuntimeError) as error:
                raise unreadable(film, shot, "model", name, "an existing folder", error) from error
    configs: dict[str, ShotConfig] = {}
    for shot in film.render_order():
        before = configs[shot.after] if shot.after is not None else None
        model = _with_precision(models[shot.settings.model], shot.settings.weights)
        configs[shot.name] = _resolve_shot(film, shot, model, before)
    return configs


def _with_precision(model: ModelSpec, precision: str | None) -> ModelSpec:
    if precision is None:
        return model
    return dataclasses.replace(model, weights=dataclasses.replace(model.weights, precision=Precision(precision)))


def _model_name(film: Film, name: str) -> str:
    """A folder is meant from the film's own; a bare word is a name."""
    if "/" not in name and not name.startswith(("~", ".")):
        return name
    return str((Path(film.source.path).parent / Path(name).expanduser()).absolute())


def _resolve_shot(film: Film, shot: Shot, model: ModelSpec, before: ShotConfig | None) -> ShotConfig:
    settings = shot.settings
    height, width = settings.size or (model.height, model.width)
    _check_size(film, shot, model, height, width)
    fps = settings.fps or model.fps
    history = _history(film, shot, model.history)
    config = ShotConfig(
        name=shot.name,
        model=model,
        num_frames=math.ceil(shot.duration_s * fps),
        fps=fps,
        height=height,
        width=width,
        seed=settings.seed,
        beats=(
            BeatConfig(at_s=0.0, prompt=shot.prompt),
            *(_beat(beat, fps, model) for beat in shot.beats),
        ),
        sampler=_sampler(model, settings.steps),
        history=history,
        cache=_cache(settings, model),
        attention=settings.attention or "dense",
        after=shot.after,
        after_blocks=_after_blocks(film, shot, history, before),
        image=read_media(film, shot, "image"),
        clip=read_media(film, shot, "clip"),
        guide=read_media(film, shot, "video"),
        strength=shot.strength or (0.6 if shot.video is not None else 1.0),
    )
    _check_forms(film, shot, config)
    config = _with_basis(film, shot, config)
    if config.clip is not None:
        config = dataclasses.replace(config, after_blocks=clip_blocks(film, shot, config, config.clip))
    try:
        Timeline(config, config.after_blocks)
    except ConfigError as error:
        raise film.source.error(film.key(shot, "name"), str(error)) from error
    if before is not None:
        _check_alike(film, shot, config, before)
    if any(other.after == shot.name for other in film.shots):
        config = dataclasses.replace(config, num_frames=whole_block_frames(config))
    if config.guide is not None:
        check_length(film, shot, config, config.guide)
    return config


def _check_alike(film: Film, shot: Shot, config: ShotConfig, before: ShotConfig) -> None:
    """A shot starts from latents of its own kind."""
    if before.model.name != config.model.name or before.model.path != config.model.path:
        what = "another model"
    elif (before.height, before.width) != (config.height, config.width):
        what = "another size"
    elif before.model != config.model:
        what = "weights of another precision"
    else:
        return
    message = f"{quote(before.name)} has {what}; a shot starts from latents of its own kind"
    raise film.source.error(film.key(shot, "after"), message)


def whole_block_frames(config: ShotConfig) -> int:
    """Frames of a shot's last block included: a shot that another one continues ends on a block's last frame."""
    return config.frames_of_latents(config.num_blocks * config.model.block_frames)


def _on_frame(at_s: Fraction, fps: int) -> float:
    """The time of the first frame at or after a moment, rounded so that times ``fps`` it is not after that frame."""
    frame = math.ceil(at_s * fps)
    seconds = frame / fps
    return seconds if seconds * fps <= frame else math.nextafter(seconds, 0)


def _check_size(film: Film, shot: Shot, model: ModelSpec, height: int, width: int) -> None:
    _, patch_y, patch_x = model.transformer.patch_size
    unit_y, unit_x = patch_y * model.spatial_stride, patch_x * model.spatial_stride
    if height % unit_y or width % unit_x:
        near = [max(1, round(Fraction(side, unit))) * unit for side, unit in ((height, unit_y), (width, unit_x))]
        units = f"{unit_y}" if unit_y == unit_x else f"{unit_y} and {unit_x}"
        message = f"{[height, width]} are no multiples of {units}, as {model.name} needs; write size = {near}"
        raise film.source.error(film.key(shot, "size"), message)


def _history(film: Film, shot: Shot, default: HistoryConfig) -> HistoryConfig:
    wanted = shot.settings.history
    policy = wanted.policy or default.policy
    retrieve = policy == HistoryPolicy.RETRIEVE
    if wanted.retrieved_blocks is not None and not retrieve:
        message = f'needs policy = "retrieve", and the default of {shot.settings.model} is {quote(policy)}'
        raise film.source.error(film.key(shot, "history", "retrieved_blocks"), message)
    full = policy == HistoryPolicy.FULL
    for key, value in (("sink_blocks", wanted.sink_blocks), ("recent_blocks", wanted.recent_blocks)):
        if full and value is not None:
            message = (
                f'has no meaning with policy = "full", the default of {shot.settings.model}; write policy = "window"'
            )
            raise film.source.error(film.key(shot, "history", key), message)
    return HistoryConfig(
        policy=HistoryPolicy(policy),
        sink_blocks=default.sink_blocks if wanted.sink_blocks is None else wanted.sink_blocks,
        recent_blocks=wanted.recent_blocks or default.recent_blocks,
        retrieved_blocks=(wanted.retrieved_blocks or default.retrieved_blocks or _RETRIEVED) if retrieve else 0,
        positions=Positions(wanted.positions or (Positions.BOUNDED if retrieve else default.positions)),
        trained_frames=default.trained_frames,
        jitter=default.jitter if wanted.jitter is None else wanted.jitter,
        head_jitter=default.head_jitter if wanted.head_jitter is None else wanted.head_jitter,
        prune=default.prune if wanted.prune is None else _prune(wanted.prune),
    )


def _prune(prune: Prune) -> PruneConfig:
    given: dict[str, Any] = {"important": prune.important, "keep": prune.keep, "merge": prune.merge}
    return PruneConfig(
        recent_blocks=prune.recent_blocks, **{key: value for key, value in given.items() if value is not None}
    )


def _beat(beat: Beat, fps: int, model: ModelSpec) -> BeatConfig:
    return BeatConfig(
        at_s=_on_frame(beat.at_s, fps),
        prompt=beat.prompt,
        switch=model.switch if beat.switch is None else Switch(beat.switch),
        transition_s=float(beat.transition_s),
    )


def _sampler(model: ModelSpec, steps: int | None) -> SamplerConfig:
    """The model's own steps, or as many evenly spaced ones as asked for."""
    if steps is None:
        return model.sampler
    return dataclasses.replace(model.sampler, timesteps=tuple(1000 * (steps - i) / steps for i in range(steps)))


def _default_codec(model: ModelSpec) -> str:
    """With the model's table a history takes half of what int4 takes, and is as good (docs/codecs.md)."""
    from longtake.engine.basis import BASIS_NAME  # imports torch

    return "pc2" if (model.path / BASIS_NAME).is_file() else "int4"


def _cache(settings: Settings, model: ModelSpec) -> CacheConfig:
    wanted = settings.cache
    given: dict[str, Any] = {
        "codec": settings.codec or _default_codec(model),
        "tiers": tuple(TierConfig(age=age, codec=codec) for age, codec in wanted.tiers or ()),
        "refresh": wanted.refresh,
        "first": wanted.first,
        "first_blocks": wanted.first_blocks,
        "important": wanted.important,
        "device_bytes": wanted.device_bytes,
        "host_bytes": wanted.host_bytes,
        "disk_bytes": wanted.disk_bytes,
        "keep": Keep(wanted.keep) if wanted.keep else None,
        "disk_io": DiskIO(wanted.disk_io) if wanted.disk_io else None,
    }
    return CacheConfig(**{key: value for key, value in given.items() if value is not None})


def _check_forms(film: Film, shot: Shot, config: ShotConfig) -> None:
    """That the policies make sense, and that there are such codecs, which can hold this geometry."""
    from longtake.kernels.codec import BlockGeometry, make_codec  # imports torch
    from longtake.kernels.forms import make_form

    head_dim = config.model.transformer.head_dim
    geometry = BlockGeometry(num_tokens=config.tokens_per_block, head_dim=head_dim, grid=config.grid)
    cache, prune = config.cache, config.history.prune
    named: list[tuple[tuple[str, ...], str | None]] = [(("codec",), cache.codec)]
    named += [(("cache", "tiers", str(tier.age)), tier.codec) for tier in cache.tiers]
    named += [(("cache", "first"), cache.first), (("cache", "important"), cache.important)]
    checks: list[tuple[tuple[str, ...], Callable[[], object]]] = [
        (keys, partial(make_codec, codec, geometry)) for keys, codec in named if codec is not None
    ]
    if prune is not None and prune.merge is not None:
        checks.append((("history", "prune", "merge"), partial(make_form, cache.codec, geometry, prune.merge)))
    place = "tiers" if cache.tiers else "important" if cache.important is not None else "refresh"
    checks.append((("cache", place), partial(FormPolicy, config.history, cache)))
    for keys, check in checks:
        try:
            check()
        except ConfigError as error:
            raise film.source.error(film.key(shot, *keys), str(error)) from error


def _with_basis(film: Film, shot: Shot, config: ShotConfig) -> ShotConfig:
    """The shot with its model's table, if a codec needs that."""
    from longtake.engine.shotcache import with_table  # imports torch

    try:
        return with_table(config)
    except ConfigError as error:
        raise film.source.error(film.key(shot, "codec"), str(error)) from error


def plain_film(film: Film) -> Film:
    """The film with every shot on its own, from its prompts alone, and with a history in bfloat16 of all its tokens."""
    shots = []
    for shot in film.shots:
        history = dataclasses.replace(shot.settings.history, prune=None)
        settings = dataclasses.replace(shot.settings, codec="bf16", attention=None, cache=Cache(), history=history)
        shots.append(
            Shot(name=shot.name, duration_s=shot.duration_s, prompt=shot.prompt, beats=shot.beats, settings=settings)
        )
    return dataclasses.replace(film, shots=tuple(shots))


def _after_blocks(film: Film, shot: Shot, history: HistoryConfig, before: ShotConfig | None) -> int:
    """Blocks of the earlier shot that this one starts from: as asked, else as many as its history policy reads."""
    if before is None:
        return 0
    if shot.after_blocks is None:
        wanted = history.recent_blocks if history.policy is HistoryPolicy.WINDOW else before.num_blocks
        return min(wanted, before.num_blocks)
    if shot.after_blocks > before.num_blocks:
        message = f"{shot.after_blocks} is more than {quote(before.name)} has; write at most {before.num_blocks}"
        raise film.source.error(film.key(shot, "after_blocks"), message)
    return shot.after_blocks
