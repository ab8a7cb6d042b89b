"""Gangs over NCCL: what the CPU tests say of gloo, on 2 and 4 GPUs."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longtake.engine.config import ModelConfig
from longtake.engine.gang import join
from longtake.engine.gang_failure import GangError
from longtake.engine.mesh import open_mesh, parse_mesh
from longtake.engine.model import CausalWan
from longtake.engine.peer_exchange import open_sums
from longtake.engine.place import place
from longtake.engine.random_model import write_random_model
from longtake.engine.shot import ShotRenderer
from longtake.engine.tensor_parallel import ShardedWan
from tests.engine.gangs import RankError, run_ranks
from tests.engine.test_gang_shot import chunks, latents, make_shot

pytestmark = [pytest.mark.multigpu, pytest.mark.gpu]

# bfloat16 weights and sums; outputs are of order 1, rounding of 2**-8 over the layers.
TOLERANCE = 0.08

CONFIG = ModelConfig(num_heads=4, head_dim=64, num_layers=3, ffn_dim=500, text_dim=64, freq_dim=64)
MESHES = {2: ("sp=2", "tp=2", "tp=2,norms"), 4: ("sp=4", "tp=4", "tp=2,sp=2", "tp=4,norms", "tp=2,sp=2,norms")}


def need(num_ranks: int) -> None:
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs")


def random_weights() -> dict[str, Tensor]:
    torch.manual_seed(5)
    weights = {}
    for name, tensor in CausalWan(CONFIG).state_dict().items():
        scale = 0.3 if tensor.ndim == 1 else tensor[0].numel() ** -0.5
        weights[name] = torch.randn_like(tensor) * scale
    return weights


def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def flow(model: CausalWan, device: torch.device) -> Tensor:
    torch.manual_seed(6)
    latents = torch.randn(1, 16, 3, 12, 20).to(device, torch.bfloat16)
    text = torch.randn(1, 16, CONFIG.text_dim).to(device)
    times = torch.full((1, 3), 500.0, device=device)
    with torch.inference_mode():
        result: Tensor = model(latents, times, model.text_context(text), attend)
    return result.float().cpu()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_stores_into_other_ranks_give_what_collectives_give(num_ranks: int) -> None:
    need(num_ranks)
    by_stores, by_collectives = (
        run_ranks(on_every_mesh, num_ranks, MESHES[num_ranks], True, LONGTAKE_PEER_MEMORY=wanted) for wanted in "10"
    )
    for index, text in enumerate(MESHES[num_ranks]):
        apart = abs(by_stores[0][index] - by_collectives[0][index]).max()
        assert apart <= (TOLERANCE if "norms" in text else 0), text  # sums over ranks are rounded otherwise


def on_every_mesh(rank: int, meshes: tuple[str, ...], compiled: bool) -> list[Any]:
    with join() as gang:
        device, found = torch.device(gang.device("cuda")), []
        for text in meshes:
            with torch.device("meta"):
                model = ShardedWan(CONFIG, open_mesh(parse_mesh(text)))
            parts = {name: model.own_part(name, tensor) for name, tensor in random_weights().items()}
            model.load_state_dict(parts, assign=True)
            model.cast(torch.bfloat16).to(device).eval().requires_grad_(False)
            if compiled:
                model.compile_layers()
            found.append(flow(model, device).numpy())
            stores = place().peer_memory and (model.mesh.sp.size > 1 or model.mesh.shape.split_norms)
            assert (model.exchange_bytes > 0) == stores, "how ranks exchange"
        gang.any(False)
        return found


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_sharded_equals_whole(num_ranks: int, compiled: bool) -> None:
    need(num_ranks)
    device = torch.device("cuda")
    whole = CausalWan(CONFIG)
    whole.load_state_dict(random_weights())
    whole.cast(torch.bfloat16).to(device).eval().requires_grad_(False)
    expected = flow(whole, device)
    ranks = run_ranks(on_every_mesh, num_ranks, MESHES[num_ranks], compiled)
    assert all(isinstance(found, list) for found in ranks), ranks
    for index, text in enumerate(MESHES[num_ranks]):
        flows = [torch.from_numpy(found[index]) for found in ranks]
        torch.testing.assert_close(flows[0], expected, rtol=0, atol=TOLERANCE)
        assert all(torch.equal(flows[0], other) for other in flows), f"{text}: ranks differ"


def render(rank: int, model: Path, folder: Path, blocks: int) -> bool:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > blocks

    with join() as gang:
        return ShotRenderer(gang)(make_shot(model), folder, "cuda", stop=stop, progress=lambda _: None).finished


@pytest.mark.parametrize("mesh", ["", "tp"])
def test_shots_go_on_with_other_numbers_of_gpus(mesh: str, tmp_path: Path) -> None:
    need(2)
    four = ModelConfig(num_heads=4, head_dim=64, num_layers=2, ffn_dim=128, text_dim=32, freq_dim=32)
    model = write_random_model(tmp_path / "four", transformer=four)
    sizes = (4, 2, 1, 4) if torch.cuda.device_count() >= 4 else (2, 1, 2)
    folder, blocks = tmp_path / "arrival", [1, 2, 1, 9][-len(sizes) :]
    kept: dict[str, tuple[str, int]] = {}
    for num_ranks, count in zip(sizes, blocks, strict=True):
        axes = f"{mesh}={num_ranks}" if mesh else ""
        found = run_ranks(render, num_ranks, model, folder, count, LONGTAKE_MESH=axes)
        assert all(isinstance(one, bool) for one in found), found
        now = chunks(folder, 0, 99)
        assert kept.items() <= now.items()
        kept = now
    assert found[0]
    alone = tmp_path / "alone"
    assert run_ranks(render, 1, model, alone, 99) == [True]
    assert latents(folder).shape == latents(alone).shape
    assert latents(folder).isfinite().all()


def die(rank: int, by_stores: bool) -> None:
    with join(3600.0) as gang:  # no collective's own limit ends this
        x = torch.ones(1 << 20, device=gang.device("cuda"))
        axis = open_mesh(parse_mesh(f"tp={gang.size}")).tp
        sums = open_sums(axis, 64, 64, x.dtype, x.device)
        assert sums is not None

        def exchange() -> None:
            if by_stores:
                sums.reduce_scatter(x.view(1, -1, 64)[:, : 64 * gang.size])
            else:
                dist.all_reduce(x)
            torch.cuda.synchronize()

        exchange()
        if rank == gang.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        exchange()
        gang.any(False)


@pytest.mark.parametrize("by_stores", [False, True], ids=["nccl", "barrier"])
def test_a_killed_rank_ends_all_while_others_wait(by_stores: bool) -> None:
    need(2)
    found = run_ranks(die, 2, by_stores, timeout_s=120)
    assert isinstance(found[0], GangError) or str(found[0]) == "died with 1"
    assert isinstance(found[1], RankError)
