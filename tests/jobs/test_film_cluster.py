"""[film.cluster]: what a film asks of a cluster changes no frame."""

from __future__ import annotations

import pytest

from longtake.jobs.film import Film, parse_film
from longtake.jobs.film_cluster import ClusterSettings
from longtake.kernels.errors import ConfigError

SHOT = '[[shot]]\nname = "a"\nduration = "1s"\nprompt = "p"\n'


def film(table: str) -> Film:
    return parse_film(f"[film.cluster]\n{table}\n{SHOT}")


def test_defaults_and_values() -> None:
    assert parse_film(SHOT).cluster == ClusterSettings()
    cluster = film("gpus_per_shot = [1, 2, 4]\npriority = -3\nmax_failures = 2").cluster
    assert cluster == ClusterSettings(gang_sizes=(1, 2, 4), priority=-3, max_failures=2)
    assert film("gpus_per_shot = 2").cluster.gang_sizes == (2,)


def test_no_hash_knows_of_it() -> None:
    assert film("priority = 9").content_hash == parse_film(SHOT).content_hash


@pytest.mark.parametrize("value", ["0", "[]", "[2, 1]", "[1, 1]", '"2"', "true", "[1, 65]", "1.5"])
def test_what_is_no_gang(value: str) -> None:
    with pytest.raises(ConfigError, match=r"film.toml:2: film.cluster.gpus_per_shot: .* write gpus_per_shot = 1"):
        film(f"gpus_per_shot = {value}")


def test_an_unknown_key() -> None:
    with pytest.raises(ConfigError, match='did you mean "priority"'):
        film("prioritty = 1")
