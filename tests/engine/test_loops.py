"""Every preset end to end on a small random model, against the plain loops; switches, pictures, guides, resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longtake.engine.config import (
    BeatConfig,
    CacheConfig,
    HistoryConfig,
    HistoryPolicy,
    MediaConfig,
    ModelConfig,
    ModelSpec,
    Positions,
    SamplerConfig,
    ShotConfig,
    Switch,
    WriteBack,
)
from longtake.engine.model import CausalWan
from longtake.engine.presets import PRESETS, Preset
from longtake.engine.prompts import blend_of_block, make_prompts
from longtake.engine.rolling import WindowStore
from longtake.engine.rollout import Prefix, Rollout
from longtake.engine.shotcache import open_cache
from longtake.engine.tensor_files import rename
from longtake.kernels.errors import ConfigError, StorageError
from tests.engine.plain_loops import Film, closed_up, rebuilt, rolling, sigmas_of, windowed
from tests.engine.plain_wan import State, random_state

# float32 rounding, carried through some blocks of feedback.
TOLERANCE = 5e-4
SWITCH = 4
CAUSAL = [name for name, preset in PRESETS.items() if preset.few_step]


def geometry(preset: Preset) -> ModelConfig:
    channels = preset.transformer.in_channels
    return ModelConfig(
        num_heads=2, head_dim=16, num_layers=2, ffn_dim=48, text_dim=24, in_channels=channels, out_channels=channels
    )


def make_shot(preset: Preset, num_blocks: int = 9, codec: str = "fp32") -> ShotConfig:
    """A shot of the preset's settings, 2x3 tokens a latent frame, whose prompt changes at block SWITCH."""
    size = (4 * preset.spatial_stride, 6 * preset.spatial_stride)
    spec = ModelSpec(
        path=Path("unused"),
        name="test",
        transformer=geometry(preset),
        sampler=preset.sampler,
        block_frames=preset.block_frames,
        fps=preset.fps,
        height=size[0],
        width=size[1],
        text_len=5,
        history=preset.history,
        spatial_stride=preset.spatial_stride,
        switch=preset.switch,
    )
    shot = ShotConfig(
        name="shot",
        model=spec,
        num_frames=1 + 4 * (preset.block_frames * num_blocks - 1),
        fps=preset.fps,
        height=size[0],
        width=size[1],
        seed=3,
        beats=(BeatConfig(at_s=0, prompt="a"),),
        sampler=preset.sampler,
        history=preset.history,
        cache=CacheConfig(codec=codec),
    )
    at_s = shot.frames_of_latents(SWITCH * preset.block_frames) / preset.fps
    return replace(shot, beats=(*shot.beats, BeatConfig(at_s=at_s, prompt="b", switch=preset.switch)))


def make_model(config: ModelConfig) -> tuple[CausalWan, State]:
    state = random_state(config, seed=2)
    model = CausalWan(config).eval().requires_grad_(False)
    model.load_state_dict(rename(state, "test"))
    return model, state


def embeds_of(shot: ShotConfig) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(5, shot.model.transformer.text_dim, generator=generator) for _ in shot.beats]


def film_of(shot: ShotConfig, state: State) -> Film:
    embeds = embeds_of(shot)
    return Film(
        state, shot.model.transformer, shot.latent_shape, shot.seed, shot.name, lambda b: embeds[shot.beat_of_block(b)]
    )


def make_rollout(shot: ShotConfig, model: CausalWan, prefix: Prefix | None = None, **options: object) -> Rollout:
    prefix = prefix or Prefix()
    cache = open_cache(shot, torch.device("cpu"), len(prefix.latents))
    return Rollout(shot, model, make_prompts(shot, model, embeds_of(shot)), cache, prefix, **options)  # type: ignore[arg-type]


def render(shot: ShotConfig, model: CausalWan, prefix: Prefix | None = None) -> Tensor:
    run = make_rollout(shot, model, prefix)
    film = torch.stack([run.step() for _ in range(run.total_blocks)])
    assert run.next_block == shot.num_blocks
    return film


