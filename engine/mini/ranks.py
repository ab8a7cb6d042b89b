"""Processes that train one model together, as torchrun starts them: each draws its own data, gradients are averaged.

    torchrun --nproc-per-node 4 -m longtake.engine.mini.train_dit ...

All ranks begin with the same weights, average the same gradients and take the same steps, so weights stay equal bit for
bit. Whatever decides what all of them do next (the clock, Python's own random numbers) is the first rank's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from longtake.engine.place import place


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among those that train together.

    Args:
        index: 0 .. size - 1.
        size: processes.
    """

    index: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the rank that prints, saves and looks."""
        return self.index == 0

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the ranks, in one collective; all ranks have the same ones."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        joined = parameters_to_vector(gradients)
        dist.all_reduce(joined)
        vector_to_parameters(joined / self.size, gradients)

    def first(self, value: float, device: torch.device) -> float:
        """The first rank's value; waits for the device."""
        if self.size == 1:
            return value
        said = torch.tensor(value, dtype=torch.float64, device=device)
        dist.broadcast(said, src=0)
        return said.item()

    def share(self, batch: int) -> int:
        """This rank's part of a batch of all ranks.

        Raises:
            ValueError: it cannot be split evenly.
        """
        if batch % self.size:
            raise ValueError(f"a batch of {batch} cannot be split evenly over {self.size} processes")
        return batch // self.size


ALONE = Ranks()


def join(device: str) -> tuple[Ranks, torch.device]:
    """Meet the processes that torchrun started, if it did.

    Args:
        device: cpu or cuda: each rank takes the GPU of its number.
    """
    here = place()
    if not here.is_one_of_many:
        return ALONE, torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(here.local_rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    own = torch.device("cuda", here.local_rank) if device == "cuda" else torch.device(device)
    return Ranks(index=here.rank, size=here.size), own


def leave() -> None:
    """Part from the others; does nothing alone."""
    if dist.is_initialized():
        dist.destroy_process_group()
