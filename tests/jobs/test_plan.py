from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longtake.engine.basis import write_basis
from longtake.engine.config import ModelSpec, ShotConfig
from longtake.engine.model import CausalWan
from longtake.engine.presets import preset_spec
from longtake.engine.shotcache import open_cache
from longtake.engine.weights import read_spec
from longtake.jobs.film import parse_film
from longtake.jobs.plan import plan_film, plan_shot, to_json
from longtake.jobs.resolve import resolve
from longtake.kernels.errors import CapacityError

FILM = """\
[film]
codec = "bf16"
[[shot]]
name = "a"
duration = "1m"
prompt = "p"
[[shot]]
name = "b"
duration = "3s"
prompt = "q"
after = "a"
history.policy = "full"
after_blocks = 2
"""


@pytest.fixture
def configs(spec: ModelSpec) -> dict[str, ShotConfig]:
    return resolve(parse_film(FILM), lambda name: spec)


def test_arithmetic_by_hand(configs: dict[str, ShotConfig]) -> None:
    a, b = plan_film(configs)
    block = 2 * 2 * 180 * 256 * 8  # K and V, bf16, 3 * 6 * 10 tokens, dim 256, 8 layers
    assert (a.num_frames, a.num_blocks, a.num_latents) == (969, 81, 243)
    assert (a.attended_blocks, a.codec, a.bits_per_element) == (7, "bf16", 16.0)
    assert (a.block_bytes, a.arena_bytes) == (block, 8 * block)
    assert (a.history_bytes, a.dense_history_bytes) == (81 * block, 81 * block)
    assert a.scratch_bytes == 8 * block // 8
    assert (b.num_blocks, b.num_prefix_blocks, b.attended_blocks) == (4, 2, 5)
    assert b.history_bytes == 6 * block


def test_it_is_what_the_engine_allocates(configs: dict[str, ShotConfig], spec: ModelSpec) -> None:
    for config in configs.values():
        plan = plan_shot(config, "float32")
        cache = open_cache(config, torch.device("cpu"), config.after_blocks)
        assert cache.memory()["device_arena"] == plan.arena_bytes
        model = CausalWan(spec.transformer)
        assert plan.weights_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
        assert plan.device_bytes == plan.arena_bytes + plan.scratch_bytes + plan.weights_bytes


def test_a_device_budget_caps_the_arena(spec: ModelSpec) -> None:
    film = parse_film(FILM.replace('prompt = "p"', 'prompt = "p"\ncache.device = "5MiB"'))
    plan = plan_film(resolve(film, lambda name: spec))[0]
    assert plan.arena_bytes == 3 * plan.block_bytes <= 5 << 20


def test_retrieval_keeps_a_little_of_every_block(spec: ModelSpec) -> None:
    film = (
        '[film.history]\npolicy = "%s"\nsink_blocks = 1\nrecent_blocks = 2\n'
        '[[shot]]\nname = "a"\nduration = "40s"\nprompt = "p"\n'
    )
    window, retrieve = (
        plan_film(resolve(parse_film(film % policy), lambda name: spec))[0] for policy in ("window", "retrieve")
    )
    assert (window.attended_blocks, retrieve.attended_blocks) == (3, 7)
    assert retrieve.arena_bytes == 8 * retrieve.block_bytes
    assert retrieve.summary_bytes == 2 * retrieve.num_blocks * spec.transformer.dim
    assert retrieve.device_bytes - window.device_bytes > retrieve.summary_bytes
    small = film % "retrieve" + f'cache = {{ disk = "{retrieve.history_bytes - 1}B" }}\n'
    with pytest.raises(CapacityError, match=f"give the disk {retrieve.history_bytes:,} bytes"):
        plan_film(resolve(parse_film(small), lambda name: spec))


def test_a_models_table_counts_where_a_codec_needs_it(spec: ModelSpec) -> None:
    """Its matrices, and the mean of its rates."""
    spec.path.mkdir()
    rates = tuple((mean,) * 6 + (mean - 2, mean + 2) for mean in (9, 12, 16))
    write_basis(torch.zeros(8, 4, 128, 128, dtype=torch.bfloat16), rates, spec.path / "history_basis.safetensors")
    film = '[[shot]]\nname = "a"\nduration = "5s"\nprompt = "p"\ncodec = "%s"\n'
    turned, plain = (plan_film(resolve(parse_film(film % codec), lambda name: spec))[0] for codec in ("pc3", "tc3"))
    assert turned.basis_bytes == 8 * 4 * 128 * 128 * 4 and plain.basis_bytes == 0
    assert 2.9 < turned.bits_per_element <= 3.0
    assert turned.device_bytes - plain.device_bytes == turned.basis_bytes + turned.arena_bytes - plain.arena_bytes


