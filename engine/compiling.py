"""``torch.compile`` as the engine uses it: fixed shapes, and the same bytes whoever compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def compile_function(function: Callable[P, R]) -> Callable[P, R]:
    """Compile ``function`` for fixed shapes.

    By default Inductor times several launch shapes for each kernel of its own and keeps the fastest. For a sum over a
    row each adds in another order, so what else the machine was doing would decide about a film's bytes: ranks that
    compile at once choose differently than either finds chosen in the cache later, and a shot that goes on after the
    cache was cleared is another shot. Inductor's deterministic mode chooses the shapes of sums by rule and times the
    others only, which change no byte.
    """
    return torch.compile(function, dynamic=False, options={"deterministic": True})
