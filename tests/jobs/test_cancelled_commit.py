"""A shot cancelled in the middle of a commit: the block is whole or not there, and a retry ends with the same film."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longtake.engine.config import ShotConfig
from longtake.engine.weights import read_spec
from longtake.jobs.director import Director
from longtake.jobs.ledger import FilmRecord
from longtake.jobs.orders import Action, Gang, Outcome
from longtake.jobs.render import BlockProgress, Join, RenderShot, ShotResult, engine
from longtake.jobs.states import JOIN_NAME, Task, TaskKind
from longtake.jobs.status import State
from longtake.jobs.verify import verify
from longtake.jobs.work import Worker
from longtake.offload.cache import KVCache
from longtake.offload.run import RunDirectory
from longtake.offload.store import BlockStore
from tests.jobs.test_gang import Direct, wait_for

NUM_BLOCKS = 7


class Farm:
    """A director with one shot, and a gang with the real engine.

    Where the shot is to be cancelled, its renderer waits for that behind its third block.
    """

    def __init__(self, directory: Path, model: Path) -> None:
        directory.mkdir()
        self.where, self.mind = str(directory), Director(lease_s=600.0)
        toml = f'[film]\nmodel = "{model}"\n[[shot]]\nname = "a"\nduration = "6.6s"\nprompt = "p"\n'
        record = FilmRecord(title="t", content_hash="t", toml=toml, source=str(directory / "film.toml"))
        join_task = Task(name=JOIN_NAME, kind=TaskKind.JOIN, position=1, after=("a",), state=State.DEPEND)
        self.mind.submit(self.where, record, [Task(name="a", num_blocks=NUM_BLOCKS), join_task])
        self.is_cancelled, self.told = False, threading.Event()
        self._num_done, self.client = 0, Direct(self.mind)
        self._stop: Callable[[], bool] = lambda: False
        self._nudge: Callable[[], None] = lambda: None
        renderer: tuple[RenderShot, Join] = engine()
        self._render_shot = renderer[0]
        self.worker = Worker(
            client=self.client,
            gang=Gang(name="g", incarnation="1"),
            device="cpu",
            lease_s=600.0,
            film=lambda where: self.mind.view(where).film,
            read_model=read_spec,
            render_shot=self.render,
            join=renderer[1],
        )

    def render(
        self,
        shot: ShotConfig,
        folder: Path,
        device: str,
        /,
        *,
        stop: Callable[[], bool],
        progress: Callable[[BlockProgress], None],
    ) -> ShotResult:
        def held() -> bool:
            if self.is_cancelled and self._num_done >= 3:
                assert self.told.wait(100)
            return stop()

        def kept(block: BlockProgress) -> None:
            progress(block)
            self._num_done = block.block
            self._nudge = lambda: progress(block)

        self._stop = stop
        return self._render_shot(shot, folder, device, stop=held, progress=kept)

    def cancel(self) -> None:
        """Cancel the shot, and wait until its renderer would hear of it at the next boundary."""
        with self.client.lock:
            self.mind.control(self.where, Action.CANCEL, "a")
        self._nudge()
        wait_for(self._stop)
        self.told.set()

    def shot(self) -> Task:
        return self.mind.view(self.where).tasks[0]


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    farm = Farm(tmp_path_factory.mktemp("undisturbed") / "out", tiny_model)
    farm.worker.run()
    return (Path(farm.where) / "film.mp4").read_bytes()


@pytest.mark.parametrize(
    ("part", "step"),
    [(KVCache, "begin_commit"), (BlockStore, "write_chunk"), (RunDirectory, "commit")],
    ids=["encoding", "writing", "journal"],
)
def test_cancelled_in_a_commit(
    part: type, step: str, tiny_model: Path, undisturbed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    farm = Farm(tmp_path / "out", tiny_model)
    farm.is_cancelled, plain = True, getattr(part, step)

    def cancelled(self: Any, block: int, *arguments: Any, **options: Any) -> Any:
        if block == 2 and not farm.told.is_set():
            farm.cancel()
        return plain(self, block, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(part, step, cancelled)
        farm.worker.run()
    assert (farm.shot().state, farm.shot().reason) == (State.DEAD, "cancelled")
    found = verify(Path(farm.where))
    assert not found.damages and 3 <= found.num_blocks < NUM_BLOCKS, "what was being committed is whole"

    farm.mind.control(farm.where, Action.RETRY, "a")
    farm.worker.run()
    assert farm.mind.view(farm.where).outcome is Outcome.DONE
    log = (Path(farm.where) / "a.log").read_text()
    assert f"block {found.num_blocks}/{NUM_BLOCKS} goes on from here" in log, "no block is rendered twice"
    assert (Path(farm.where) / "film.mp4").read_bytes() == undisturbed
