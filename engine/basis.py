"""The table that comes with a model and turns its heads for the codecs `pc2` to `pc4`: file, identity, bytes.

    history_basis.safetensors   in the model's folder: "turn", bfloat16 [L, H, 2 D, 2 D]

`longtake calibrate` makes it (engine/calibrate.py). A shot's configuration has its hash, so that a history that was
encoded with one table is not read with another.

Shape legend: L layers, H heads, D head dim, E = 2 D.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from longtake.engine.config import ModelConfig, ModelSpec
from longtake.kernels.errors import ConfigError
from longtake.kernels.principal import BYTES_AN_ENTRY, HistoryBasis

BASIS_NAME = "history_basis.safetensors"
_TENSOR = "turn"


def basis_bytes(model: ModelConfig) -> int:
    """Device bytes of the matrices of all heads."""
    return model.num_layers * model.num_heads * (2 * model.head_dim) ** 2 * BYTES_AN_ENTRY


def basis_hash(folder: Path) -> str:
    """Content hash (hex, 16 characters) of the table in a model's folder.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = folder / BASIS_NAME
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except FileNotFoundError as error:
        raise ConfigError(
            f"the codecs pc2, pc3 and pc4 need {path}, which is not there; to make it run  longtake calibrate FILM.toml"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def read_basis(spec: ModelSpec, heads: range, device: torch.device, expected: str | None = None) -> HistoryBasis:
    """The table of a model, for the heads that are kept here.

    Args:
        spec: the model.
        heads: of the model.
        device: where the matrices go.
        expected: the table's hash, if it is known.

    Raises:
        ConfigError: there is none, it is of another model, or has another hash.
    """
    path, model = spec.path / BASIS_NAME, spec.transformer
    found = basis_hash(spec.path)
    if expected not in (None, found):
        raise ConfigError(f"{path} is not the table that this film goes with: its hash is {found}, not {expected}")
    try:
        with safe_open(path, framework="pt") as file:
            turn_LHEE = file.get_tensor(_TENSOR)
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged ({error}); to make it anew run  longtake calibrate FILM.toml") from error
    shape = (model.num_layers, model.num_heads, 2 * model.head_dim, 2 * model.head_dim)
    if turn_LHEE.shape != shape or turn_LHEE.dtype != torch.bfloat16:
        raise ConfigError(f"{path} is of another model: {tuple(turn_LHEE.shape)} instead of {shape}")
    return HistoryBasis(turn_LHEE[:, heads.start : heads.stop].to(device))


def write_basis(turn_LHEE: Tensor, path: Path) -> None:
    """Write a table; what was there before stays whole until the new one is.

    Args:
        turn_LHEE: bfloat16 [L, H, E, E].
        path: the file.

    Raises:
        ConfigError: it cannot be written.
    """
    beside = path.with_suffix(".partial")
    try:
        beside.write_bytes(save({_TENSOR: turn_LHEE.cpu().contiguous()}))
        beside.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); name another file with --out") from error