def expected(name: str, shot: ShotConfig, state: State) -> Tensor:
    """The preset's rollout; its numbers are written out here once more, from the projects' descriptions."""
    film, n = film_of(shot, state), shot.num_blocks
    four = sigmas_of([1000, 750, 500, 250], 5.0)
    with torch.no_grad():
        match name:
            case "self-forcing" | "causal-forcing":
                return windowed(film, n, four, 0, 6, SWITCH, "keep")
            case "causvid":
                return windowed(film, n, sigmas_of([1000, 750, 500, 250], 8.0), 0, 6, SWITCH, "keep")
            case "causal-forcing-framewise":
                return windowed(film, n, four, 0, 20, SWITCH, "keep")
            case "longlive":
                return windowed(film, n, four, 1, 2, SWITCH, "recache")
            case "longlive-2":
                return windowed(film, n, four, 1, 2, SWITCH, "recache")
            case "infinity-rope":
                return windowed(film, n, four, 1, 1, SWITCH, "flush")
            case "rolling-forcing":
                return rolling(film, n, sigmas_of([1000, 800, 600, 400, 200], 5.0), 1, 7)
            case "krea-14b":
                return rebuilt(film, n, four, 1)
    raise AssertionError(f"no plain loop for {name}")


@pytest.mark.parametrize("name", CAUSAL)
def test_every_preset_equals_its_plain_loop(name: str) -> None:
    shot = make_shot(PRESETS[name])
    model, state = make_model(shot.model.transformer)
    torch.testing.assert_close(render(shot, model), expected(name, shot, state), rtol=0, atol=TOLERANCE)


def with_history(name: str, history: HistoryConfig, switch: Switch = Switch.KEEP) -> ShotConfig:
    return make_shot(replace(PRESETS[name], history=history, switch=switch))


@pytest.mark.parametrize("retrieved", [0, 2])
@pytest.mark.parametrize("switch", ["keep", "recache", "flush"])
def test_switches_over_a_small_window(switch: str, retrieved: int) -> None:
    recent = 2 if retrieved else 3
    policy = HistoryPolicy.RETRIEVE if retrieved else HistoryPolicy.WINDOW
    history = HistoryConfig(policy=policy, sink_blocks=1, recent_blocks=recent, retrieved_blocks=retrieved)
    shot = with_history("self-forcing", history, Switch(switch))
    model, state = make_model(shot.model.transformer)
    sigmas = sigmas_of([1000, 750, 500, 250], 5.0)
    with torch.no_grad():
        plain = windowed(film_of(shot, state), shot.num_blocks, sigmas, 1, recent, SWITCH, switch, retrieved)
    torch.testing.assert_close(render(shot, model), plain, rtol=0, atol=TOLERANCE)


def test_a_cut_sees_the_sinks_alone() -> None:
    shot = with_history("self-forcing", HistoryConfig(sink_blocks=1, recent_blocks=3), Switch.CUT)
    model, state = make_model(shot.model.transformer)
    film = film_of(shot, state)
    sigmas = sigmas_of([1000, 750, 500, 250], 5.0)
    cleans: list[Tensor] = []
    with torch.no_grad():
        for block in range(SWITCH + 2):
            scene = [b for b in range(block) if b >= (SWITCH if block >= SWITCH else max(1, block - 3))]
            seen = closed_up([0, *scene] if block else [], 3)
            start = 3 * len(seen)
            if block >= SWITCH:  # the sink at 0, the new scene at the end of the 21 trained positions
                start = 18
                seen = [(0, 0), *((b, 18 - 3 * (block - b)) for b in scene)]
            cleans.append(film.denoise(block, sigmas, start, seen))
            film.commit(block, cleans[block], film.text(block), start, seen)
    torch.testing.assert_close(render(shot, model)[: SWITCH + 2], torch.stack(cleans), rtol=0, atol=TOLERANCE)


