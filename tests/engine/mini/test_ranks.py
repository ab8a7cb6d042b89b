"""Training by several processes: gradients are means, data differ, weights stay equal."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from longtake.engine.mini import train_dit
from longtake.engine.mini.clips import ClipBuffer
from longtake.engine.mini.distiller import DistilConfig, Distiller
from longtake.engine.mini.ranks import ALONE, Ranks, join, leave
from longtake.engine.mini.train_dit import TrainConfig, Trainer
from tests.engine.gangs import run_ranks
from tests.engine.mini.test_distil import BEGINNING, LAYOUT, SMALL, SMALL_POOL, FewClips, small_model

CPU = torch.device("cpu")


def mean(rank: int) -> list[list[float]]:
    ranks, _ = join("cpu")
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, 1))]
    parameters[0].grad, parameters[2].grad = torch.tensor([1.0, 2.0]) * (rank + 1), torch.full((1, 1), 4.0 * rank)
    ranks.average_gradients(parameters)
    found = [p.grad.flatten().tolist() for p in parameters if p.grad is not None]
    assert ranks.first(float(rank + 7), CPU) == 7.0
    leave()
    return found


def test_gradients_are_averaged() -> None:
    assert run_ranks(mean, 2) == [[[1.5, 3.0], [2.0]]] * 2


def train(rank: int) -> tuple[list[float], list[float]]:
    """Losses and last weights of a rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dit, "LAYOUT", LAYOUT)
        patch.setattr(train_dit, "BEGINNING", BEGINNING)
        patch.setattr(train_dit, "TRANSFORMER", SMALL)
        ranks, device = join("cpu")
        config = TrainConfig(batch=4, beginnings_batch=6, warmup_steps=1)
        clips = cast(ClipBuffer, FewClips())
        trainer = Trainer(config, clips, clips, device, ranks)
        trainer.elapsed_s = config.horizon_s  # the second phase: the history is the model's own now and then
        losses = [trainer.train_step().item() for _ in range(4)]
        leave()
        return losses, weights_of(trainer.model).tolist()


def distil(rank: int) -> tuple[list[float], list[float]]:
    """Fake losses and last weights of a rank."""
    ranks, device = join("cpu")
    config = DistilConfig(batch=4, beginnings_batch=8, fake_updates=2, fake_first=1, refresh_steps=2)
    clips = cast(ClipBuffer, FewClips())
    layouts = (LAYOUT, BEGINNING)
    distiller = Distiller(config, small_model(), clips, clips, layouts, device, pool=SMALL_POOL, ranks=ranks)
    losses = [distiller.iterate()[2].item() for _ in range(5)]
    leave()
    return losses, torch.cat([weights_of(distiller.model), weights_of(distiller.fake)]).tolist()


def weights_of(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("function", [train, distil])
def test_weights_stay_equal_though_data_differ(function: object) -> None:
    (losses, weights), (other_losses, other_weights) = run_ranks(function, 2)  # type: ignore[arg-type]
    assert all(mine != theirs for mine, theirs in zip(losses, other_losses, strict=True))
    assert weights == other_weights


def test_a_batch_that_cannot_be_split() -> None:
    assert (ALONE.share(3), Ranks(size=4).share(8)) == (3, 2)
    with pytest.raises(ValueError, match="9 cannot be split evenly over 2"):
        Ranks(size=2).share(9)
