"""A training state comes back as it was written, but for bfloat16's rounding of moments and averages."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from longtake.engine.mini.muon import Muon
from longtake.engine.mini.state import load_state, save_state


def small_trainer(seed: int) -> Any:
    torch.manual_seed(seed)
    model = nn.Linear(4, 3)
    return SimpleNamespace(
        model=model,
        matrices={"weight": model.weight},
        muon=Muon([model.weight], lr=0.1),
        adam=torch.optim.AdamW([model.bias], lr=0.1),
        average={name: p.detach().clone() for name, p in model.named_parameters()},
        device=torch.device("cpu"),
        step=7,
        elapsed_s=1.5,
    )


def test_round_trip(tmp_path: Path) -> None:
    first, second = small_trainer(0), small_trainer(1)
    first.model(torch.randn(2, 4)).square().sum().backward()
    first.muon.step()
    first.adam.step()
    second.step = 0
    save_state(tmp_path, first)
    load_state(tmp_path, second)
    assert second.step == 7 and second.elapsed_s == 1.5
    for name, parameter in first.model.named_parameters():
        other = dict(second.model.named_parameters())[name]
        assert torch.equal(parameter, other)
        optimiser, key = (("muon", "momentum"), ("adam", "exp_avg"))[name == "bias"]
        mine = getattr(first, optimiser).state[parameter][key]
        assert torch.allclose(getattr(second, optimiser).state[other][key], mine, rtol=1e-2, atol=1e-6)
