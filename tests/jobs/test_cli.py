from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from longtake.jobs import cli
from longtake.jobs import render as rendering
from longtake.jobs.film import parse_film
from longtake.jobs.status import ShotStatus, State, StatusFile
from longtake.kernels.errors import CapacityError, ConfigError, StorageError

FILM = '[[shot]]\nname = "a"\nduration = "2s"\nprompt = "p"\nmodel = "models/tiny"\n'


@pytest.fixture
def film(tmp_path: Path, model_folder: Path) -> Path:
    path = tmp_path / "film.toml"
    path.write_text(FILM)
    return path


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr, without the name of the program."""
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("longtake: ")
    return lines[0].removeprefix("longtake: ")


def test_help_answers_without_pytorch() -> None:
    script = (
        "import sys; from longtake.jobs.cli import run; code = run(['--help']); print('torch' in sys.modules, code)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.stdout.splitlines()[-1] == "False 0"
    for command in ("render", "plan", "models", "pull", "bench"):
        assert command in result.stdout


@pytest.mark.parametrize("stderr", ["file", "none", "text"])
def test_a_crash_says_where_it_was(stderr: str) -> None:
    script = f"""
import io, os, signal, sys
from longtake.jobs import cli
def crash(arguments):
    os.kill(os.getpid(), signal.SIGSEGV)
cli.run = crash
if {stderr!r} != "file":
    sys.stderr = None if {stderr!r} == "none" else io.StringIO()
cli.main()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == -signal.SIGSEGV
    assert ("in crash" in result.stderr) == (stderr == "file")
    assert "Traceback" not in result.stderr


