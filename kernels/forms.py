"""A form of a block: the codec that it is kept by, and how many neighbouring tokens are merged before.

Merged tokens are the mean key (before RoPE) and the mean value of a window of rows and columns of one latent frame.
They stand at the window's centre and are attended with the mass of all tokens they stand for: log(tokens) is added to
the log-sum-exp of an attention over such tokens alone. That is exact where a window's tokens are equal.

Shape legend: T tokens of a block, M tokens after merging, H heads, D head dim, P payload bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.kernels.codec import BlockGeometry, Codec, Rates, make_codec
from longtake.kernels.errors import ConfigError
from longtake.kernels.principal import HistoryBasis
from longtake.kernels.rotary import THETA, HeadRotary, Turns, rotary_table


def merge_tokens(x_THD: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """Means over windows.

    Args:
        x_THD: [T, H, D] any float type; tokens in the order frame, row, column.
        grid: rows and columns of a frame.
        window: rows and columns that are merged; they divide the grid.

    Returns:
        float32 [M, H, D], in the same order.
    """
    (rows, columns), (high, wide) = grid, window
    heads, dim = x_THD.shape[1:]
    x = x_THD.float().reshape(-1, rows // high, high, columns // wide, wide, heads, dim)
    return x.mean(dim=(2, 4)).reshape(-1, heads, dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One form of every block of a history.

    Args:
        name: of the form; a folder's name on the disk.
        codec: of the tokens that are kept.
        grid: rows and columns of a full latent frame.
        window: rows and columns that are merged into one token; (1, 1) for none.
        layers: the codec of each layer, where layers differ.
    """

    name: str
    codec: Codec
    grid: tuple[int, int]
    window: tuple[int, int] = (1, 1)
    layers: tuple[Codec, ...] = ()

    @property
    def mass(self) -> int:
        """Tokens of the block that one kept token stands for."""
        return self.window[0] * self.window[1]

    @property
    def num_tokens(self) -> int:
        """Kept tokens of a block, M."""
        return self.codec.geometry.num_tokens

    def of_layer(self, layer: int) -> Codec:
        """The codec of one layer."""
        return self.layers[layer] if self.layers else self.codec

    def encode(self, layer: int, k_THD: Tensor, v_THD: Tensor, out_HP: Tensor) -> None:
        """As Codec.encode, of one layer and from all T tokens of the block."""
        if self.mass > 1:
            k_THD, v_THD = (merge_tokens(x_THD, self.grid, self.window) for x_THD in (k_THD, v_THD))
        self.of_layer(layer).encode(k_THD, v_THD, out_HP)

    def rotary(
        self, frame_positions: Sequence[float], device: torch.device, thetas: Sequence[float] = (THETA,)
    ) -> Turns:
        """Tables of some latent frames' kept tokens: as rotary_table; ``thetas``: one for all heads, or one each."""
        rows, columns = self.grid[0] // self.window[0], self.grid[1] // self.window[1]
        head_dim = self.codec.geometry.head_dim
        heads = [
            rotary_table(frame_positions, rows, columns, head_dim, device, merged=self.window, theta=theta)
            for theta in thetas
        ]
        return heads[0] if len(heads) == 1 else HeadRotary(heads=tuple(heads))


def make_form(
    codec: str,
    geometry: BlockGeometry,
    window: tuple[int, int] = (1, 1),
    basis: HistoryBasis | None = None,
    rates: Rates = (),
) -> Form:
    """Make a form.

    Args:
        codec: name, as for make_codec.
        geometry: of a block, with its grid.
        window: rows and columns of tokens that are merged.
        basis: for codecs that want one; None: the form is to be asked for names and sizes only.
        rates: of the model, as for make_codec.

    Raises:
        ConfigError: no such codec, or the window does not divide the frame.
    """
    assert geometry.grid is not None, "forms know where tokens lie"
    (rows, columns), (high, wide) = geometry.grid, window
    if high < 1 or wide < 1 or rows % high or columns % wide:
        divide = [[n for n in range(1, side + 1) if side % n == 0] for side in geometry.grid]
        raise ConfigError(
            f"tokens cannot be merged by {high} x {wide} in frames of {rows} x {columns}; rows by one of "
            f"{divide[0]}, columns by one of {divide[1]}"
        )
    kept = BlockGeometry(
        num_tokens=geometry.num_tokens // (high * wide),
        head_dim=geometry.head_dim,
        grid=(rows // high, columns // wide),
    )
    name = codec if window == (1, 1) else f"{codec}-mean{high}x{wide}"
    made = make_codec(codec, kept, rates)
    layers = [made.of_layer(basis, layer) for layer in range(basis.num_layers)] if basis is not None else []
    return Form(name=name, codec=made, grid=geometry.grid, window=window, layers=tuple(layers))
