"""Settings of a shot that exclude each other, seen before anything is rendered."""

from __future__ import annotations

from longtake.engine.config import HistoryPolicy, Loop, Positions, ShotConfig, Switch, WriteBack
from longtake.engine.forms import FormPolicy
from longtake.kernels.errors import ConfigError


def check_settings(shot: ShotConfig) -> None:
    """Refuse settings that exclude each other.

    Raises:
        ConfigError: one line that names the shot and the mend.
    """
    window = shot.history.policy is HistoryPolicy.WINDOW
    rolling, rebuild = shot.sampler.loop is Loop.ROLLING, shot.sampler.write_back is WriteBack.REBUILD
    if rebuild and (not window or shot.history.sink_blocks):
        raise ConfigError(
            f"shot {shot.name!r}: {shot.model.name} rebuilds its history from the last blocks, it needs "
            'policy = "window" and sink_blocks = 0'
        )
    if rebuild and rolling:
        raise ConfigError(f"shot {shot.name!r}: a rolling window cannot rebuild its history; choose one")
    if rolling and not window:
        raise ConfigError(f'shot {shot.name!r}: a rolling window needs policy = "window"')
    if rolling and (shot.begins_with_picture or shot.guide is not None):
        raise ConfigError(f"shot {shot.name!r}: a rolling window starts from noise, not from a picture or a video")
    retrieve = shot.history.policy is HistoryPolicy.RETRIEVE
    if retrieve and shot.history.positions is Positions.ABSOLUTE:
        raise ConfigError(
            f'shot {shot.name!r}: with policy = "retrieve" old blocks must come near, which positions = "absolute" '
            'does not let them; use "bounded" or "relative"'
        )
    if retrieve != bool(shot.history.retrieved_blocks):
        raise ConfigError(f'shot {shot.name!r}: retrieved_blocks goes with policy = "retrieve", from 1 block on')
    if retrieve and not FormPolicy(shot.history, shot.cache).plain:
        raise ConfigError(
            f'shot {shot.name!r}: what policy = "retrieve" reads is not known before, as tiers, first and prune '
            'need it to be; use policy = "window" or "full" with them'
        )
    for beat in shot.beats[1:]:
        if beat.switch is Switch.RECACHE and (rolling or rebuild):
            raise ConfigError(
                f"shot {shot.name!r}: {shot.model.name} cannot recache at {beat.at_s:g}s; use keep, flush or cut"
            )
