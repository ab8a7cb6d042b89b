"""Every line of the table of methods may stand in a film, and means the same there."""

from __future__ import annotations

import pytest

from longtake.engine.methods import methods
from longtake.engine.weights import read_spec
from longtake.jobs.film import parse_film
from longtake.jobs.resolve import resolve


@pytest.mark.parametrize("name", methods())
def test_a_method_is_a_line_of_a_film(name: str) -> None:
    method, spec = methods()[name], read_spec("mini")
    film = parse_film(f'film = {method.line}\n[[shot]]\nname = "a"\nduration = "5s"\nprompt = "p"\n')
    shot = resolve(film, lambda _: spec)["a"]
    assert (shot.cache, shot.history.prune, shot.attention) == (method.cache, method.prune, method.attention)
    assert method.applied_to(shot) == shot
