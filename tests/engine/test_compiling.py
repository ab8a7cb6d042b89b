"""Compiled layers: whatever Inductor finds fastest that day, the bytes are the same."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

from longtake.engine.compiling import compile_function
from longtake.engine.config import ModelConfig
from longtake.engine.rollout import Rollout
from longtake.engine.shotcache import open_cache
from tests.engine.small_rollout import GEOMETRY, make_shot, random_contexts, random_model
from tests.engine.test_graphs import WINDOW

# rows of 128, and of 1,536 as in the 1.3B model: Inductor has several shapes for either
CONFIGS = [replace(GEOMETRY, head_dim=64), replace(GEOMETRY, num_heads=12, head_dim=128)]


def test_the_sums_are_asked_to_be_deterministic() -> None:
    config = compile_function(torch.sum).get_compiler_config()  # type: ignore[attr-defined]
    assert config["deterministic"] and not torch._inductor.config.deterministic


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config.dim))
def test_timings_do_not_decide_about_bytes(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each film is compiled anew, and what is fastest is drawn by lot."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    shot = make_shot(WINDOW, "int4", 6, size=(32, 96))
    shot = replace(shot, model=replace(shot.model, transformer=config))

    def film(seed: int) -> Tensor:
        lots = random.Random(seed)

        def bench(tuner: CachingAutotuner, *_: Any, **__: Any) -> float:
            drawn.append(lots.random())
            return drawn[-1]

        monkeypatch.setattr(CachingAutotuner, "bench", bench)
        torch.compiler.reset()
        with fresh_cache():
            model = random_model(config, "cuda")
            model.compile_layers()
            run = Rollout(shot, model, random_contexts(model, 1), open_cache(shot, torch.device("cuda")))
            return torch.stack([run.step() for _ in range(run.total_blocks)]).cpu()

    drawn: list[float] = []
    films = [film(seed) for seed in range(4)]
    assert drawn, "nothing was tuned, so nothing is shown"
    assert all(torch.equal(films[0], other) for other in films[1:])