def test_history_rebuilt_from_several_blocks() -> None:
    preset = replace(
        PRESETS["krea-14b"],
        history=HistoryConfig(sink_blocks=0, recent_blocks=3),
        sampler=SamplerConfig(timesteps=(1000, 500), write_back=WriteBack.REBUILD),
    )
    shot = make_shot(preset)
    model, state = make_model(shot.model.transformer)
    with torch.no_grad():
        plain = rebuilt(film_of(shot, state), shot.num_blocks, sigmas_of([1000, 500], 5.0), 3)
    torch.testing.assert_close(render(shot, model), plain, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("positions", [Positions.ABSOLUTE, Positions.SINK, Positions.BOUNDED])
def test_without_a_sink_only_distances_count(positions: Positions) -> None:
    near = HistoryConfig(sink_blocks=0, recent_blocks=3)
    shot = with_history("self-forcing", near)
    model, _ = make_model(shot.model.transformer)
    other = with_history("self-forcing", replace(near, positions=positions))
    torch.testing.assert_close(render(other, model), render(shot, model), rtol=0, atol=TOLERANCE)


def test_jitter_moves_the_film_and_is_the_same_twice() -> None:
    history = HistoryConfig(sink_blocks=1, recent_blocks=2, jitter=0.5)
    shot = with_history("self-forcing", history)
    model, _ = make_model(shot.model.transformer)
    film = render(shot, model)
    assert torch.equal(film, render(shot, model))
    plain = render(with_history("self-forcing", replace(history, jitter=0.0)), model)
    assert torch.equal(film[0], plain[0])
    assert (film[2] - plain[2]).abs().max() > 20 * TOLERANCE


def test_the_first_block_has_steps_of_its_own() -> None:
    preset = replace(
        PRESETS["self-forcing"], sampler=SamplerConfig(timesteps=(1000, 500), first_timesteps=(1000, 700, 300))
    )
    shot = make_shot(preset, num_blocks=2)
    model, state = make_model(shot.model.transformer)
    film = film_of(shot, state)
    with torch.no_grad():
        first = film.denoise(0, sigmas_of([1000, 700, 300], 5.0), 0, [])
        film.commit(0, first, film.text(0), 0, [])
        second = film.denoise(1, sigmas_of([1000, 500], 5.0), 3, [(0, 0)])
    torch.testing.assert_close(render(shot, model), torch.stack([first, second]), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["self-forcing", "causal-forcing-framewise"])
def test_a_picture_is_the_first_latent_frame(name: str) -> None:
    shot = make_shot(PRESETS[name], num_blocks=3)
    model, state = make_model(shot.model.transformer)
    picture = torch.randn(16, 1, 4, 6, generator=torch.Generator().manual_seed(7))
    frames = shot.model.block_frames
    film = film_of(shot, state)
    sigmas = sigmas_of([1000, 750, 500, 250], 5.0)
    cleans: list[Tensor] = []
    with torch.no_grad():
        for block in range(3):
            seen = closed_up(list(range(block)), frames)
            fixed = picture if block == 0 else None
            cleans.append(film.denoise(block, sigmas, len(seen) * frames, seen, fixed=fixed))
            film.commit(block, cleans[block], film.text(block), len(seen) * frames, seen)
    result = render(shot, model, Prefix(fixed=picture))
    assert torch.equal(result[0][:, :1], picture)
    torch.testing.assert_close(result, torch.stack(cleans), rtol=0, atol=TOLERANCE)


def test_a_guide_starts_every_block() -> None:
    guide = torch.randn(3, 16, 3, 4, 6, generator=torch.Generator().manual_seed(8))
    media = MediaConfig(path=Path("unused"), sha256="0")
    shot = replace(make_shot(PRESETS["self-forcing"], num_blocks=3), guide=media, strength=0.4)
    model, state = make_model(shot.model.transformer)
    film = film_of(shot, state)
    sigmas = sigmas_of([400, 300, 200, 100], 5.0)
    cleans: list[Tensor] = []
    with torch.no_grad():
        for block in range(3):
            seen = closed_up(list(range(block)), 3)
            cleans.append(film.denoise(block, sigmas, len(seen) * 3, seen, guide=guide[block]))
            film.commit(block, cleans[block], film.text(block), len(seen) * 3, seen)
    result = render(shot, model, Prefix(guide=lambda block: guide[block]))
    torch.testing.assert_close(result, torch.stack(cleans), rtol=0, atol=TOLERANCE)
    weak = render(replace(shot, strength=1e-4), model, Prefix(guide=lambda block: guide[block]))
    assert (weak - guide).abs().max() < 0.02  # little noise, little change


def test_a_transition_blends_embeddings() -> None:
    shot = make_shot(PRESETS["self-forcing"], num_blocks=8)
    block_s = 12 / 16
    shot = replace(shot, beats=(shot.beats[0], replace(shot.beats[1], transition_s=3 * block_s)))
    weights = [blend_of_block(shot, block) for block in range(8)]
    assert weights == [(0, 1.0)] * 4 + [(1, 0.25), (1, 0.5), (1, 0.75), (1, 1.0)]
    model, state = make_model(shot.model.transformer)
    old, new = embeds_of(shot)
    film = film_of(shot, state)
    film.text = lambda block: torch.lerp(old, new, weights[block][1]) if weights[block][0] else old
    with torch.no_grad():
        plain = windowed(film, 8, sigmas_of([1000, 750, 500, 250], 5.0), 0, 6, SWITCH, "keep")
    torch.testing.assert_close(render(shot, model), plain, rtol=0, atol=TOLERANCE)


def test_what_a_shot_starts_from_must_be_given() -> None:
    shot = make_shot(PRESETS["self-forcing"], num_blocks=3)
    model, _ = make_model(shot.model.transformer)
    media = MediaConfig(path=Path("unused"), sha256="0")
    blended = (shot.beats[0], replace(shot.beats[1], transition_s=1.0))
    contexts = make_prompts(shot, model, embeds_of(shot)).contexts
    for change in ({"image": media}, {"guide": media}, {"clip": media, "after_blocks": 2}, {"beats": blended}):
        changed = replace(shot, **change)
        with pytest.raises(ConfigError, match="cannot be rendered here"):
            Rollout(changed, model, contexts, open_cache(changed, torch.device("cpu")))


def resume_from(
    shot: ShotConfig, model: CausalWan, film: Tensor, stop: int, windows: WindowStore | None = None
) -> Rollout:
    """A new rollout over the cache of one that stopped after ``stop`` blocks."""
    first = make_rollout(shot, model, windows=windows)
    for _ in range(stop):
        first.step()
    return Rollout(
        shot,
        model,
        make_prompts(shot, model, embeds_of(shot)),
        first.cache,
        read_latents=lambda block: film[block],
        windows=windows,
    )


@pytest.mark.parametrize("name", ["longlive", "krea-14b", "infinity-rope", "rolling-forcing"])
@pytest.mark.parametrize("stop", [1, SWITCH, SWITCH + 1])
def test_goes_on_to_the_same_bytes(name: str, stop: int, tmp_path: Path) -> None:
    shot = make_shot(PRESETS[name], num_blocks=8)
    model, _ = make_model(shot.model.transformer)
    film = render(shot, model)
    run = resume_from(shot, model, film, stop, WindowStore(tmp_path / "windows"))
    assert run.next_block == stop
    rest = torch.stack([run.step() for _ in range(shot.num_blocks - stop)])
    assert torch.equal(rest, film[stop:])


def test_a_lost_window_is_an_error(tmp_path: Path) -> None:
    shot = make_shot(PRESETS["rolling-forcing"], num_blocks=8)
    model, _ = make_model(shot.model.transformer)
    film = render(shot, model)
    with pytest.raises(StorageError, match="it was not kept"):
        resume_from(shot, model, film, 2).step()
    windows = WindowStore(tmp_path)
    run = resume_from(shot, model, film, 2, windows)
    path = tmp_path / "000002.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match="damaged"):
        run.step()
