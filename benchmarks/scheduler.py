"""What the director costs a shot: 200 short shots queued, rendered by a renderer that does nothing.

    python -P benchmarks/scheduler.py --json benchmarks/results/scheduler_cpu.json

Two ways: the director's mind called directly (SQLite and status.json, all durable), and as the actor of a local Ray,
asked by one gang's worker in this process: order, recipe, lock, heartbeats, report. Seconds a shot, however long it is.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from longtake.engine.config import HistoryConfig, HistoryPolicy, ModelConfig, ModelSpec, SamplerConfig, ShotConfig
from longtake.engine.record import summary, write
from longtake.engine.shot import BlockProgress, ShotResult
from longtake.jobs.director import Director
from longtake.jobs.filmorder import FarmOptions
from longtake.jobs.ledger import FilmRecord
from longtake.jobs.local_ray import local_ray
from longtake.jobs.orders import Gang, Order
from longtake.jobs.publish import Publisher
from longtake.jobs.states import JOIN_NAME, Progress, Task, TaskKind
from longtake.jobs.status import State

GANG = Gang(name="bench", incarnation="1")
SPEC = ModelSpec(
    path=Path("mini"),
    name="mini",
    transformer=ModelConfig(num_heads=4, head_dim=64, num_layers=8, ffn_dim=1024, text_dim=256),
    sampler=SamplerConfig(timesteps=(1000, 500), shift=3.0),
    block_frames=3,
    fps=16,
    height=96,
    width=160,
    text_len=64,
    history=HistoryConfig(policy=HistoryPolicy.WINDOW, sink_blocks=1, recent_blocks=6),
)


def film(num_shots: int) -> tuple[FilmRecord, list[Task]]:
    """A film of one-block shots that wait for nothing but a gang."""
    names = [f"s{index:03d}" for index in range(num_shots)]
    toml = "[film]\n" + "".join(f'[[shot]]\nname = "{name}"\nduration = "0.5s"\nprompt = "x"\n' for name in names)
    shots = [Task(name=name, position=index) for index, name in enumerate(names)]
    join = Task(
        name=JOIN_NAME, kind=TaskKind.JOIN, position=num_shots, after=tuple(names), state=State.DEPEND, num_blocks=1
    )
    return FilmRecord(title="bench", content_hash="bench", toml=toml, source="film.toml"), [*shots, join]


def direct(num_shots: int) -> list[float]:
    """Seconds a shot of order, heartbeat and report, in this process."""
    record, tasks = film(num_shots)
    samples = []
    with tempfile.TemporaryDirectory() as directory:
        mind = Director(publish=Publisher().note, progress_s=1.0)
        mind.submit(directory, record, tasks)
        for _ in range(num_shots):
            started = time.perf_counter()
            order = mind.next_order(GANG)
            assert isinstance(order, Order)
            mind.heartbeat(order.lease, Progress(blocks_done=1))
            mind.finish(order.lease, "video")
            samples.append(time.perf_counter() - started)
        mind.close(directory)
    return samples


def on_ray(num_shots: int) -> list[float]:
    """Seconds from the end of one shot's rendering to the beginning of the next one's."""
    from longtake.jobs.farm import start_director
    from longtake.jobs.gang import RayDirector
    from longtake.jobs.work import Worker

    record, tasks = film(num_shots)
    marks: list[float] = []

    def render(
        shot: ShotConfig,
        folder: Path,
        device: str,
        /,
        *,
        stop: Callable[[], bool],
        progress: Callable[[BlockProgress], None],
    ) -> ShotResult:
        marks.append(time.perf_counter())
        block = BlockProgress(
            block=1, num_blocks=1, frames_done=8, num_frames=8, seconds_block=1e-3, device_cache_bytes=0
        )
        progress(block)
        return ShotResult(finished=True, segments=())

    def join(segments: Sequence[Path], out: Path, /) -> None:
        out.touch()

    with tempfile.TemporaryDirectory() as directory, local_ray(num_cpus=2):
        start_director(FarmOptions(max_gangs=0))
        client = RayDirector()
        client.call("submit", directory, record, tasks, wait_s=60)
        worker = Worker(
            client=client,
            gang=GANG,
            device="cpu",
            lease_s=15.0,
            film=client.film,
            read_model=lambda name: SPEC,
            render_shot=render,
            join=join,
        )
        while len(marks) < num_shots:
            asked = time.monotonic()
            order = client.next_order(GANG)
            assert isinstance(order, Order)
            worker.work(order, asked)
        client.call("release", directory)
    return [after - before for before, after in itertools.pairwise(marks)]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, default=200)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    results = {"direct_s": summary(direct(arguments.shots)), "ray_s": summary(on_ray(arguments.shots))}
    print(results)
    write(arguments.json, "scheduler", {"num_shots": arguments.shots}, results)


if __name__ == "__main__":
    main()