def test_the_console_script() -> None:
    result = subprocess.run(["longtake", "--version"], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip().count(".") == 2


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 0
    assert "Usage: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["render"], "Missing argument 'FILM.toml'; see longtake"),
        (["render", "film.toml"], "Missing option '--out'; see longtake --help"),
        (["rendre"], "No such command 'rendre'. Did you mean 'render'?"),
        (["render", "film.toml", "--out", "x", "--freshh"], "No such option: --freshh"),
        (["render", "nowhere.toml", "--out", "x"], "nowhere.toml: cannot be read (No such file or directory)"),
        (["plan", "nowhere.toml"], "nowhere.toml: cannot be read"),
        (["plan", "nowhere.toml", "--device", "tpu"], "--device tpu: unknown device; write cpu or cuda"),
        (["bench", "rolout"], 'bench "rolout" is unknown'),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (("prompt", "promt"), [], "film.toml:4: shot.promt: unknown key; did you mean \"prompt\"?"),
        (('prompt = "p"\n', ""), [], "film.toml:1: shot.prompt: missing"),
        (("2s", "-2s"), [], 'film.toml:3: shot.duration: "-2s" is no duration; write it like'),
        (("models/tiny", "minni"), [], "film.toml:5: shot.model: unknown model 'minni': did you mean 'mini'?"),
        (("models/tiny", "models/gone"), [], "film.toml:5: shot.model: unknown model"),
        (("models/tiny", "models/tiny\"\ncodec = \"itn4"), [], "film.toml:6: shot.codec: unknown codec 'itn4'"),
        (("models/tiny", "models/tiny\"\nsize = \"hd"), [], "film.toml:6: shot.size: \"hd\" is no size"),
        (("2s", "2s"), ["--shot", "b"], 'film.toml:1: shot: there is no shot "b"'),
        (("2s", "2s"), ["--device", "cuda:999"], "--device cuda:999: "),
        (("2s", "2s"), ["--device", "tpu"], "--device tpu: unknown device; write cpu, cuda or cuda:N"),
        (("2s", "2s"), ["--out", "film.toml/x"], "cannot be written (Not a directory)"),
        (("2s", "2s"), ["--out", "/proc/longtake"], "--out /proc/longtake: cannot be written"),
    ],
)  # fmt: skip
def test_render_refuses_bad_input(
    film: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: tuple[str, str],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(film.parent)
    film.write_text(FILM.replace(*change))
    assert cli.run(["render", "film.toml", "--out", "out", "--device", "cpu", *arguments]) == 2
    assert message in error_line(capsys)


def test_render(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The wiring, with an engine that writes nothing but its segment."""

    def render_shot(shot: object, folder: Path, device: str, **_: object) -> SimpleNamespace:
        (folder / "0.mp4").write_text("video")
        return SimpleNamespace(finished=True, segments=[folder / "0.mp4"])

    def join(segments: list[Path], out: Path) -> None:
        out.write_bytes(segments[0].read_bytes())

    monkeypatch.setattr(rendering, "engine", lambda: (render_shot, join))
    out = tmp_path / "out"
    assert cli.run(["render", str(film), "--out", str(out), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"a -> {out}/a/a.mp4", f"{out}/film.mp4"]
    assert json.loads((out / "status.json").read_text())["state"] == "SUCCEEDED"
    assert (out / "film.mp4").read_text() == "video"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("bad"), 2, "bad"),
        (CapacityError("full"), 1, "full"),
        (StorageError("torn\nfile"), 1, "torn\\nfile"),
        (KeyboardInterrupt(), 3, "interrupted; run the same command again to go on"),
    ],
)
def test_errors_become_exit_codes(
    film: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def render_shot(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(rendering, "engine", lambda: (render_shot, None))
    assert cli.run(["render", str(film), "--out", str(tmp_path / "out"), "--device", "cpu"]) == code
    assert error_line(capsys) == message


SLOW_ENGINE = textwrap.dedent("""
    import sys, time
    from types import SimpleNamespace
    from longtake.jobs import cli, render

    def render_shot(shot, folder, device, *, stop, progress):
        for block in range(shot.num_blocks):
            if stop():
                return SimpleNamespace(finished=False, segments=[])
            print("block", block, flush=True)
            while sys.argv[1] == "2" or not stop():
                time.sleep(0.01)
            (folder / f"{block}.done").write_text("")
        return SimpleNamespace(finished=True, segments=[])

    render.engine = lambda: (render_shot, None)
    sys.exit(cli.run(["render", *sys.argv[2:]]))
""")


@pytest.mark.parametrize(("number", "times"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)])
def test_signals(film: Path, tmp_path: Path, number: signal.Signals, times: int) -> None:
    """Once: the block is finished. Twice: at once. Either way exit 3, and the status says that it can go on."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", SLOW_ENGINE, str(times), str(film), "--out", str(out), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "block 0\n"
        os.kill(process.pid, number)
        assert process.stderr.readline() == f"longtake: {number.name}: finishing the block; once more stops at once\n"
        if times == 2:
            os.kill(process.pid, number)
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 3
    assert stdout == ""
    assert stderr.count("\n") == 1
    assert "run the same command again to go on" in stderr
    assert (out / "a" / "0.done").exists() == (times == 1)
    assert json.loads((out / "status.json").read_text())["shots"]["a"]["state"] == "PAUSED"


def test_plan(film: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", str(film)]) == 0
    table = capsys.readouterr().out
    assert "film" in table
    assert cli.run(["plan", str(film), "--json", "-"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["num_frames"], data["num_blocks"]) == (32, 3)
    assert cli.run(["plan", str(film), "--json", "/proc/x"]) == 2
    assert "--json /proc/x: cannot be written" in error_line(capsys)


def test_calibrate(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A film that asks for pc2 says what to run, and that command makes what it needs."""
    model, film = tmp_path / "model", tmp_path / "film.toml"
    shutil.copytree(tiny_model, model)
    shot = '[[shot]]\nname = "%s"\nduration = "1s"\nprompt = "p"\nmodel = "%s"\ncodec = "pc2"\ncache.first = "bf16"\n'
    film.write_text(shot % ("a", model))
    render = ["render", str(film), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.run(render) == 2
    message = error_line(capsys)
    assert message.startswith(f"{film}:6: shot.codec: ") and "longtake calibrate FILM.toml" in message
    elsewhere = ["calibrate", str(film), "--device", "cpu", "--blocks", "2", "--out", str(tmp_path / "no" / "table")]
    assert cli.run(elsewhere) == 2
    assert "cannot be written (No such file or directory); name another file with --out" in error_line(capsys)
    assert cli.run([*elsewhere[:-2], "--blocks", "0"]) == 2
    assert "--blocks 0: write a number from 1 to 4096" in error_line(capsys)
    assert cli.run(elsewhere[:-2]) == 0
    assert capsys.readouterr().out.splitlines() == ["a: 2 blocks", str(model / "history_basis.safetensors")]
    assert cli.run(render) == 0
    film.write_text(shot % ("a", model) + shot % ("b", "mini"))
    assert cli.run(elsewhere) == 2
    assert "calibrate each with a film of its own" in error_line(capsys).replace("\n", " ")


@pytest.mark.parametrize("command", ["status", "report", "verify", "pause", "logs"])
def test_a_directory_that_is_none(command: str, film: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (str(film), "x" * 5000):
        assert cli.run([command, name]) in (1, 2)
        assert name in error_line(capsys)


def test_status_says_words_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film = parse_film('[film]\ntitle = "a [/b] [red] :boat:"\n' + FILM)
    reason = "write size = [height, width] in [/tmp/x]"
    entry = ShotStatus(state=State.DEAD, num_blocks=3, num_frames=9, reason=reason)
    StatusFile(tmp_path, film).update({"a": entry})
    for options in ((), ("--follow",)):
        assert cli.run(["status", str(tmp_path), *options]) == 0
        said = capsys.readouterr().out
        assert "a [/b] [red] :boat:: DEAD" in said
        assert options or reason in said


def test_following_until_ctrl_c_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = ShotStatus(state=State.RUNNING, num_blocks=3, num_frames=9)
    StatusFile(tmp_path, parse_film(FILM)).update({"a": entry})
    for name in ("ledger.sqlite", "director.log"):
        (tmp_path / name).write_text("x")

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("longtake.jobs.cluster_cli.time.sleep", interrupted)
    for command in ("status", "logs"):
        assert cli.run([command, str(tmp_path), "--follow"]) == 0
        assert not capsys.readouterr().err


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["models"]) == 0
    assert "mini" in capsys.readouterr().out


def test_bench_lists_and_forwards(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench"]) == 0
    assert cli.run(["bench", "--help"]) == 0
    assert "usage: longtake bench NAME" in capsys.readouterr().out
    seen: list[list[str]] = []
    monkeypatch.setattr(cli, "bench_names", lambda: ["fake"])
    monkeypatch.setitem(sys.modules, "longtake.engine.bench_fake", SimpleNamespace(main=seen.append))
    assert cli.run(["bench", "fake", "--json", "x.json", "--blocks", "3"]) == 0
    assert seen == [["--json", "x.json", "--blocks", "3"]]
