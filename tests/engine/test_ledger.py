"""The ledger: every byte that the allocator has given out has a name, and reading it harms nothing."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.engine import ledger as module
from longtake.engine.config import HistoryConfig
from longtake.engine.ledger import read_ledger, release_workspaces, reset_peak, rounding_bytes
from longtake.engine.rollout import Rollout
from longtake.engine.shotcache import open_cache
from tests.engine.small_rollout import GEOMETRY, make_shot, random_contexts, random_model

CUDA = torch.device("cuda")


def fake_rollout(device: str) -> Any:
    return SimpleNamespace(
        device=torch.device(device),
        memory=lambda: {"weights": 500, "recorded_passes": 120, "exchange_buffers": 50, "host_pool": 10_000},
        model=SimpleNamespace(exchange_bytes=50),
        passes=SimpleNamespace(pool_bytes=100),
        path=SimpleNamespace(partial_bytes=lambda num_queries: 2 * num_queries),
        timeline=SimpleNamespace(max_own_blocks=2),
        shot=SimpleNamespace(tokens_per_block=15),
    )


def test_what_is_left_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 600)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 900)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 1200)
    monkeypatch.setattr(module, "rounding_bytes", lambda device: 7)
    monkeypatch.setattr(module, "release_workspaces", lambda device: 32)
    found = read_ledger(fake_rollout("cuda"), {"vae": 20})
    assert found is not None and found.bytes_by_name == {
        "weights": 500,
        "vae": 20,
        "recorded_passes": 20,
        "exchange_buffers": 50,
        "attention_partials": 60,
        "activations": 900 - 600 + 100 - 60,
        "rounding": 7,
        "workspaces": 32,
    }
    assert (found.peak_bytes, found.peak_reserved_bytes) == (1050, 1200)
    assert found.to_json()["unnamed_share"] == pytest.approx(0.02)  # 650 held between blocks, 629 of them named


def test_without_cuda_there_is_none() -> None:
    assert read_ledger(fake_rollout("cpu")) is None
    assert reset_peak(torch.device("cpu")) == 0


def rollout_on_cuda(attention: str, graphs: bool) -> Rollout:
    config = replace(GEOMETRY, head_dim=64)
    model = random_model(config, "cuda")
    shot = make_shot(HistoryConfig(sink_blocks=1, recent_blocks=2), "int4", 12, size=(32, 96))
    shot = replace(shot, attention=attention, model=replace(shot.model, transformer=config))
    return Rollout(shot, model, random_contexts(model, 1), open_cache(shot, CUDA), graphs=graphs)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("attention", ["dense", "fp8"])
def test_every_byte_on_a_gpu(attention: str, graphs: bool) -> None:
    gc.collect()
    release_workspaces(CUDA)
    before, rounding = torch.cuda.memory_allocated(), rounding_bytes(CUDA)
    run = rollout_on_cuda(attention, graphs)
    for _ in range(8):
        run.step()
    reset_peak(CUDA)
    run.step()
    found = read_ledger(run, {"other tests'": before - rounding})
    assert found is not None
    assert (run.passes.pool_bytes > 0) == graphs
    assert found.bytes_by_name["activations"] > 0
    # tables of positions, latents in flight, what was recorded last
    assert abs(found.peak_bytes - sum(found.bytes_by_name.values())) < 4 << 20
    run.close()


@pytest.mark.gpu
def test_reading_it_between_blocks_changes_no_recorded_pass() -> None:
    def film(read: bool) -> Tensor:
        run, frames = rollout_on_cuda("fp8", graphs=True), []
        for _ in range(run.total_blocks):
            frames.append(run.step().cpu())
            if read:
                read_ledger(run)
                torch.cuda.empty_cache()
                noise = torch.full((64 << 20,), 0xFF, dtype=torch.uint8, device=CUDA)  # where workspaces were
                del noise
        assert run.passes.pool_bytes > 0
        run.close()
        return torch.stack(frames)

    assert torch.equal(film(False), film(True))


@pytest.mark.gpu
def test_a_recording_outlives_the_one_before_and_its_workspace() -> None:
    films = []
    for _ in range(2):  # the second is recorded on the same stream, after the first one's pool is gone
        run = rollout_on_cuda("dense", graphs=True)
        films.append(torch.stack([run.step() for _ in range(run.total_blocks - 2)]))
        release_workspaces(CUDA)
        torch.cuda.empty_cache()
        films[-1] = torch.cat((films[-1], torch.stack([run.step() for _ in range(2)]))).cpu()
        run.close()
        del run
    assert films[0].isfinite().all() and torch.equal(*films)
