"""Tokens dealt to ranks and heads exchanged between them: every value arrives, at its place, unchanged."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from longtake.engine.gang import join
from longtake.engine.mesh import ALONE, MeshShape, open_mesh
from longtake.engine.ulysses import HeadExchange, TokenLayout, to_heads, to_tokens
from tests.engine.gangs import run_ranks


@pytest.mark.parametrize(("sp", "tp"), [(1, 1), (2, 1), (4, 1), (2, 2), (3, 1), (7, 1)])
@pytest.mark.parametrize("frame_tokens", [8, 15])
def test_shares_make_up_the_whole(sp: int, tp: int, frame_tokens: int) -> None:
    layout = TokenLayout(num_frames=3, frame_tokens=frame_tokens, sp=sp, tp=tp)
    whole = torch.randn(3 * frame_tokens, 5)
    taken = torch.stack([layout.take(whole[None], index)[0] for index in range(layout.num_shares)])
    assert taken.shape == (sp * tp, 3 * layout.share_tokens, 5)
    assert torch.equal(layout.whole(taken), whole)
    assert torch.equal(layout.shares(whole), taken)


def test_a_gang_of_one_exchanges_nothing() -> None:
    layout = TokenLayout.of(ALONE.shape, 3, 8)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q

    assert HeadExchange(ALONE, layout).around(attend) is attend


def whole_qkv(num_tokens: int, num_heads: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(1, num_tokens, num_heads, 6) for _ in range(3)]


def exchange(rank: int, text: str, frame_tokens: int) -> list[bool]:
    """Whether each rank gets its heads of all tokens, and back what attention gave of its tokens."""
    frames, num_heads = 2, 8
    tp, sp, norms = (int(part) for part in text.split("/"))
    with join() as gang:
        mesh = open_mesh(MeshShape(tp=tp, sp=sp, split_norms=bool(norms)))
        layout = TokenLayout.of(mesh.shape, frames, frame_tokens)
        whole = whole_qkv(frames * frame_tokens, num_heads)
        own, weights = mesh.heads(num_heads), mesh.shape.weight_heads(rank, num_heads)
        index = mesh.sp.index * layout.tp
        # what a rank's projections give: tokens of all shares that tp gathered, heads whose weights are here
        mine = [
            torch.cat([layout.take(x.flatten(2), index + part) for part in range(layout.tp)], dim=1)
            .unflatten(2, (num_heads, -1))[:, :, weights.start : weights.stop]
            .contiguous()
            for x in whole
        ]
        seen: list[bool] = []
        seen_q: list[Tensor] = []

        def attend(layer: int, *qkv: Tensor) -> Tensor:
            seen_q.append(qkv[0])
            seen.extend(torch.equal(x, y[:, :, own.start : own.stop]) for x, y in zip(qkv, whole, strict=True))
            return (2 * qkv[0]).transpose(1, 2).contiguous().transpose(1, 2)  # as attention leaves it: head-major

        with torch.inference_mode():
            out = HeadExchange(mesh, layout).around(attend)(0, *mine)
            seen.append(torch.equal(out, 2 * mine[0]))
            trace = partial(torch.compile, fullgraph=True, backend="aot_eager")
            attend(0, *trace(to_heads)(*mine, mesh.sp, layout))
            seen.append(torch.equal(trace(to_tokens)(2 * seen_q[-1], mesh.sp, layout), 2 * mine[0]))
        gang.any(False)
        return seen


@pytest.mark.parametrize(("num_ranks", "text"), [(2, "1/2/0"), (4, "1/4/0"), (4, "2/2/0"), (4, "2/2/1"), (2, "2/1/1")])
def test_heads_for_tokens_and_back(num_ranks: int, text: str) -> None:
    for found in run_ranks(exchange, num_ranks, text, 15):
        assert found == [True] * 8
