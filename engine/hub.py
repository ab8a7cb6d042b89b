"""``longtake pull``: a preset's files from the hub into the store, whole and checked or not there.

Every file is kept once, under its checksum, so what models share is fetched once; a download that breaks off goes on
where it stopped, also in a later run (huggingface_hub's own cache starts anew). Only what has the checksum that the hub
states gets its name, and the model's folder appears only when everything is there.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from longtake.engine import store
from longtake.engine.presets import PRESETS, TEXT_LEN, HubFiles, Preset
from longtake.kernels.errors import CapacityError, ConfigError, StorageError
from longtake.offload.files import FileOps, fsync_dir
from longtake.offload.lock import FolderLock

MANIFEST_NAME = "pulled.json"
_OPTIONAL = ("model_index.json", "scheduler/*")
_CHUNK_BYTES = 8 << 20
_PARTIAL = ".partial"
# HTTP errors of whichever client huggingface_hub uses, and OSError
_HUB_ERRORS: tuple[type[Exception], ...] = HfHubHTTPError.__bases__


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file as the hub states it.

    Args:
        repo, revision: repository and commit.
        name: path in the repository.
        target: path in the model's folder.
        num_bytes: size.
        sha256: of the content; None for small files kept in git, which ``git_oid`` names.
        git_oid: SHA-1 of the git blob, its content behind "blob SIZE" and a zero byte.
    """

    repo: str
    revision: str
    name: str
    target: str
    num_bytes: int
    sha256: str | None
    git_oid: str

    @property
    def key(self) -> str:
        """The checksum that the hub states."""
        return self.sha256 or self.git_oid


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What a pull will fetch, and the licences under which each repository says it is given."""

    name: str
    files: tuple[RemoteFile, ...]
    licences: tuple[tuple[str, str], ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.num_bytes for file in self.files)


def find_preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PRESETS)}"
        raise ConfigError(f"there is nothing to pull for {name!r}: {hint}")
    return PRESETS[name]


def list_files(name: str, endpoint: str | None = None) -> Listing:
    """Ask the hub what a pull would fetch.

    Args:
        name: of a preset.
        endpoint: of the hub; None: huggingface_hub's own setting, HF_ENDPOINT.

    Raises:
        ConfigError: no such preset.
        StorageError: the hub cannot be asked, or a file is not where the preset says.
    """
    preset = find_preset(name)
    api = HfApi(endpoint=endpoint)
    files: list[RemoteFile] = []
    licences: list[tuple[str, str]] = []
    for wanted in preset.files:
        try:
            info = api.model_info(wanted.repo, revision=wanted.revision, files_metadata=True)
        except _HUB_ERRORS as error:
            raise _explain(error, wanted.repo) from error
        stated = getattr(info.card_data, "license", None) or "not stated: read the model card"
        licences.append((wanted.repo, str(stated)))
        files += _matching(wanted, info)
    return Listing(name=name, files=tuple(files), licences=tuple(licences))


def pull(listing: Listing, progress: Callable[[RemoteFile], None], endpoint: str | None = None) -> Path:
    """Fetch what is not there yet, check it, and make the model's folder.

    Args:
        listing: from :func:`list_files`.
        progress: told before each file.
        endpoint: as there.

    Returns:
        The folder.

    Raises:
        CapacityError: the disk is too small.
        StorageError: a download failed or what came is not what the hub states; run again to go on.
    """
    blobs = store.blobs()
    blobs.mkdir(parents=True, exist_ok=True)
    with closing(FolderLock(blobs / "lock")):
        missing = {file.key: file for file in listing.files if not (blobs / file.key).exists()}
        _check_space(listing.name, missing.values())
        for file in missing.values():
            progress(file)
            _fetch(file, blobs / file.key, endpoint)
        fsync_dir(FileOps(), blobs)
        return _build_folder(listing)


def settings_of(name: str, preset: Preset) -> dict[str, Any]:
    """A preset as the content of longtake.json."""
    sampler, history = preset.sampler, asdict(preset.history)
    return {
        "name": name,
        "timesteps": list(sampler.timesteps),
        "first_timesteps": None if sampler.first_timesteps is None else list(sampler.first_timesteps),
        "shift": sampler.shift,
        "context_timestep": sampler.context_timestep,
        "loop": sampler.loop.value,
        "write_back": sampler.write_back.value,
        "block_frames": preset.block_frames,
        "fps": preset.fps,
        "height": preset.height,
        "width": preset.width,
        "text_len": TEXT_LEN,
        "spatial_stride": preset.spatial_stride,
        "history": history,
        "switch": preset.switch.value,
        "weights": asdict(preset.weights),
    }


def _matching(wanted: HubFiles, info: Any) -> list[RemoteFile]:
    found: list[RemoteFile] = []
    for pattern in wanted.patterns:
        matches = [sibling for sibling in info.siblings if fnmatch.fnmatchcase(sibling.rfilename, pattern)]
        if not matches and pattern not in _OPTIONAL:
            raise StorageError(
                f"{wanted.repo} has no {pattern} at {info.sha}: the repository changed; see docs/models.md"
            )
        for sibling in matches:
            name = sibling.rfilename
            found.append(
                RemoteFile(
                    repo=wanted.repo,
                    revision=info.sha,
                    name=name,
                    target=name if wanted.into is None else f"{wanted.into}/{Path(name).name}",
                    num_bytes=sibling.size or 0,
                    sha256=sibling.lfs.sha256 if sibling.lfs else None,
                    git_oid=sibling.blob_id,
                )
            )
    return found


def _check_space(name: str, missing: Iterable[RemoteFile]) -> None:
    blobs = store.blobs()
    wanted = sum(file.num_bytes for file in missing)
    there = sum(path.stat().st_size for path in blobs.glob(f"*{_PARTIAL}"))
    if wanted - there > (free := shutil.disk_usage(blobs).free):
        raise CapacityError(
            f"{name} takes {wanted - there:,} bytes more and {free:,} are free; make room or set "
            f"{store.HOME_VARIABLE} to a larger disk",
            path=blobs,
        )


def _fetch(file: RemoteFile, blob: Path, endpoint: str | None) -> None:
    """Fetch one file to ``blob``, behind what an earlier run left of it."""
    partial = blob.with_name(blob.name + _PARTIAL)
    url = hf_hub_url(file.repo, file.name, revision=file.revision, endpoint=endpoint)
    try:
        location = get_hf_file_metadata(url, endpoint=endpoint).location
        with partial.open("ab") as content:
            done = content.tell()
            if done > file.num_bytes:
                content.truncate(done := 0)
            if done < file.num_bytes:
                headers = build_hf_headers() if location == url else {}
                http_get(location, content, resume_size=done, headers=headers, expected_size=file.num_bytes)
            content.flush()
            os.fsync(content.fileno())
    except _HUB_ERRORS as error:
        raise _explain(error, file.repo) from error
    if _checksum(file, partial) != file.key:
        partial.unlink()
        raise StorageError(f"{file.repo}/{file.name} came damaged and was removed: run the same command again")
    partial.replace(blob)


def _checksum(file: RemoteFile, path: Path) -> str:
    git_header = f"blob {path.stat().st_size}\0".encode()
    digest = hashlib.sha256() if file.sha256 is not None else hashlib.sha1(git_header)
    with path.open("rb") as content:
        while chunk := content.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _build_folder(listing: Listing) -> Path:
    preset, folder = PRESETS[listing.name], store.model_folder(listing.name)
    partial = folder.with_name(folder.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    for file in listing.files:
        target = partial / file.target
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.path.relpath(store.blobs() / file.key, target.parent))
    config = partial / "transformer" / "config.json"
    if not config.exists():
        config.write_text(json.dumps(preset.transformer.to_hub(), indent=1) + "\n")
    (partial / "longtake.json").write_text(json.dumps(settings_of(listing.name, preset), indent=1) + "\n")
    (partial / MANIFEST_NAME).write_text(json.dumps(asdict(listing), indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def _explain(error: Exception, repo: str) -> StorageError:
    """What a failure of the hub means to a user."""
    if isinstance(error, GatedRepoError):
        return StorageError(f"{repo} is gated: accept its terms on its page, run  hf auth login,  then pull again")
    if isinstance(error, RepositoryNotFoundError):
        return StorageError(f"the hub has no {repo}, or hides it: see docs/models.md")
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return StorageError(f"{repo} could not be fetched: {reason}; run the same command again, it goes on")
