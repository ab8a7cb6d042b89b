"""Stores into other ranks' memory: the ranks of a mesh one after the other, each buffer a tensor here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtake.engine.mesh import MeshShape
from longtake.engine.ulysses import TokenLayout
from tests.kernels.twins import run_interpreted

FRAMES, HEADS = 2, 8
MESHES = ((2, 1), (4, 1), (2, 2))  # ranks along sp, and along tp where that splits tokens too


def check_exchange(sp: int, tp: int, frame_tokens: int, device: str, dtype: torch.dtype) -> None:
    """Every rank gets its heads of all tokens, and back what it made of its tokens; nothing else is written."""
    from longtake.kernels import exchange_triton

    layout = TokenLayout.of(MeshShape(tp=tp, sp=sp, split_norms=tp > 1), FRAMES, frame_tokens)
    own, tokens, rows = HEADS // sp, FRAMES * frame_tokens, layout.tp * FRAMES * layout.share_tokens
    torch.manual_seed(sp)
    whole = [torch.randn(tokens, HEADS, 64).to(device, dtype) for _ in range(3)]

    def part(x: Tensor, rank: int) -> Tensor:
        shares = [layout.take(x.flatten(1)[None], rank * layout.tp + index)[0] for index in range(layout.tp)]
        rows_THD: Tensor = torch.cat(shares).unflatten(1, (HEADS, -1))
        return rows_THD

    sizes = {"m": layout.tp, "F": FRAMES, "S": frame_tokens, "s": layout.share_tokens, "h": own}
    heads = [torch.full((3, tokens, own, 64), torch.nan, device=device, dtype=dtype) for _ in range(sp)]
    back = [torch.zeros((rows, HEADS, 64), device=device, dtype=dtype) for _ in range(sp)]
    to_heads, to_tokens = (torch.tensor([b.data_ptr() for b in each], device=device) for each in (heads, back))
    for rank in range(sp):
        q, k, v = (part(x, rank) for x in whole)
        exchange_triton.to_heads(q, k, v, to_heads, rank, sizes)
    for rank in range(sp):
        for got, x in zip(heads[rank], whole, strict=True):
            assert torch.equal(got, x[:, rank * own : (rank + 1) * own])
        head_major = (2 * heads[rank][0]).transpose(0, 1).contiguous().transpose(0, 1)  # as attention leaves it
        exchange_triton.to_tokens(head_major, to_tokens, rank, sizes)
    for rank in range(sp):
        assert torch.equal(back[rank], 2 * part(whole[0], rank))


def check_sums(num_ranks: int, device: str, dtype: torch.dtype) -> None:
    """Each rank gets the sum of its part, and what all have to say to all."""
    from longtake.kernels import exchange_triton

    torch.manual_seed(num_ranks)
    own = [torch.randn(num_ranks * 5, 48).to(device, dtype) for _ in range(num_ranks)]
    buffers = [torch.full((2, num_ranks, 5, 48), torch.nan, device=device, dtype=dtype) for _ in range(num_ranks)]
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers], device=device)
    for rank, x in enumerate(own):
        exchange_triton.spread(x, addresses, rank, each=True)
        exchange_triton.spread(x[:5], addresses, rank, each=False, offset_bytes=buffers[0][0].nbytes)
    for rank, (parts, said) in enumerate(buffers):
        want = torch.stack([x[5 * rank : 5 * rank + 5].float() for x in own]).sum(0).to(dtype)
        torch.testing.assert_close(exchange_triton.sum_parts(parts), want)
        assert torch.equal(said.flatten(0, 1), torch.cat([x[:5] for x in own]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("sp", "tp"), MESHES)
@pytest.mark.parametrize("frame_tokens", [15, 1560])
def test_stores_reach_every_rank(sp: int, tp: int, frame_tokens: int, dtype: torch.dtype) -> None:
    check_exchange(sp, tp, frame_tokens, "cuda", dtype)
    check_sums(sp, "cuda", dtype)


def test_interpreted_stores_reach_every_rank() -> None:
    run_interpreted("tests.kernels.test_exchange")


def main() -> None:
    """The interpreted run."""
    for sp, tp in MESHES:
        for frame_tokens in (15, 16):
            check_exchange(sp, tp, frame_tokens, "cpu", torch.float32)
        check_sums(sp, "cpu", torch.float32)


if __name__ == "__main__":
    main()
