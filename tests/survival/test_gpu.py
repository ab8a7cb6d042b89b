"""On a GPU, too, a render that is killed and run again makes what an undisturbed one makes, byte for byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longtake.engine.config import ModelConfig
from longtake.engine.random_model import write_random_model
from longtake.jobs.verify import verify
from tests.engine.test_gang_shot import chunks
from tests.survival.kills import FILM, NUM_HEADS, Survival, committed, contents
from tests.survival.nursery import STEPS, Nursery

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
# Heads as the kernels want them; as many as the plain film's model has.
MODEL = ModelConfig(num_heads=NUM_HEADS, head_dim=64, num_layers=2, ffn_dim=128, text_dim=32, freq_dim=32)


@pytest.fixture(autouse=True)
def need_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")


def test_killed_on_a_gpu(tmp_path: Path) -> None:
    with Nursery(tmp_path / "log", "cuda") as nursery:
        survival = Survival(nursery, tmp_path, write_random_model(tmp_path / "model", transformer=MODEL))
        tally = survival.random_kills(6, seed=4)
        assert tally.equal == tally.films > 0
        assert survival.kill_at(*((step, 1) for step in STEPS)) == len(STEPS)


def start_gang(film: Path, out: Path, num_ranks: int, log: Path) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "--no-python"]
    render = [sys.executable, "-c", "from longtake.jobs.cli import main; main()", "render"]
    arguments = [sys.executable, *launcher, *render, str(film), "--out", str(out), "--device", "cuda"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(arguments, env=environment, stdout=file, stderr=subprocess.STDOUT)


def ranks_of(gang: subprocess.Popen[bytes]) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(gang.pid)], check=True, capture_output=True, text=True)
    return sorted(map(int, found.stdout.split()))


@pytest.mark.multigpu
@pytest.mark.parametrize("num_ranks", [2, 1])
def test_a_rank_killed_on_two_gpus(num_ranks: int, tmp_path: Path) -> None:
    """The film is finished by two ranks, to the same bytes, or by one, with the history that was committed."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    film, log, out = tmp_path / "film.toml", tmp_path / "log", tmp_path / "killed"
    film.write_text(FILM.format(model=write_random_model(tmp_path / "model", transformer=MODEL)))
    assert start_gang(film, tmp_path / "undisturbed", 2, log).wait() == 0, log.read_text()
    gang = start_gang(film, out, 2, log)
    while not list(out.glob("arrival/segments/*.mp4")):
        with pytest.raises(subprocess.TimeoutExpired):
            gang.wait(0.1)
    os.kill(ranks_of(gang)[-1], signal.SIGKILL)
    assert gang.wait() != 0
    kept = chunks(out / "arrival", 0, committed(out / "arrival"))
    assert kept and len(kept) < len(chunks(tmp_path / "undisturbed" / "arrival", 0, 999))
    assert start_gang(film, out, num_ranks, log).wait() == 0, log.read_text()
    assert not verify(out).damages
    assert kept.items() <= chunks(out / "arrival", 0, 999).items()
    found, whole = contents(out), contents(tmp_path / "undisturbed")
    assert found.keys() == whole.keys()
    others = sorted(name for name in whole if found[name] != whole[name])
    assert num_ranks == 1 or not others, f"other bytes, with {len(kept)} chunks kept: {others}"
