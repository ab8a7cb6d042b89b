"""The pictures and videos that a film names: files of its own folder, opened before anything is rendered."""

from __future__ import annotations

import hashlib
from pathlib import Path

from longtake.engine.config import HistoryPolicy, MediaConfig, ShotConfig
from longtake.jobs.film import Film, Shot
from longtake.jobs.source import quote
from longtake.kernels.errors import ConfigError, StorageError


def read_media(film: Film, shot: Shot, key: str) -> MediaConfig | None:
    """A file that a shot starts from, and the hash of its content.

    A film can be anyone's: what it names is shown in a video, so it must lie in the film's folder or below, wherever
    links lead.

    Args:
        key: image, clip or video.

    Raises:
        ConfigError: with the film's line: no such file, outside the folder, or no picture and no video.
    """
    from longtake.engine.footage import read_frames  # imports PyAV

    name = getattr(shot, key)
    if name is None:
        return None
    folder = Path(film.source.path).parent.absolute()
    try:
        path = folder / Path(name).expanduser()
        real = path.resolve(strict=True)
        if not real.is_relative_to(folder.resolve()):
            message = f"{quote(name)} is not in the film's folder; copy it there"
            raise film.source.error(film.key(shot, key), message)
        if not real.is_file():
            message = f"{quote(name)} is no file; name a picture or a video"
            raise film.source.error(film.key(shot, key), message)
        with path.open("rb") as file:
            found = MediaConfig(path=path, sha256=hashlib.file_digest(file, "sha256").hexdigest())
        if next(read_frames(path), None) is None:
            raise StorageError("no frame in it can be decoded")
    except StorageError as error:
        raise _not_shown(film, shot, key, error) from error
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise unreadable(film, shot, key, name, "an existing file", error) from error
    return found


def unreadable(film: Film, shot: Shot, key: str, name: str, mend: str, error: Exception) -> ConfigError:
    """What to say of a path that is none: too long, with a NUL, of a user that is not there."""
    reason = getattr(error, "strerror", None) or str(error)
    message = f"{quote(name)} cannot be read ({reason}); name {mend}"
    return film.source.error(film.key(shot, key), message)


def _not_shown(film: Film, shot: Shot, key: str, error: StorageError) -> ConfigError:
    reason = getattr(error.__cause__, "strerror", None) or error.args[0]
    message = f"{quote(getattr(shot, key))} is no picture or video that can be read ({reason})"
    return film.source.error(film.key(shot, key), message)


def clip_blocks(film: Film, shot: Shot, config: ShotConfig, clip: MediaConfig) -> int:
    """Blocks of history that a shot's clip makes: as asked, else as many as the window reads, if it is as long.

    Raises:
        ConfigError: it is too short.
    """
    frames = _num_frames(film, shot, "clip", clip)
    latents = 1 + (frames - 1) // config.model.temporal_stride
    there = latents // config.model.block_frames
    if there == 0:
        need = 1 + (config.model.block_frames - 1) * config.model.temporal_stride
        raise film.source.error(film.key(shot, "clip"), f"has {frames} frames; a block of history takes {need}")
    if shot.after_blocks is not None and shot.after_blocks > there:
        message = f"{shot.after_blocks} is more than the clip has; write at most {there}"
        raise film.source.error(film.key(shot, "after_blocks"), message)
    window = config.history.policy is HistoryPolicy.WINDOW
    return shot.after_blocks or (min(there, config.history.recent_blocks) if window else there)


def check_length(film: Film, shot: Shot, config: ShotConfig, guide: MediaConfig) -> None:
    """That the video which a shot follows is as long as the shot.

    Raises:
        ConfigError: it is not.
    """
    frames = _num_frames(film, shot, "video", guide)
    if frames < config.num_frames:
        message = f"has {frames} frames, and the shot {config.num_frames} ({config.fps} a second); shorten the shot"
        raise film.source.error(film.key(shot, "video"), message)


def _num_frames(film: Film, shot: Shot, key: str, media: MediaConfig) -> int:
    from longtake.engine.footage import count_frames

    try:
        return count_frames(media.path)
    except StorageError as error:
        raise _not_shown(film, shot, key, error) from error
