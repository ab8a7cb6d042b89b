"""``longtake render`` from the film to film.mp4, with the real engine and a tiny random model."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from longtake.engine.video import probe
from longtake.jobs import cli

FILM = """\
[film]
model = "{model}"
seed = 3
[[shot]]
name = "arrival"
duration = "2s"
prompt = "pan right"
[[shot.beat]]
at = "1s"
prompt = "a boat"
[[shot]]
name = "quay"
duration = "1.5s"
after = "arrival"
prompt = "pan left"
"""


def write_film(directory: Path, model: Path) -> Path:
    path = directory / "film.toml"
    path.write_text(FILM.format(model=model))
    return path


def render(film: Path, out: Path, *options: str) -> int:
    return cli.run(["render", str(film), "--out", str(out), "--device", "cpu", *options])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_film_of_two_shots(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film, out = write_film(tmp_path, tiny_model), tmp_path / "out"
    assert render(film, out) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{out}/film.mp4"
    assert any(line.startswith("arrival block 3/3") for line in lines)
    video = probe(out / "film.mp4")
    # 3 blocks of 2 latent frames: 1 + 5 * 4; then 12 of the 16 frames of 2 more blocks
    assert (video.frames, video.height, video.width) == (21 + 12, 32, 48)
    assert video.fps == 8
    assert probe(out / "quay" / "quay.mp4").frames == 12
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == "SUCCEEDED"
    assert status["shots"]["arrival"]["frames_done"] == 21
    assert len((out / "arrival" / "metrics.jsonl").read_text().splitlines()) == 3

    before = digest(out / "film.mp4")
    assert render(film, out) == 0
    assert digest(out / "film.mp4") == before
    assert len((out / "arrival" / "metrics.jsonl").read_text().splitlines()) == 3
    assert render(film, out, "--fresh") == 0
    assert digest(out / "film.mp4") == before


def test_a_shot_alone_brings_the_one_it_starts_from(tmp_path: Path, tiny_model: Path) -> None:
    film, out = write_film(tmp_path, tiny_model), tmp_path / "out"
    assert render(film, out, "--shot", "quay") == 0
    assert (out / "film.mp4").exists()
    assert render(film, tmp_path / "other", "--shot", "arrival") == 0
    assert not (tmp_path / "other" / "film.mp4").exists()
    assert digest(out / "arrival" / "arrival.mp4") == digest(tmp_path / "other" / "arrival" / "arrival.mp4")


STOPPED_IN_A_BLOCK = """
import sys, time
from longtake.jobs import cli, render

plain = render.engine

def engine():
    render_shot, join = plain()

    def until_stopped(shot, folder, device, *, stop, progress):
        def told(block):
            progress(block)
            while not stop():
                time.sleep(0.01)

        return render_shot(shot, folder, device, stop=stop, progress=told)

    return until_stopped, join

render.engine = engine
sys.exit(cli.run(sys.argv[1:]))
"""


def test_stopped_and_gone_on_gives_the_same_film(tmp_path: Path, tiny_model: Path) -> None:
    film, out = write_film(tmp_path, tiny_model), tmp_path / "out"
    film.write_text(film.read_text().replace('"2s"', '"9s"'))
    arguments = ["render", str(film), "--out", str(out), "--device", "cpu"]
    command = [sys.executable, "-c", STOPPED_IN_A_BLOCK, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("arrival block 1/10")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 3
    assert errors.splitlines()[-1] == "longtake: stopped at a block boundary; run the same command again to go on"
    assert json.loads((out / "status.json").read_text())["state"] == "PAUSED"
    assert not (out / "film.mp4").exists()
    assert render(film, out) == 0
    assert render(film, tmp_path / "undisturbed") == 0
    assert digest(out / "film.mp4") == digest(tmp_path / "undisturbed" / "film.mp4")
