from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longtake.jobs.film import Film, parse_film
from longtake.jobs.status import ShotStatus, State, StatusFile, film_state, read_status
from longtake.kernels.errors import ConfigError, StorageError


def film(num_shots: int = 2) -> Film:
    shot = '[[shot]]\nname = "s{}"\nduration = "9s"\nprompt = "p"\n'
    return parse_film("".join(shot.format(index) for index in range(num_shots)), "harbour.toml")


def entry(state: State = State.RUNNING, **values: Any) -> ShotStatus:
    return ShotStatus(state=state, num_blocks=7, num_frames=81, **values)


def read(directory: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((directory / "status.json").read_text())
    return data


def test_each_update_changes_its_own_shots(tmp_path: Path) -> None:
    status = StatusFile(tmp_path, film())
    status.update({"s1": entry(State.DEPEND)})
    status.update({"s0": entry(State.RUNNING, blocks_done=3, eta_s=4.5)})
    data = read(tmp_path)
    assert list(data["shots"]) == ["s0", "s1"]
    assert (data["title"], data["state"], data["film"], data["video"]) == (
        "harbour",
        "RUNNING",
        film().content_hash,
        None,
    )
    assert data["shots"]["s0"]["eta_s"] == 4.5
    (tmp_path / "film.mp4").write_text("")
    status.update({})
    assert read(tmp_path)["video"] == "film.mp4"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": 9}', '{"format": 1, "film": "other", "shots": {"s0": {}}}']
)
def test_a_file_that_is_no_status_of_this_film_is_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    StatusFile(tmp_path, film()).update({"s1": entry()})
    assert list(read(tmp_path)["shots"]) == ["s1"]


def _update_many(directory: str, index: int) -> None:
    status = StatusFile(Path(directory), film(4))
    for done in range(20):
        status.update({f"s{index}": entry(blocks_done=done)})


def test_processes_do_not_lose_each_others_updates(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_update_many, args=(str(tmp_path), index)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert {name: shot["blocks_done"] for name, shot in read(tmp_path)["shots"].items()} == {
        f"s{i}": 19 for i in range(4)
    }


def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write the status: No such file.*status\.json"):
        StatusFile(tmp_path / "gone", film()).update({})


@pytest.mark.parametrize(
    ("states", "state"),
    [
        (["SUCCEEDED", "RUNNING"], State.RUNNING),
        (["RUNNING", "DEAD"], State.DEAD),
        (["SUCCEEDED", "SUCCEEDED"], State.SUCCEEDED),
        (["PAUSED", "DEPEND"], State.PAUSED),
        (["WAITING", "DEPEND"], State.WAITING),
        (["RUNNING", "CHECKPOINT"], State.CHECKPOINT),
    ],
)
def test_the_films_state(states: list[str], state: State) -> None:
    assert film_state([State(name) for name in states]) is state


def test_what_was_written_is_read(tmp_path: Path) -> None:
    StatusFile(tmp_path, film()).update({"s0": entry(eta_s=4.5), "s1": entry(State.DEAD, reason="é")})
    status = read_status(tmp_path)
    assert (status.title, status.state, list(status.shots)) == ("harbour", State.DEAD, ["s0", "s1"])
    assert status.shots["s0"] == entry(eta_s=4.5)
    assert status.to_json() == read(tmp_path)
    assert list(read_status(tmp_path, "s1").shots) == ["s1"]
    with pytest.raises(ConfigError, match=r'there is no shot "s3"; known: s0, s1'):
        read_status(tmp_path, "s3")
    with pytest.raises(ConfigError, match="nothing was rendered here"):
        read_status(tmp_path / "nowhere")


def _shot(**values: object) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["shots"]["s0"].update(values)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("title"),
        lambda data: data.update(updated_s="yesterday"),
        lambda data: data.update(updated_s=float("nan")),
        lambda data: data.update(shots=["s0"]),
        lambda data: data["shots"].update(s0="RUNNING"),
        lambda data: data["shots"]["s0"].pop("num_frames"),
        _shot(state="REHEARSING"),
        _shot(frames_done="3"),
        _shot(reason=3),
        _shot(frames_per_s=float("inf")),
    ],
)
def test_a_damaged_status_is_one_error_and_written_anew(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    StatusFile(tmp_path, film()).update({"s0": entry()})
    data = read(tmp_path)
    change(data)
    (tmp_path / "status.json").write_text(json.dumps(data))
    with pytest.raises(StorageError, match=r"^the status is damaged; .*writes it anew"):
        read_status(tmp_path)
    StatusFile(tmp_path, film()).update({"s0": entry()})
    assert list(read_status(tmp_path).shots) == ["s0"]


def test_of_another_version(tmp_path: Path) -> None:
    """A later version of the same format may say more; another format is named."""
    StatusFile(tmp_path, film()).update({"s0": entry(), "s1": entry(gpu_hours=0.5)})
    data = read(tmp_path)
    data["colour"] = data["shots"]["s0"]["colour"] = "blue"
    del data["shots"]["s1"]["gpu_hours"]
    data["shots"]["s0"]["eta_s"] = 5
    (tmp_path / "status.json").write_text(json.dumps(data))
    shots = read_status(tmp_path).shots
    assert (shots["s0"].eta_s, shots["s1"]) == (5, entry())
    (tmp_path / "status.json").write_text(json.dumps(data | {"format": 2}))
    with pytest.raises(ConfigError, match=r"status.json is of format 2, this longtake reads 1; use the version"):
        read_status(tmp_path)


def test_the_docs_show_a_status(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "running.md").read_text()
    (tmp_path / "status.json").write_text(text.split("```json\n")[1].split("```")[0])
    assert read_status(tmp_path).shots["arrival"].blocks_done == 3
