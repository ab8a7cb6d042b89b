"""The two ways to attend history: in the model's own type, or in FP8. Each owns its scratch.

An AttentionPath is what the engine drives, layer by layer; it knows how rows stand in the scratch, the engine knows
which blocks to read and where they go:

    path.begin(q, k, v, rotary)                        the block's own, before RoPE: turned, and in FP8 calibrated
    for chunk in chunks:
        path.write_history(pages, slots, rotary)       rows 0 .. n of the scratch; other codecs' blocks at later rows
        path.write_own(n)                              with the last chunk: the block's own K/V behind them
        out, lse = path.attend(n + own)                merge() by lse when there are several chunks
    path.finish()                                      lets the block's own go

Shape legend: T tokens of a block, H heads, D head dim, P payload bytes, G arena slots, N blocks of a chunk, X rows.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from longtake.kernels import flash3
from longtake.kernels.attention import attend
from longtake.kernels.attention_fp8 import attend_fp8, fp8_scratch
from longtake.kernels.codec import Codec
from longtake.kernels.errors import ConfigError
from longtake.kernels.head_dims import fits_kernels
from longtake.kernels.rotary import Turns, apply_rotary_pair
from longtake.kernels.scaling import Rows, Scaling, calibrate_all


class AttentionPath(ABC):
    """A scratch of dense K/V rows for one layer at a time, and attention over it.

    Its scratch is there from the start, a block's own q, k and v from begin to finish. Not thread-safe; CUDA work goes
    to the current stream without synchronising.

    Args:
        codec: of the history.
        num_heads: of this rank.
        num_rows: of the scratch: at least one block of history and the own one.
    """

    name: str

    def __init__(self, codec: Codec, num_heads: int, num_rows: int) -> None:
        if num_rows < 2 * codec.geometry.num_tokens:
            raise ConfigError(
                f"a scratch of {num_rows} rows does not hold two blocks of {codec.geometry.num_tokens} tokens."
            )
        self.codec = codec
        self.num_heads = num_heads
        self.num_rows = num_rows
        self._own: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of the scratch."""

    def begin(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, rotary: Turns) -> None:
        """Take the block's own q, k and v of one layer, after norm, before RoPE.

        Args:
            q_THD: [T, H, D]; k_THD, v_THD: likewise; v must not change until the layer's last attend.
            rotary: tables of the block's own position.
        """
        q_turned_THD, k_turned_THD = apply_rotary_pair(q_THD, k_THD, rotary)
        self._own = (q_turned_THD.transpose(0, 1), k_turned_THD, v_THD)

    @abstractmethod
    def write_history(
        self, pages_GHP: Tensor, slots_N: Tensor, rotary: Turns, *, codec: Codec | None = None, row: int = 0
    ) -> None:
        """Unpack N blocks of T tokens into rows row .. row + N*T.

        Args:
            pages_GHP, slots_N, rotary: as for Codec.materialise.
            codec: that encoded them; None: the path's own.
            row: first row.
        """

    @abstractmethod
    def write_own(self, row: int) -> None:
        """Write the block's own K/V into rows row .. row + T."""

    @abstractmethod
    def attend(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """The block's queries over rows 0 .. num_rows: out_HTD in the queries' type and lse_HT float32."""

    def finish(self) -> None:
        """Let the block's own q, k and v go, once a layer's last attend is issued."""
        self._own = None

    def partial_bytes(self, num_queries: int) -> int:
        """Bytes that attending takes meanwhile for results of parts of the keys: so many queries, the whole scratch."""
        return 0

    def _begun(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self._own is not None, "begin() comes first"
        return self._own


class DensePath(AttentionPath):
    """Rows in the model's own type, attended by PyTorch's kernels or FlashAttention-3.

    Args:
        codec, num_heads, num_rows: as above.
        dtype: of the model.
        device: of the model.
        use_flash3: attend by FlashAttention-3 instead.
    """

    name = "dense"

    def __init__(
        self,
        codec: Codec,
        num_heads: int,
        num_rows: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        use_flash3: bool = False,
    ) -> None:
        super().__init__(codec, num_heads, num_rows)
        self._attend = flash3.attend if use_flash3 else attend
        self.k_HXD, self.v_HXD = (
            torch.empty((num_heads, num_rows, codec.geometry.head_dim), dtype=dtype, device=device) for _ in range(2)
        )

    @property
    def num_bytes(self) -> int:
        return self.k_HXD.nbytes + self.v_HXD.nbytes

    def write_history(
        self, pages_GHP: Tensor, slots_N: Tensor, rotary: Turns, *, codec: Codec | None = None, row: int = 0
    ) -> None:
        (codec or self.codec).materialise(pages_GHP, slots_N, rotary, self.k_HXD[:, row:], self.v_HXD[:, row:])

    def write_own(self, row: int) -> None:
        _, k_THD, v_THD = self._begun()
        self.k_HXD[:, row : row + k_THD.shape[0]] = k_THD.transpose(0, 1)
        self.v_HXD[:, row : row + v_THD.shape[0]] = v_THD.transpose(0, 1)

    def attend(self, num_rows: int) -> tuple[Tensor, Tensor]:
        return self._attend(self._begun()[0], self.k_HXD[:, :num_rows], self.v_HXD[:, :num_rows])


class Fp8Path(AttentionPath):
    """Rows in e4m3, centred and scaled by what the block's own K/V need.

    Args:
        codec, num_heads, num_rows: as above.
        dtype: of the model.
        device: of the model; on a CPU the plain twins run.
        turned: whether values stand with tokens contiguous.
    """

    name = "fp8"

    def __init__(
        self,
        codec: Codec,
        num_heads: int,
        num_rows: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        turned: bool = True,
    ) -> None:
        super().__init__(codec, num_heads, num_rows)
        self.dtype = dtype
        self.scratch = fp8_scratch(num_heads, num_rows, codec.geometry.head_dim, device, turned=turned)
        self._scaling: tuple[Scaling, Scaling] | None = None

    @property
    def num_bytes(self) -> int:
        return self.scratch.num_bytes

    def begin(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, rotary: Turns) -> None:
        super().begin(q_THD, k_THD, v_THD, rotary)
        self._calibrate(*self._begun())

    def _calibrate(self, q_HTD: Tensor, k_THD: Tensor, v_THD: Tensor) -> None:
        k_scaling, v_scaling = calibrate_all((k_THD, v_THD), num_centred=2)
        self._scaling = (k_scaling, v_scaling)

    def write_history(
        self, pages_GHP: Tensor, slots_N: Tensor, rotary: Turns, *, codec: Codec | None = None, row: int = 0
    ) -> None:
        k_scaling, v_scaling = self._scalings()
        (codec or self.codec).materialise(
            pages_GHP,
            slots_N,
            rotary,
            self.scratch.k_HXD[:, row:],
            self.scratch.v_HXD[:, row:],
            k_scaling=k_scaling,
            v_scaling=v_scaling,
        )

    def write_own(self, row: int) -> None:
        _, k_THD, v_THD = self._begun()
        k_scaling, v_scaling = self._scalings()
        store((k_THD, k_scaling, self.scratch.k_HXD), (v_THD, v_scaling, self.scratch.v_HXD), row)

    def attend(self, num_rows: int) -> tuple[Tensor, Tensor]:
        k_scaling, v_scaling = self._scalings()
        return attend_fp8(self._begun()[0], self.scratch, k_scaling, v_scaling, num_rows)

    def finish(self) -> None:
        super().finish()
        self._scaling = None

    def _scalings(self) -> tuple[Scaling, Scaling]:
        assert self._scaling is not None, "begin() comes first"
        return self._scaling


class Flash3Fp8Path(Fp8Path):
    """As Fp8Path, attended by FlashAttention-3.

    Args:
        codec, num_heads, num_rows, dtype, device: as above; the device is a Hopper GPU.
    """

    def __init__(self, codec: Codec, num_heads: int, num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(codec, num_heads, num_rows, dtype, device, turned=False)
        self._queries: flash3.Queries | None = None

    def _calibrate(self, q_HTD: Tensor, k_THD: Tensor, v_THD: Tensor) -> None:
        tensors = (k_THD, v_THD, q_HTD.transpose(0, 1))
        k_scaling, v_scaling, q_scaling = calibrate_all(tensors, num_centred=2)  # softmax would mind a centre of q
        self._scaling = (k_scaling, v_scaling)
        self._queries = flash3.quantise(q_HTD, q_scaling, k_scaling)

    def attend(self, num_rows: int) -> tuple[Tensor, Tensor]:
        assert self._queries is not None, "begin() comes first"
        k_HXD, v_HXD = self.scratch.k_HXD[:, :num_rows], self.scratch.v_HXD[:, :num_rows]
        out_HTD, lse_HT = flash3.attend_fp8(self._queries, k_HXD, v_HXD, *self._scalings())
        return out_HTD.to(self.dtype), lse_HT

    def finish(self) -> None:
        super().finish()
        self._queries = None

    def partial_bytes(self, num_queries: int) -> int:
        return flash3.partial_bytes(self.num_heads, num_queries, self.codec.geometry.head_dim, self.num_rows)


def store(keys: Rows, values: Rows, first_row: int) -> None:
    """Write a block's own keys and values into FP8 scratches; on a GPU in one launch.

    Args:
        keys, values: x_THD ([T, H, D] any float type), the scaling of its scratch, and that: e4m3 [H, X, D], keys with
            channels contiguous, values with channels or tokens.
        first_row: of the T rows.
    """
    if fits_kernels(keys[0], values[0]):
        from longtake.kernels import scaling_triton

        scaling_triton.store(keys, values, first_row)
        return
    for x_THD, scaling, out_HXD in (keys, values):
        out_HXD[:, first_row : first_row + x_THD.shape[0]] = scaling.store(x_THD.transpose(0, 1))


def path_names() -> list[str]:
    """What make_path knows."""
    return ["dense", "fp8"]


def make_path(
    name: str,
    codec: Codec,
    num_heads: int,
    num_rows: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    use_flash3: bool | None = None,
) -> AttentionPath:
    """Make an attention path by name.

    Args:
        name: "dense" or "fp8".
        codec: of the history.
        num_heads: of this rank.
        num_rows: of the scratch.
        dtype: of the model.
        device: of the model.
        use_flash3: FlashAttention-3 for "dense" in bfloat16 and for "fp8"; None: where it is there.

    Raises:
        ConfigError: no such path, or FlashAttention-3 is asked for where it is not.
    """
    has_flash3 = flash3.available(device, codec.geometry.head_dim)
    if use_flash3 and not has_flash3:
        raise ConfigError("FlashAttention-3 needs a Hopper GPU, head dims of 64 or 128, and one of its packages.")
    use_flash3 = has_flash3 if use_flash3 is None else use_flash3
    if name == "dense":
        use_flash3 = use_flash3 and dtype == torch.bfloat16
        return DensePath(codec, num_heads, num_rows, dtype, device, use_flash3=use_flash3)
    if name == "fp8":
        kind = Flash3Fp8Path if use_flash3 else Fp8Path
        return kind(codec, num_heads, num_rows, dtype, device)
    nearest = difflib.get_close_matches(name, path_names(), n=1, cutoff=0.0)
    raise ConfigError(
        f"unknown attention path {name!r}: did you mean {nearest[0]!r}? Known: {', '.join(path_names())}."
    )
