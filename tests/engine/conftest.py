"""For tests of the engine: one small model and two prompts."""

from __future__ import annotations

import pytest

from longtake.engine.model import CausalWan, TextContext
from tests.engine.small_rollout import random_contexts, random_model


@pytest.fixture(scope="session")
def model() -> CausalWan:
    return random_model()


@pytest.fixture(scope="session")
def contexts(model: CausalWan) -> list[TextContext]:
    return random_contexts(model, 2)
