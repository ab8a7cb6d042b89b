"""What a gang does with an order: render a shot in its folder, or join the film. No Ray.

This is rank 0's part: it asks, renders and answers. The other ranks of a gang follow its renderer.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Protocol

from longtake.engine.config import ModelSpec
from longtake.jobs.blockrecord import last_record
from longtake.jobs.film import parse_film
from longtake.jobs.hold import DirectorClient, Hold
from longtake.jobs.ledger import FilmRecord
from longtake.jobs.orders import Gang, Leave, Order
from longtake.jobs.progress import RateMeter
from longtake.jobs.render import BlockProgress, Join, RenderJob, RenderShot
from longtake.jobs.resolve import resolve
from longtake.jobs.shotlog import ShotLog
from longtake.jobs.source import one_line
from longtake.jobs.states import Failure, FailureKind, Lease, Progress, TaskKind
from longtake.jobs.status import FILM_NAME
from longtake.kernels.errors import LongtakeError, WorkerError
from longtake.offload.errors import LockedError, is_disk_full
from longtake.offload.lock import FolderLock

RETRY_S = 0.5
_MAX_MESSAGE = 2000
_MAX_FILMS = 8


class Observe(Protocol):
    """Told of every block, for metrics."""

    def __call__(self, film: str, shot: str, folder: Path, block: BlockProgress, /) -> None: ...


class Worker:
    """Rank 0 of a gang; keeps the renderer, and with it the model, from shot to shot.

    Args:
        client: of the director.
        gang: as the director knows it.
        device: cpu, cuda or cuda:N.
        lease_s: the director's.
        film: gives a film's record by its directory.
        read_model: reads a model's spec.
        render_shot, join: the engine.
        observe: told of every block.
    """

    def __init__(
        self,
        *,
        client: DirectorClient,
        gang: Gang,
        device: str,
        lease_s: float,
        film: Callable[[str], FilmRecord],
        read_model: Callable[[str], ModelSpec],
        render_shot: RenderShot,
        join: Join,
        observe: Observe = lambda film, shot, folder, block: None,
    ) -> None:
        self._client, self._gang, self._device, self._lease_s = client, gang, device, lease_s
        self._film, self._read_model = film, read_model
        self._render_shot, self._join, self._observe = render_shot, join, observe
        self._jobs: dict[tuple[str, str], RenderJob] = {}

    def run(self) -> None:
        """Work until the director has no use for this gang.

        Raises:
            Exception: an error after which this process should not go on; it was reported.
        """
        while True:
            asked = time.monotonic()
            answer = self._ask()
            if isinstance(answer, Leave):
                return
            if answer is not None:
                self.work(answer, asked)

    def _ask(self) -> Order | Leave | None:
        try:
            return self._client.next_order(self._gang)
        except ConnectionError:
            time.sleep(RETRY_S)
            return None

    def work(self, order: Order, asked: float) -> None:
        """Carry out an order and tell the director how it ended.

        Args:
            asked: by time.monotonic, when the order was asked for.
        """
        lease = order.lease
        failure: Failure | None = None
        error: Exception | None = None
        video, is_finished = None, False
        with Hold(self._client, lease, self._lease_s, since=asked) as hold:
            try:
                video, is_finished = self._carry_out(order, hold)
            except LockedError as locked:
                failure = Failure(kind=FailureKind.BUSY, signature="locked", message=one_line(str(locked)))
            except WorkerError as broken:  # another rank is gone, and this one is of no use without it
                error = broken
                failure = Failure(kind=FailureKind.CRASH, signature="rank", message=one_line(str(broken)))
            except LongtakeError as known:
                failure = explain(known)
                ShotLog(Path(lease.film) / lease.task).write(f"failed: {failure.message}")
            except Exception as unknown:  # the process's boundary: told, then raised
                error, failure = unknown, explain(unknown)
                ShotLog(Path(lease.film) / lease.task).write(traceback.format_exc())
            lost = hold.lost
        if not lost:
            self._tell(lambda: self._end(lease, failure, is_finished, video))
        if error is not None:
            raise error

    def _end(self, lease: Lease, failure: Failure | None, is_finished: bool, video: str | None) -> bool:
        if failure is not None:
            return self._client.fail(lease, failure)
        return self._client.finish(lease, video) if is_finished else self._client.stopped(lease)

    def _tell(self, say: Callable[[], bool]) -> None:
        """Say how a task ended; a director that cannot be reached for a whole lease has given it away anyway."""
        until = time.monotonic() + self._lease_s
        while time.monotonic() < until:
            try:
                say()
                return
            except ConnectionError:
                time.sleep(RETRY_S)

    def _carry_out(self, order: Order, hold: Hold) -> tuple[str | None, bool]:
        """(path of the video from DIR, whether finished)."""
        job = self._job(order)
        if order.kind is TaskKind.JOIN:
            return self._join_film(job), True
        name = order.lease.task
        directory, video = job.shot_directory(name), job.shot_video(name)
        with closing(FolderLock(job.directory / f".{name}.lock")):
            directory.mkdir(exist_ok=True)
            job.recipe(name).keep_in(directory)
            if not video.exists():
                log = ShotLog(directory)
                log.write(f"epoch {order.lease.epoch}: {self._gang.name} on {order.num_ranks} x {self._device}")
                progress = self._progress(job, name, hold, log)
                result = self._render_shot(
                    job.configs[name], directory, self._device, stop=hold.stop, progress=progress
                )
                if hold.lost or not result.finished:
                    log.write("lost the lease" if hold.lost else "stopped at a block boundary")
                    return None, False
                self._join(result.segments, video)
                log.write(f"finished: {video.name}")
        return f"{name}/{video.name}", True

    def _progress(self, job: RenderJob, name: str, hold: Hold, log: ShotLog) -> Callable[[BlockProgress], None]:
        meter, config = RateMeter(), job.configs[name]
        block_frames = config.model.block_frames * config.model.temporal_stride

        def progress(block: BlockProgress) -> None:
            rate = block_frames * meter.mark(block.block, block.seconds_block)
            hold.report(_told(block, rate, job.shot_directory(name)))
            what = f"in {block.seconds_block:.3f} s" if block.seconds_block else "goes on from here"
            log.write(f"block {block.block}/{block.num_blocks} {what}")
            self._observe(job.film.title, name, job.shot_directory(name), block)

        return progress

    def _join_film(self, job: RenderJob) -> str | None:
        """DIR/film.mp4; None where the shots are of different kinds, and each has its own video only."""
        if len({(c.height, c.width, c.fps, c.video_codec) for c in job.configs.values()}) > 1:
            return None
        self._join([job.shot_video(shot.name) for shot in job.film.shots], job.directory / FILM_NAME)
        return FILM_NAME

    def _job(self, order: Order) -> RenderJob:
        """The film of an order; those resolved last are kept."""
        key = (order.lease.film, order.content_hash)
        if key not in self._jobs:
            record = self._record(order.lease.film)
            film = parse_film(record.toml, record.source)
            job = RenderJob(
                film=film,
                configs=resolve(film, self._read_model),
                directory=Path(order.lease.film),
                device=self._device,
            )
            while len(self._jobs) >= _MAX_FILMS:
                del self._jobs[next(iter(self._jobs))]
            self._jobs[key] = job
        return self._jobs[key]

    def _record(self, directory: str) -> FilmRecord:
        """The film's record, from a director that may be restarting."""
        until = time.monotonic() + self._lease_s
        while True:
            try:
                return self._film(directory)
            except ConnectionError:
                if time.monotonic() > until:
                    raise
                time.sleep(RETRY_S)


def _told(block: BlockProgress, rate: float, folder: Path) -> Progress:
    """What the director hears of a block: with its tiers, once the shot has rendered one in this start."""
    record = last_record(folder) if block.seconds_block else None
    used = {} if record is None else {name: tier.used_bytes for name, tier in record.tiers.items()}
    return Progress(
        blocks_done=block.block,
        frames_done=block.frames_done,
        frames_per_s=rate if block.seconds_block else None,
        device_bytes=used.get("device", block.device_cache_bytes),
        host_bytes=used.get("host"),
        disk_bytes=used.get("disk"),
        stalled_s=None if record is None else record.stalled_s,
    )


def explain(error: Exception) -> Failure:
    """A failure with a signature that leaves out what differs from try to try: numbers."""
    message = one_line(f"{type(error).__name__}: {error}")[:_MAX_MESSAGE]
    kind = FailureKind.FULL if is_disk_full(error) else FailureKind.ERROR
    return Failure(kind=kind, signature=re.sub(r"\d+", "#", message), message=message)
