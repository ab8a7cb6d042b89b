"""What a shot keeps of its history: forms, sizes, folders, and the cache over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from longtake.engine.basis import read_table
from longtake.engine.config import HistoryPolicy, Keep, ShotConfig
from longtake.engine.essence import fingerprint
from longtake.engine.forms import FormPolicy
from longtake.engine.gang import Gang
from longtake.engine.timeline import Timeline
from longtake.kernels.codec import BlockGeometry
from longtake.kernels.errors import CapacityError
from longtake.kernels.forms import Form, make_form
from longtake.kernels.principal import HistoryBasis
from longtake.offload.cache import CacheBudget, KVCache
from longtake.offload.forms import FormCache, make_form_cache, open_runs
from longtake.offload.run import RunDirectory
from longtake.offload.shape import ModelKVShape


def shot_forms(shot: ShotConfig, basis: HistoryBasis | None = None) -> tuple[Form, ...]:
    """The forms in which a shot's history is kept; the first has every block.

    Args:
        shot: what is rendered.
        basis: for codecs that want one; None: the forms have sizes and names, and are not to encode.

    Raises:
        ConfigError: there is no such codec, or it cannot hold this geometry.
    """
    head_dim = shot.model.transformer.head_dim
    geometry = BlockGeometry(num_tokens=shot.tokens_per_block, head_dim=head_dim, grid=shot.grid)
    specs = FormPolicy(shot.history, shot.cache).specs
    rates = () if shot.history_basis is None else shot.history_basis.quarters
    return tuple(make_form(spec.codec, geometry, spec.window, basis, rates) for spec in specs)


def with_table(shot: ShotConfig) -> ShotConfig:
    """The shot with its model's table, if a codec needs that.

    Raises:
        ConfigError: as read_table.
    """
    return dataclasses.replace(shot, history_basis=read_table(shot.model) if wants_basis(shot) else None)


def wants_basis(shot: ShotConfig) -> bool:
    """Whether a codec of the shot turns heads by the model's table."""
    return any(form.codec.wants_basis for form in shot_forms(shot))


def kv_shape(shot: ShotConfig, heads: range | None = None, form: int = 0) -> ModelKVShape:
    """What is kept of each block of a shot in a form; ``heads`` of the model, all by default."""
    model = shot.model.transformer
    own = range(model.num_heads) if heads is None else heads
    return ModelKVShape(
        num_layers=model.num_layers,
        num_heads=len(own),
        codec=shot_forms(shot)[form].codec,
        first_head=own.start,
        total_heads=model.num_heads,
    )


def open_folders(
    shot: ShotConfig,
    path: Path,
    gang: Gang,
    heads: range | None,
    timeline: Timeline,
    agree: Callable[[int], int],
) -> tuple[RunDirectory, ...]:
    """A shot's folder as this rank holds it, one run directory a form; errors as ``open_runs``.

    Args:
        agree: the entries that the gang goes on from, given those that this rank finds.
    """
    forms = range(len(timeline.forms.specs))
    return open_runs(
        path,
        shapes=[kv_shape(shot, heads, form) for form in forms],
        names=[form.name for form in shot_forms(shot)],
        kept=[timeline.kept(form) for form in forms],
        total=timeline.num_entries,
        config_hash=fingerprint(shot),
        rank=gang.rank,
        num_ranks=gang.size,
        agree=agree,
        meet=gang.minimum,
        reads=timeline.needed_later,
        disk_io=shot.cache.disk_io,
    )


def cache_budgets(
    shot: ShotConfig, timeline: Timeline, heads: range | None = None, *, disk: bool = True
) -> list[CacheBudget]:
    """What the cache of each form may take; arguments as for `open_cache`, ``disk``: whether there is that tier."""
    forms = range(len(timeline.forms.specs))
    shapes = [kv_shape(shot, heads, form) for form in forms]
    kept = [len(timeline.kept(form)) for form in forms]
    held = [timeline.max_held_in(form) for form in forms]
    if not disk and shot.cache.host_bytes is None:
        held[0] = max(held[0], timeline.max_kept)
    arenas = [(blocks + 1) * shape.block_bytes for blocks, shape in zip(held, shapes, strict=True)]
    histories = [blocks * shape.block_bytes for blocks, shape in zip(kept, shapes, strict=True)]
    ours, all_heads = shapes[0].num_heads, shapes[0].model_heads

    def share(num_bytes: int | None, form: int, wanted: Sequence[int]) -> int | None:
        return None if num_bytes is None else num_bytes * wanted[form] // sum(wanted)

    def own_part(num_bytes: int | None) -> int | None:
        return None if num_bytes is None else num_bytes * ours // all_heads

    return [
        CacheBudget(
            device_bytes=share(shot.cache.device_bytes, form, arenas),
            num_blocks=held[form],
            host_bytes=own_part(share(shot.cache.host_bytes, form, histories)),
            disk_bytes=own_part(share(shot.cache.disk_bytes, form, histories)),
            total_blocks=kept[form],
        )
        for form in forms
    ]


def open_cache(
    shot: ShotConfig,
    device: torch.device,
    num_prefix: int = 0,
    runs: Sequence[RunDirectory] = (),
    heads: range | None = None,
) -> KVCache | FormCache:
    """A cache that fits a shot.

    Args:
        shot: with its budgets; the device's is of each process, the host's and the disk's are shared by all heads. Of
            several forms each gets a share by what it would hold without a budget.
        device: of the rollout.
        num_prefix: blocks that the shot starts from.
        runs: the disk tier, one a form; none: the history lives and dies with the process.
        heads: of the model that this process keeps; None: all.

    Raises:
        CapacityError: a budget is too small for the history that the shot attends, or must keep to bring it back.
    """
    timeline = Timeline(shot, num_prefix)
    budgets = cache_budgets(shot, timeline, heads, disk=bool(runs))
    if shot.history.policy is HistoryPolicy.RETRIEVE:
        check_room(shot, timeline, kv_shape(shot, heads), budgets[0], disk=bool(runs))

    def make(form: int) -> KVCache:
        run = runs[form] if runs else None
        return KVCache(shape=kv_shape(shot, heads, form), device=device, budget=budgets[form], run=run)

    if len(budgets) == 1:
        return make(0)
    names = [form.name for form in shot_forms(shot)]
    kept = [timeline.kept(form) for form in range(len(budgets))]
    return make_form_cache(make, names=names, kept=kept, total=timeline.num_entries)


def check_room(shot: ShotConfig, timeline: Timeline, shape: ModelKVShape, budget: CacheBudget, *, disk: bool) -> None:
    """That the lowest tier keeps the whole history, any block of which may be brought back.

    Raises:
        CapacityError: it does not; names the bytes that do.
    """
    needed = timeline.num_entries if disk and shot.cache.keep is Keep.ALL else timeline.max_kept + 1
    if disk:
        tier, fitting = "disk", needed if budget.disk_bytes is None else budget.disk_bytes // shape.block_bytes
    elif budget.host_bytes is not None:
        tier, fitting = "host", budget.num_host_frames(shape, disk=False)
    else:
        tier, fitting = "device", budget.num_frames(shape)
    if fitting < needed:
        raise CapacityError(
            f'shot {shot.name!r}: with policy = "retrieve" any of {needed} blocks may be read again, and a {tier} '
            f"budget that holds {fitting} is all there is to keep them; give the {tier} "
            f"{needed * shape.block_bytes:,} bytes for the {shape.num_heads} heads kept here"
        )
