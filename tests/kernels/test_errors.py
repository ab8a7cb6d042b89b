from __future__ import annotations

import pickle

import pytest

from longtake.kernels.errors import (
    CapacityError,
    ConfigError,
    LongtakeError,
    StorageError,
    WorkerError,
)

GROUPS = [
    (ConfigError, ValueError),
    (CapacityError, MemoryError),
    (StorageError, OSError),
    (WorkerError, RuntimeError),
]


@pytest.mark.parametrize(("group", "standard"), GROUPS)
def test_group_pickles_with_its_context_and_is_the_standard_type(
    group: type[LongtakeError], standard: type[Exception]
) -> None:
    error = group("the chunk is torn. Run verify.", block=3, rank=1, path="/film/kv")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is group
    assert isinstance(copy, standard)
    assert (copy.block, copy.rank, copy.path) == (3, 1, "/film/kv")
    assert str(copy) == "the chunk is torn. Run verify. (block 3, rank 1, path /film/kv)"


def test_message_alone() -> None:
    assert str(StorageError("gone")) == "gone"
