"""The rollout against computations that keep no cache, and its promises: determinism, chunks, prefix, beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.engine import history, rollout
from longtake.engine.config import BeatConfig, HistoryConfig, HistoryPolicy, Positions, ShotConfig, Switch
from longtake.engine.model import CausalWan, TextContext
from longtake.engine.noise import block_noise
from longtake.engine.rollout import Prefix, Rollout
from longtake.engine.shotcache import open_cache
from longtake.engine.timeline import Timeline
from longtake.kernels.rotary import apply_rotary, rotary_table
from longtake.offload.cache import KVCache, Reading
from tests.engine import small_rollout
from tests.engine.small_rollout import GEOMETRY, ONE_BEAT

# float32 rounding, carried through a few blocks of feedback.
TOLERANCE = 5e-4

FULL = HistoryConfig(policy=HistoryPolicy.FULL, positions=Positions.ABSOLUTE)
WINDOW = HistoryConfig(sink_blocks=1, recent_blocks=2)
TWO_BEATS = (*ONE_BEAT, BeatConfig(at_s=0.8, prompt="b"))


def make_shot(history_config: HistoryConfig = FULL, codec: str = "fp32", num_blocks: int = 5) -> ShotConfig:
    return small_rollout.make_shot(history_config, codec, num_blocks, beats=TWO_BEATS)


def render(shot: ShotConfig, model: CausalWan, contexts: list[TextContext], prefix: Prefix | None = None) -> Tensor:
    """All clean blocks [N, C, F, Y, X], the prefix included."""
    prefix = prefix or Prefix()
    run = Rollout(shot, model, contexts, open_cache(shot, torch.device("cpu"), len(prefix.latents)), prefix)
    return torch.stack([run.step() for _ in range(run.total_blocks)])


def uncached(shot: ShotConfig, model: CausalWan, contexts: list[TextContext]) -> Tensor:
    """The same film, all history computed anew for every pass: plain tensors, plain softmax, block after block."""
    clean: list[Tensor] = []
    frames, timeline = shot.model.block_frames, Timeline(shot, 0)
    sigmas = [5 * s / (1 + 4 * s) for s in (1.0, 0.5)]

    thetas = history.head_thetas(shot.history, range(GEOMETRY.num_heads))

    def turned(x: Tensor, starts: Sequence[float]) -> Tensor:
        positions = [s + f for s in starts for f in range(frames)]
        tables = [rotary_table(positions, *shot.grid, GEOMETRY.head_dim, theta=theta) for theta in thetas]
        heads = range(GEOMETRY.num_heads)
        return torch.cat([apply_rotary(x[:, [head]], tables[head % len(tables)]) for head in heads], dim=1)

    def flow(block: int, latents: Tensor, timestep: float) -> Tensor:
        stored: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        out = latents
        for index in range(block + 1):
            plan = timeline.write_plan(timeline.entry(timeline.index_of(index)))

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, plan: history.Plan = plan) -> Tensor:
                stored[plan.block, layer] = (k[0], v[0])
                keys = torch.cat([stored[b, layer][0] for b in (*plan.blocks, plan.block)])
                values = torch.cat([stored[b, layer][1] for b in (*plan.blocks, plan.block)])
                keys, queries = turned(keys, [*plan.starts, plan.start]), turned(q[0], [plan.start])
                scores = torch.einsum("qhd,khd->hqk", queries, keys) * GEOMETRY.head_dim**-0.5
                return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)[None]

            x, t = (latents, timestep) if index == block else (clean[index], 0.0)
            out = model(x[None], torch.full((1, frames), t), contexts[shot.beat_of_block(index)], attend)[0]
        return out

    with torch.no_grad():
        for block in range(shot.num_blocks):
            x0 = torch.zeros(())
            for step, sigma in enumerate(sigmas):
                noise = block_noise(shot.seed, shot.name, block, step, shot.latent_shape)
                noisy = noise if step == 0 else (1 - sigma) * x0 + sigma * noise
                x0 = noisy - sigma * flow(block, noisy, 1000 * sigma)
            clean.append(x0)
    return torch.stack(clean)


HEADS_APART = replace(WINDOW, positions=Positions.ABSOLUTE, head_jitter=0.8)


@pytest.mark.parametrize("history_config", [FULL, WINDOW, replace(WINDOW, positions=Positions.ABSOLUTE), HEADS_APART])
def test_equals_uncached(history_config: HistoryConfig, model: CausalWan, contexts: list[TextContext]) -> None:
    shot = make_shot(history_config)
    torch.testing.assert_close(render(shot, model, contexts), uncached(shot, model, contexts), rtol=0, atol=TOLERANCE)


def test_noise_is_drawn_once_the_first_of_a_block_before_it_begins(
    model: CausalWan, contexts: list[TextContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, int]] = []

    def noise(seed: int, name: str, block: int, step: int, shape: tuple[int, ...]) -> Tensor:
        drawn.append((block, step))
        return block_noise(seed, name, block, step, shape)

    monkeypatch.setattr(rollout, "block_noise", noise)
    shot = make_shot(WINDOW, num_blocks=3)
    run = Rollout(shot, model, contexts, open_cache(shot, torch.device("cpu")))
    for block in range(shot.num_blocks):
        run.step()
        assert ((block + 1, 0) in drawn) == (block + 1 < shot.num_blocks)
    assert drawn == [(block, step) for block in range(3) for step in range(len(shot.sampler.timesteps))]


def test_heads_turn_alike_on_any_number_of_ranks() -> None:
    thetas = history.head_thetas(HEADS_APART, range(12))
    assert thetas == (*history.head_thetas(HEADS_APART, range(5)), *history.head_thetas(HEADS_APART, range(5, 12)))
    assert len(set(thetas)) == 12 and all(2000 <= theta < 18000 for theta in thetas)
    assert history.head_thetas(WINDOW, range(12)) == (10000.0,)


def test_heads_apart_in_fp8(model: CausalWan, contexts: list[TextContext]) -> None:
    shot = make_shot(HEADS_APART, codec="int8")
    dense = render(shot, model, contexts)
    found = render(replace(shot, attention="fp8"), model, contexts)
    assert 0 < float((found - dense).norm() / dense.norm()) < 0.05


def test_equals_one_masked_pass(model: CausalWan, contexts: list[TextContext]) -> None:
    """With full history at absolute positions the commit passes are one pass under a block-causal mask."""
    shot = replace(make_shot(), beats=ONE_BEAT)
    clean = render(shot, model, contexts)
    blocks, _, frames = clean.shape[:3]
    tokens = shot.tokens_per_block
    film = clean.transpose(0, 1).flatten(1, 2)
    rotary = rotary_table(range(blocks * frames), *shot.grid, GEOMETRY.head_dim)
    block_of = torch.arange(blocks * tokens) // tokens
    mask = block_of[:, None] >= block_of[None, :]
    seen: dict[int, Tensor] = {}

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen[layer] = k[0]
        q_HTD, k_HTD = (apply_rotary(x[0], rotary).transpose(0, 1) for x in (q, k))
        return F.scaled_dot_product_attention(q_HTD, k_HTD, v[0].transpose(0, 1), mask).transpose(0, 1)[None]

    with torch.no_grad():
        model(film[None], torch.zeros(1, blocks * frames), contexts[0], attend)
    cache = open_cache(shot, torch.device("cpu"))
    run = Rollout(shot, model, contexts, cache)
    for _ in range(blocks - 1):
        run.step()
    for layer in range(GEOMETRY.num_layers):
        with cache.prepare(range(blocks - 1)) as reading:
            assert isinstance(reading, Reading)
            pages, slots = reading.pages(layer)
            k_bytes = pages[slots.long()].view(torch.float32)[..., : tokens * GEOMETRY.head_dim]
            stored = k_bytes.unflatten(-1, (tokens, GEOMETRY.head_dim)).permute(0, 2, 1, 3).flatten(0, 1)
        torch.testing.assert_close(stored, seen[layer][: len(stored)], rtol=0, atol=TOLERANCE)


def test_same_film_twice(model: CausalWan, contexts: list[TextContext]) -> None:
    shot = make_shot(WINDOW, codec="bf16")
    assert torch.equal(render(shot, model, contexts), render(shot, model, contexts))


def test_chunked_history_is_the_same_film(
    model: CausalWan, contexts: list[TextContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    shot = make_shot(num_blocks=6)
    whole = render(shot, model, contexts)
    monkeypatch.setattr(rollout, "SCRATCH_BYTES", 0)  # one block of history a chunk
    torch.testing.assert_close(render(shot, model, contexts), whole, rtol=0, atol=TOLERANCE)


def test_prompt_changes_the_film_from_its_beat_on(model: CausalWan, contexts: list[TextContext]) -> None:
    shot = make_shot()
    film, same = render(shot, model, contexts), render(shot, model, [contexts[0], contexts[0]])
    changed = [block for block in range(len(film)) if not torch.equal(film[block], same[block])]
    assert changed == [block for block in range(shot.num_blocks) if shot.beat_of_block(block) == 1] == [2, 3, 4]


def test_prefix_is_history(model: CausalWan, contexts: list[TextContext]) -> None:
    """A shot that starts from another's blocks sees what the other would have seen."""
    shot = replace(make_shot(), beats=ONE_BEAT)
    film = render(shot, model, contexts)
    later = replace(shot, after="shot", after_blocks=3, num_frames=4 * 2 * 2)
    continued = render(later, model, contexts, Prefix(latents=tuple(film[:3])))
    assert len(continued) == 5
    assert torch.equal(continued[:3], film[:3])
    alone = render(replace(later, after=None, num_frames=13), model, contexts)
    assert not torch.allclose(continued[3], alone[0], atol=0.1)


def test_window_keeps_the_device_arena_small(model: CausalWan, contexts: list[TextContext]) -> None:
    shot = make_shot(WINDOW, num_blocks=12)
    cache = open_cache(shot, torch.device("cpu"))
    run = Rollout(shot, model, contexts, cache)
    sizes = set()
    for _ in range(run.total_blocks):
        run.step()
        sizes.add(sum(run.memory().values()))
    assert len(sizes) == 1 and run.memory()["recent_latents"] == 0
    assert isinstance(cache, KVCache) and cache.arena.num_frames == 4


def test_latents_are_kept_where_they_are_committed_anew(model: CausalWan, contexts: list[TextContext]) -> None:
    shot = make_shot(WINDOW, num_blocks=6)
    shot = replace(shot, beats=(shot.beats[0], replace(shot.beats[1], at_s=1.5, switch=Switch.RECACHE)))
    run = Rollout(shot, model, contexts, open_cache(shot, torch.device("cpu")))
    for _ in range(run.total_blocks):
        clean = run.step()
    assert run.memory()["recent_latents"] == WINDOW.recent_blocks * clean.nbytes
