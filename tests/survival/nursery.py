"""Renders that can be killed, without waiting for imports: a process that has loaded everything forks each of them.

Run as a script, it reads requests from stdin, one JSON object a line, and answers each with one on stdout::

    {"arguments": ["render", ...], "log": FILE, "signals": [[1.5, 9]], "kill_at": ["names", 3] | null}
    {"code": 0 | 3 | -9, "seconds": 2.1}

A forked child runs the command line as the console script does and writes what it says to the log. This process sends
it signals, each so many seconds after its start; or it kills itself when the step of a name is over for the n-th time.
PyTorch runs on one thread, so there is nothing that a fork could tear apart.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

# Steps of a block's way to the disk, as the spiller names them, and of the files beside it, as `watch` does.
STEPS = (
    "staged",
    "chunk",
    "chunks",
    "names",
    "journaled",
    "latents half written",
    "latents",
    "segment half written",
    "segment named",
    "segment journaled",
    "joined",
)
# Of a film that keeps only the history that is needed.
DROP_STEPS = ("drop journaled", "block deleted", "dropped")


class Nursery:
    """The parent's end. A context manager.

    Args:
        log: where the children's output goes.
        device: of the renders.
    """

    def __init__(self, log: Path, device: str = "cpu") -> None:
        self._log, self._device = log, device
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.survival.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # the second: whether there is a GPU is asked without using it, which a process that forks must not
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "PYTHONPATH": path},
            text=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests: IO[str] = self._process.stdin
        self._answers: IO[str] = self._process.stdout

    def render(
        self,
        film: Path,
        out: Path,
        *options: str,
        signals: Sequence[tuple[float, int]] = (),
        kill_at: tuple[str, int] | None = None,
    ) -> tuple[int, float]:
        """Run ``longtake render`` in a child.

        Returns:
            Its exit code, -9 if it was killed, and the seconds that it ran.
        """
        arguments = ["render", str(film), "--out", str(out), "--device", self._device, *options]
        request = {"arguments": arguments, "log": str(self._log), "signals": signals, "kill_at": kill_at}
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        answer = json.loads(self._answers.readline())
        return answer["code"], answer["seconds"]

    def log(self) -> str:
        """What the children said so far."""
        return self._log.read_text() if self._log.exists() else ""

    def __enter__(self) -> Nursery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._requests.close()
        self._answers.close()
        self._process.wait(timeout=60)


def main() -> None:
    """The nursery's loop."""
    import torch

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    import diffusers  # noqa: F401
    import transformers  # noqa: F401

    import longtake.engine.shot
    import longtake.engine.video
    import longtake.jobs.render
    import longtake.jobs.resolve  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        started = time.perf_counter()
        child = os.fork()
        if child == 0:
            _live(request)
        code = _wait(child, started, request["signals"])
        print(json.dumps({"code": code, "seconds": time.perf_counter() - started}), flush=True)


def _wait(child: int, started: float, signals: Sequence[tuple[float, int]]) -> int:
    for after_s, number in signals:
        while (left_s := started + after_s - time.perf_counter()) > 0:
            time.sleep(min(left_s, 0.02))
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _live(request: dict[str, Any]) -> None:
    """The child; never returns."""
    code = 99
    try:
        out = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if request["kill_at"] is not None:
            name, count = request["kill_at"]
            watch(kill_at(name, count))
        from longtake.jobs import cli

        code = cli.run(request["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def kill_at(name: str, count: int) -> Callable[[str], None]:
    """A step that kills this process when the one of that name is over for the count-th time."""
    seen = itertools.count(1)

    def step(over: str) -> None:
        if over == name and next(seen) == count:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    return step


def watch(step: Callable[[str], None]) -> None:
    """Have each step of `STEPS` reported when it is over."""
    from longtake.engine import latents, shotcache, video
    from longtake.offload.cache import KVCache
    from longtake.offload.files import write_file
    from longtake.offload.run import RunDirectory
    from longtake.offload.store import BlockStore

    class WatchedCache(KVCache):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options, on_step=lambda name, block: step(name))

    def after(owner: Any, method: str, name: str) -> None:
        plain = getattr(owner, method)

        def watched(*arguments: Any, **options: Any) -> Any:
            result = plain(*arguments, **options)
            step(name)
            return result

        setattr(owner, method, watched)

    def torn_write(ops: Any, path: Path, buffers: Sequence[Any]) -> int:
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(buffers[0][: buffers[0].size // 2].tobytes())
        step("latents half written")
        return write_file(ops, path, buffers)

    setattr(shotcache, "KVCache", WatchedCache)  # noqa: B010
    setattr(latents, "write_file", torn_write)  # noqa: B010
    after(latents.LatentLog, "write", "latents")
    after(video.SegmentWriter, "write", "segment half written")
    after(video.SegmentWriter, "close", "segment named")
    after(RunDirectory, "note_segment", "segment journaled")
    after(RunDirectory, "note_dropped", "drop journaled")
    after(RunDirectory, "drop", "dropped")
    after(BlockStore, "remove", "block deleted")
    after(video, "join", "joined")


if __name__ == "__main__":
    main()