def test_the_default_codec_is_the_models(spec: ModelSpec) -> None:
    """pc2 once there is a table."""
    film = parse_film('[[shot]]\nname = "a"\nduration = "5s"\nprompt = "p"\n')
    (before,) = plan_film(resolve(film, lambda name: spec))
    spec.path.mkdir()
    turn = torch.zeros(8, 4, 128, 128, dtype=torch.bfloat16)
    write_basis(turn, ((9,) * 8, (12,) * 8, (16,) * 8), spec.path / "history_basis.safetensors")
    (after,) = plan_film(resolve(film, lambda name: spec))
    assert (before.codec, after.codec) == ("int4", "pc2")
    assert after.bits_per_element <= 2.33 and after.arena_bytes < 0.55 * before.arena_bytes


def test_what_shots_share_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A film of hundreds of shots is planned in seconds."""
    counted: list[tuple[int, int]] = []

    def count(vae: object, height: int, width: int) -> int:
        counted.append((height, width))
        return 0

    monkeypatch.setattr("longtake.engine.vae.decoder_state_bytes", count)
    shots = [
        f'[[shot]]\nname = "s{i}"\nduration = "1s"\nprompt = "p"\nsize = [112, {176 + i // 2 * 16}]' for i in range(4)
    ]
    assert len(plan_film(resolve(parse_film("\n".join(shots)), read_spec))) == 4
    assert counted == [(14, 22), (14, 24)]


@pytest.mark.parametrize(("keep", "lacking"), [("all", 5), ("needed", 0)])
def test_a_disk_budget_that_a_render_would_fill(spec: ModelSpec, keep: str, lacking: int) -> None:
    shot = '[[shot]]\nname = "a"\nduration = "5s"\nprompt = "p"\n'
    whole = plan_film(resolve(parse_film(shot), lambda name: spec))[0]
    assert (whole.num_blocks, whole.lacking_bytes) == (7, 0)
    film = f'{shot}cache = {{ disk = "{2 * whole.block_bytes}B", keep = "{keep}" }}\n'
    plan = plan_film(resolve(parse_film(film), lambda name: spec))[0]
    assert plan.lacking_bytes == lacking * whole.block_bytes
    assert whole.disk_bytes - plan.disk_bytes == 5 * whole.block_bytes


def test_totals(configs: dict[str, ShotConfig]) -> None:
    plans = plan_film(configs)
    data = to_json(plans)
    assert data["num_frames"] == 969 + 48
    assert data["device_bytes"] == max(plan.device_bytes for plan in plans)
    assert data["history_bytes"] == sum(plan.history_bytes for plan in plans)
    assert [shot["name"] for shot in data["shots"]] == ["a", "b"]


def test_blocks_committed_anew_count(spec: ModelSpec) -> None:
    beat = '[[shot.beat]]\nat = "30s"\nprompt = "r"\nswitch = "recache"\n'
    text = FILM.split('[[shot]]\nname = "b"')[0]
    before, after = (plan_film(resolve(parse_film(text + extra), lambda name: spec))[0] for extra in ("", beat))
    assert after.history_bytes - before.history_bytes == 6 * before.block_bytes
    assert after.device_bytes == before.device_bytes


def test_14b_in_fp8_fits_24_gib_with_a_compressed_history() -> None:
    spec = preset_spec("krea-14b", Path("unused"))
    film = '[film]\nweights = "%s"\ncodec = "int4"\n[[shot]]\nname = "a"\nduration = "1h"\nprompt = "p"\n'
    half, full = (
        plan_film(resolve(parse_film(film % precision), lambda name: spec))[0] for precision in ("fp8", "model")
    )
    assert full.weights_bytes > 28e9
    assert 14e9 < half.weights_bytes < 16e9
    assert half.device_bytes < 20 << 30 < 24 << 30 < full.device_bytes
