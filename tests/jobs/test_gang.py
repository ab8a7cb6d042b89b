"""A gang's worker without Ray: leases held and lost, orders carried out, failures told; how many gangs there are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from longtake.engine.config import ModelSpec, ShotConfig
from longtake.engine.shot import BlockProgress, ShotResult
from longtake.jobs.director import Director
from longtake.jobs.fleet import Crewing, Muster, muster, parse_name
from longtake.jobs.hold import Hold
from longtake.jobs.ledger import FilmRecord
from longtake.jobs.orders import Action, Gang, Leave, Order, Outcome, Verdict
from longtake.jobs.shotlog import ShotLog
from longtake.jobs.states import JOIN_NAME, Failure, Lease, Progress, Task, TaskKind
from longtake.jobs.status import State
from longtake.jobs.work import Worker, explain
from longtake.kernels.errors import CapacityError, WorkerError
from longtake.offload.errors import DiskFullError
from longtake.offload.lock import FolderLock

LEASE = Lease(film="f", task="a", epoch=1, gang="g")
TOML = """\
[film]
model = "tiny"
[[shot]]
name = "a"
duration = "1s"
prompt = "p"
[[shot]]
name = "b"
duration = "1s"
prompt = "p"
after = "a"
"""


class Deaf:
    """A director that answers heartbeats as told; None means not at all."""

    def __init__(self, answer: Verdict | None) -> None:
        self.answer = answer
        self.told: list[Progress] = []

    def heartbeat(self, lease: Lease, progress: Progress) -> Verdict:
        self.told.append(progress)
        if self.answer is None:
            raise ConnectionError
        return self.answer


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 100
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(("answer", "lost"), [(Verdict.STOP, False), (Verdict.LOST, True)])
def test_a_stop_and_a_loss_reach_the_renderer(answer: Verdict, lost: bool) -> None:
    client: Any = Deaf(Verdict.GO)
    with Hold(client, LEASE, 600.0, since=time.monotonic()) as hold:
        wait_for(lambda: bool(client.told))
        assert not hold.stop()
        client.answer = answer
        hold.report(Progress(blocks_done=1))
        wait_for(hold.stop)
        assert hold.lost == lost


def test_a_director_out_of_reach_ends_the_lease_early() -> None:
    client: Any = Deaf(None)
    now_s = 0.0
    with Hold(client, LEASE, 10.0, since=0.0, clock=lambda: now_s) as hold:
        wait_for(lambda: bool(client.told))
        now_s = 7.9
        assert not hold.stop() and not hold.lost
        now_s = 8.1
        assert hold.stop() and hold.lost, "before the director gives it away"


class Direct:
    """The director's mind, without Ray in between: one call at a time, as an actor has it."""

    def __init__(self, mind: Director) -> None:
        self.mind, self.lock = mind, threading.Lock()

    def next_order(self, gang: Gang) -> Order | Leave | None:
        with self.lock:
            answer = self.mind.next_order(gang)
        return Leave() if answer is None else answer

    def heartbeat(self, lease: Lease, progress: Progress) -> Verdict:
        with self.lock:
            return self.mind.heartbeat(lease, progress)

    def stopped(self, lease: Lease) -> bool:
        with self.lock:
            return self.mind.stopped(lease)

    def finish(self, lease: Lease, video: str | None) -> bool:
        with self.lock:
            return self.mind.finish(lease, video)

    def fail(self, lease: Lease, failure: Failure) -> bool:
        with self.lock:
            return self.mind.fail(lease, failure)


