"""Budgets that hold too little are the film's mistake, told with its line; what a larger gang can hold is none."""

from __future__ import annotations

import pytest

from longtake.engine.config import ModelSpec
from longtake.jobs.budgets import check_budgets
from longtake.jobs.film import parse_film
from longtake.jobs.resolve import resolve
from longtake.kernels.errors import ConfigError

SHOT = '[[shot]]\nname = "a"\nduration = "5s"\nprompt = "p"\ncodec = "bf16"\n'
BLOCK = 2 * 2 * 180 * 256 * 8  # K and V, bf16, 3 * 6 * 10 tokens, dim 256, 8 layers


def check(spec: ModelSpec, text: str, num_ranks: int = 1) -> None:
    film = parse_film(text)
    check_budgets(film, resolve(film, lambda name: spec), num_ranks)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SHOT + f'cache.device = "{BLOCK - 1}B"\n', "film.toml:6: shot.cache.device: a device budget of 1,474,559"),
        (SHOT + f'cache.host = "{2 * BLOCK - 1}B"\n', "film.toml:6: shot.cache.host: a host budget of 2,949,119"),
        ('[film.cache]\ndevice = "0B"\n' + SHOT, "film.toml:2: film.cache.device: a device budget of 0 bytes"),
        (
            SHOT + f'history.policy = "retrieve"\ncache.disk = "{BLOCK}B"\n',
            "film.toml:7: shot.cache.disk: shot 'a': with policy = \"retrieve\" any of 7 blocks may be read again",
        ),
    ],
)  # fmt: skip
def test_a_budget_that_holds_too_little(spec: ModelSpec, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(spec, text)
    assert str(caught.value).startswith(message)


def test_the_least_that_does(spec: ModelSpec) -> None:
    check(spec, SHOT)
    check(spec, SHOT + f'cache = {{ device = "{BLOCK}B", host = "{2 * BLOCK}B", disk = "1B" }}\n')
    check(spec, SHOT + f'history.policy = "retrieve"\ncache.disk = "{7 * BLOCK}B"\n')


def test_a_gang_has_more(spec: ModelSpec) -> None:
    """The device's budget is of each; the host's is of the whole shot."""
    check(spec, SHOT + f'cache.device = "{BLOCK // 4}B"\n', num_ranks=4)
    with pytest.raises(ConfigError, match=r"cache\.device"):
        check(spec, SHOT + f'cache.device = "{BLOCK // 4}B"\n', num_ranks=2)
    with pytest.raises(ConfigError, match=r"cache\.host"):
        check(spec, SHOT + f'cache.host = "{BLOCK}B"\n', num_ranks=4)
