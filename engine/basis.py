"""The table that comes with a model and turns its heads for the codecs `pc2` to `pc4`: file, identity, bytes.

    history_basis.safetensors   in the model's folder: "turn", bfloat16 [L, H, 2 D, 2 D]
                                                       "quarters", uint8 [3, L], of a bit an element: pc2, pc3, pc4

`longtake calibrate` makes it (engine/calibrate.py). A shot's configuration has its hash, so that a history that was
encoded with one table is not read with another, and the rates, for sizes are asked where there is no file.

Shape legend: L layers, H heads, D head dim, E = 2 D.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from longtake.engine.config import HistoryTable, ModelConfig, ModelSpec
from longtake.kernels.codec import Rates
from longtake.kernels.errors import ConfigError
from longtake.kernels.principal import BITS, BYTES_AN_ENTRY, LEAST_QUARTERS, MOST_QUARTERS, HistoryBasis

BASIS_NAME = "history_basis.safetensors"
_TURN, _QUARTERS = "turn", "quarters"
_AGAIN = "to make it anew run  longtake calibrate FILM.toml"


def basis_bytes(model: ModelConfig) -> int:
    """Device bytes of the matrices of all heads."""
    return model.num_layers * model.num_heads * (2 * model.head_dim) ** 2 * BYTES_AN_ENTRY


def read_table(spec: ModelSpec) -> HistoryTable:
    """Which table a model has: hash (hex, 16 characters) of the file in its folder, and rates.

    Raises:
        ConfigError: there is none, it cannot be read, or it is of another model or an earlier longtake.
    """
    path, model = spec.path / BASIS_NAME, spec.transformer
    try:
        state = path.stat()
        content_hash = _content_hash(path, state.st_mtime_ns, state.st_size)
    except FileNotFoundError as error:
        raise ConfigError(
            f"the codecs pc2, pc3 and pc4 need {path}, which is not there; to make it run  longtake calibrate FILM.toml"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    try:
        with safe_open(path, framework="pt") as file:
            turn, has_rates = file.get_slice(_TURN), _QUARTERS in file.keys()  # noqa: SIM118, no dict
            found_shape, found_type = tuple(turn.get_shape()), turn.get_dtype()
            quarters_CL = file.get_tensor(_QUARTERS) if has_rates else None
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged ({error}); {_AGAIN}") from error
    shape = (model.num_layers, model.num_heads, 2 * model.head_dim, 2 * model.head_dim)
    if found_shape != shape or found_type != "BF16":
        raise ConfigError(f"{path} is of another model: {found_shape} instead of {shape}; {_AGAIN}")
    if quarters_CL is None:
        raise ConfigError(f"{path} is of an earlier longtake: it has no rates by layer; {_AGAIN}")
    lie_within = quarters_CL.dtype == torch.uint8 and quarters_CL.shape == (len(BITS), model.num_layers)
    if not lie_within or not ((quarters_CL >= LEAST_QUARTERS) & (quarters_CL <= MOST_QUARTERS)).all():
        raise ConfigError(f"{path} is damaged: its rates are none; {_AGAIN}")
    return HistoryTable(hash=content_hash, quarters=tuple(tuple(row) for row in quarters_CL.tolist()))


@cache
def _content_hash(path: Path, mtime_ns: int, size: int) -> str:
    """Of a file as it was last written: a film of many shots asks for each, and a table of 14B is 210 MB."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def read_basis(
    spec: ModelSpec, heads: range, device: torch.device, expected: HistoryTable | None = None
) -> HistoryBasis:
    """The table of a model, for the heads that are kept here.

    Args:
        spec: the model.
        heads: of the model.
        device: where the matrices go.
        expected: which it is to be, if that is known.

    Raises:
        ConfigError: there is none, it is of another model, or not the one that is expected.
    """
    path, found = spec.path / BASIS_NAME, read_table(spec)
    if expected not in (None, found):
        known = "" if expected is None else expected.hash
        raise ConfigError(f"{path} is not the table that this film goes with: its hash is {found.hash}, not {known}")
    try:
        with safe_open(path, framework="pt") as file:
            turn_LHEE = file.get_tensor(_TURN)
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged ({error}); {_AGAIN}") from error
    return HistoryBasis(turn_LHEE[:, heads.start : heads.stop].to(device))


def write_basis(turn_LHEE: Tensor, rates: Rates, path: Path) -> None:
    """Write a table; what was there before stays whole until the new one is.

    Args:
        turn_LHEE: bfloat16 [L, H, E, E].
        rates: quarters of a bit by layer, for each of pc2, pc3 and pc4.
        path: the file.

    Raises:
        ConfigError: it cannot be written.
    """
    beside = path.with_suffix(".partial")
    tensors = {_TURN: turn_LHEE.cpu().contiguous(), _QUARTERS: torch.tensor(rates, dtype=torch.uint8)}
    try:
        beside.write_bytes(save(tensors))
        beside.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); name another file with --out") from error