class Farm:
    """A director, a film of two shots, and a worker with a renderer of the test's."""

    def __init__(self, directory: Path, spec: ModelSpec) -> None:
        self.directory = directory
        self.mind = Director(lease_s=600.0)
        record = FilmRecord(
            title="t", content_hash="t", toml=TOML, source=str(directory / "film.toml"), backoff_s=0.0, max_same=2
        )
        shots = [
            Task(name="a"),
            Task(name="b", position=1, after=("a",), state=State.DEPEND),
            Task(name=JOIN_NAME, kind=TaskKind.JOIN, position=2, after=("a", "b"), state=State.DEPEND),
        ]
        self.mind.submit(str(directory), record, shots)
        self.error: Exception | None = None
        self.rendered: list[str] = []
        self.worker = Worker(
            client=Direct(self.mind),
            gang=Gang(name="g", incarnation="1"),
            device="cpu",
            lease_s=600.0,
            film=lambda where: self.mind.view(where).film,
            read_model=lambda name: spec,
            render_shot=self.render,
            join=self.join,
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
        if self.error is not None:
            raise self.error
        self.rendered.append(shot.name)
        for block in range(1, shot.num_blocks + 1):
            if stop():
                return ShotResult(finished=False, segments=())
            progress(
                BlockProgress(
                    block=block,
                    num_blocks=shot.num_blocks,
                    frames_done=block,
                    num_frames=shot.num_frames,
                    seconds_block=0.01,
                    device_cache_bytes=7,
                )
            )
        return ShotResult(finished=True, segments=(folder,))

    def join(self, segments: Sequence[Path], out: Path, /) -> None:
        out.write_text(" ".join(path.name for path in segments))

    def task(self, name: str) -> Task:
        return next(task for task in self.mind.view(str(self.directory)).tasks if task.name == name)


@pytest.fixture
def farm(tmp_path: Path, spec: ModelSpec) -> Farm:
    return Farm(tmp_path, spec)


def test_a_film_is_carried_out(farm: Farm) -> None:
    farm.worker.run()
    assert farm.rendered == ["a", "b"]
    assert (farm.directory / "film.mp4").read_text() == "a.mp4 b.mp4"
    assert farm.mind.view(str(farm.directory)).outcome is Outcome.DONE
    assert (farm.task("a").video, farm.task("a").device_bytes) == ("a/a.mp4", 7)
    log = (farm.directory / "a.log").read_text()
    assert "block 1/" in log and "finished: a.mp4" in log


def test_a_video_that_is_there_is_not_rendered_again(farm: Farm) -> None:
    order = farm.mind.next_order(Gang(name="g", incarnation="1"))
    assert isinstance(order, Order)
    farm.worker.work(order, time.monotonic())
    farm.mind.close(str(farm.directory))
    (farm.directory / "ledger.sqlite").unlink()
    again = Farm(farm.directory, farm.worker._read_model("tiny"))
    again.worker.run()
    assert again.rendered == ["b"]


def test_an_error_of_the_shot_is_told_and_the_worker_goes_on(farm: Farm) -> None:
    farm.error = CapacityError("the host tier has no room for block 12", block=12)
    farm.worker.run()
    task = farm.task("a")
    assert (task.state, task.num_same) == (State.DEAD, 2)
    assert task.reason is not None and "failed the same way 2 times: CapacityError: the host tier" in task.reason
    assert "failed: CapacityError" in (farm.directory / "a.log").read_text()


def test_an_unknown_error_is_told_and_ends_the_worker(farm: Farm) -> None:
    farm.error = RuntimeError("CUDA error: an illegal memory access")
    with pytest.raises(RuntimeError):
        farm.worker.run()
    assert farm.task("a").num_failures == 1
    assert "Traceback" in (farm.directory / "a.log").read_text()


def test_a_full_disk_pauses_the_shot(farm: Farm) -> None:
    farm.error = DiskFullError("the disk is full while writing the journal")
    farm.worker.run()
    task = farm.task("a")
    assert (task.state, task.num_failures) == (State.PAUSED, 0)
    assert task.reason is not None and "the disk is full" in task.reason
    farm.error = None
    farm.mind.control(str(farm.directory), Action.RESUME)
    farm.worker.run()
    assert farm.mind.view(str(farm.directory)).outcome is Outcome.DONE


def test_a_rank_that_died_is_a_crash_and_ends_the_worker(farm: Farm) -> None:
    farm.error = WorkerError("rank 1 died", rank=1)
    with pytest.raises(WorkerError):
        farm.worker.run()
    assert (farm.task("a").num_failures, farm.task("a").num_same, farm.task("a").state) == (1, 0, State.WAITING)


def test_a_shot_rendered_by_another_process_waits(farm: Farm) -> None:
    order = farm.mind.next_order(Gang(name="g", incarnation="1"))
    assert isinstance(order, Order)
    lock = FolderLock(farm.directory / ".a.lock")
    farm.worker.work(order, time.monotonic())
    lock.close()
    task = farm.task("a")
    assert (task.state, task.num_failures) == (State.WAITING, 0)
    assert task.reason is not None and "in use" in task.reason


def test_signatures_leave_numbers_out() -> None:
    first, second = (explain(MemoryError(f"cannot allocate {size} bytes")) for size in (10, 20))
    assert first.signature == second.signature
    assert first.message != second.message


def record(sizes: tuple[int, ...] = (1,), device: str = "cuda", priority: int = 0) -> FilmRecord:
    return FilmRecord(
        title="t", content_hash="t", toml="", source="", device=device, gang_sizes=sizes, priority=priority
    )


def test_as_many_gangs_as_there_are_devices() -> None:
    found = muster([record()] * 5, [], {"cuda": [2, 1], "cpu": [8]})
    assert [gang.num_devices for gang, _ in found.started] == [1, 1, 1]
    assert len(found.lacking) == 2
    mine = [gang for gang, _ in found.started]
    assert muster([record()] * 3, mine, {"cuda": [2, 1], "cpu": [8]}) == Muster(started=(), lacking=())
    assert len(muster([record()] * 5, [], {"cuda": [8]}, max_gangs=2).started) == 2


def test_the_largest_gang_that_a_host_has_room_for() -> None:
    started = muster([record((1, 2, 4))] * 3, [], {"cuda": [4, 3]}).started
    assert [gang.sizes for gang, _ in started] == [(1, 2, 4), (1, 2), (1,)]
    assert muster([record((2,))], [], {"cuda": [1, 1]}).started == (), "a gang stands on one host"


def test_a_gang_is_of_sizes_that_its_film_allows() -> None:
    (pair, _) = muster([record((1, 2))], [], {"cuda": [2]}).started[0]
    assert not pair.fits(record((1,))), "it would be rendered on two"
    assert pair.fits(record((1, 2, 4)))
    assert not pair.fits(record((1, 2), device="cpu"))


def test_what_waits_for_devices_keeps_them_from_less_urgent_films() -> None:
    single = Crewing(device="cuda", sizes=(1,), key="a")
    urgent, other = record((2,), priority=5), record((1,))
    found = muster([other, urgent, other], [single], {"cuda": [2]})
    assert (found.started, found.lacking) == ((), (urgent, other))
    found = muster([other, urgent, other], [single], {"cuda": [1, 1]})
    assert [film for _, film in found.started] == [other], "no host could ever hold it"


def test_nothing_is_expected_of_a_silent_gang() -> None:
    silent = Crewing(device="cuda", sizes=(1,), key="a")
    found = muster([record()], [silent], {"cuda": [2]}, silent=[silent.name])
    assert len(found.started) == 1
    found = muster([record()], [silent], {"cuda": [1]}, silent=[silent.name])
    assert (found.started, len(found.lacking)) == ((), 1), "it still has its device"


def test_gangs_are_known_by_their_names() -> None:
    crewing = Crewing(device="cuda", sizes=(1, 2), key="ab12")
    assert crewing.name == "gang-cuda-1_2-ab12"
    assert parse_name(crewing.name) == crewing
    for name in ("director", "gang-cuda-1-2-ab", "gang-cuda-x-ab", "gang-cuda-1_0-ab"):
        assert parse_name(name) is None


def test_the_log_takes_any_text(tmp_path: Path) -> None:
    ShotLog(tmp_path / "a").write("cannot open /films/\udcff.png\nTraceback")
    assert "cannot open /films/\\udcff.png\nTraceback" in (tmp_path / "a.log").read_text()
