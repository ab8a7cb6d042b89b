"""The commands for films on a cluster: submit, status, pause, resume, cancel, retry, logs. Only submit imports Ray."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longtake.jobs.film_cluster import MAX_GANG, MAX_PRIORITY
from longtake.jobs.stopping import StopSignals
from longtake.kernels.errors import ConfigError

if TYPE_CHECKING:
    from longtake.jobs.film import Film
    from longtake.jobs.filmorder import FilmOrder

WISH_PATIENCE_S = 5.0

RunDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="The --out of submit.")]
ShotName = Annotated[str | None, typer.Option(metavar="NAME", help="Only this shot; without it the whole film.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (submit, status, pause, resume, cancel, retry, logs):
        app.command()(command)


def submit(
    film_path: Annotated[Path, typer.Argument(metavar="FILM.toml", help="The film; docs/film.md has every key.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="On storage that all hosts see; submit again to go on.")],
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="The cluster's dashboard; without it Ray runs here.")
    ] = None,
    gpus_per_shot: Annotated[
        int | None, typer.Option(metavar="N", help="GPUs for one shot; default: the film's.")
    ] = None,
    priority: Annotated[
        int | None, typer.Option(metavar="P", help="A higher one goes first and preempts; default: the film's.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Print the film's log and end as it ends.")] = False,
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda", help="Default: cuda on a cluster.")] = None,
) -> int:
    """Render a film on a Ray cluster; submitting it again continues it."""
    from longtake.jobs.film import load_film
    from longtake.jobs.render import check_device, make_directory

    with StopSignals() as signals:
        if gpus_per_shot is not None and not 1 <= gpus_per_shot <= MAX_GANG:
            raise ConfigError(f"--gpus-per-shot {gpus_per_shot}: write a number from 1 to {MAX_GANG}")
        if priority is not None and abs(priority) > MAX_PRIORITY:
            raise ConfigError(f"--priority {priority}: write a number from {-MAX_PRIORITY} to {MAX_PRIORITY}")
        film = load_film(film_path)
        if address is None:
            make_directory(out)
            device = check_device(device)
            _check(film, gpus_per_shot)
        elif device not in (None, "cpu", "cuda"):
            raise ConfigError(f"--device {device}: unknown device; write cpu or cuda")
        order = _order(film, out, device or "cuda", gpus_per_shot, priority, rents=address is not None)
        return _submit(order, address, wait, signals)


def _check(film: Film, gpus_per_shot: int | None) -> None:
    """Everything that needs the models is wrong here and now rather than in a job."""
    from longtake.engine.weights import read_spec
    from longtake.jobs.budgets import check_budgets
    from longtake.jobs.resolve import resolve

    check_budgets(film, resolve(film, read_spec), gpus_per_shot or film.cluster.gang_sizes[0])


def _order(
    film: Film, out: Path, device: str, gpus_per_shot: int | None, priority: int | None, *, rents: bool
) -> FilmOrder:
    from longtake.jobs.filmorder import FarmOptions, FilmOrder
    from longtake.jobs.ledger import FilmRecord

    _need_ray()
    record = FilmRecord(
        title=film.title,
        content_hash=film.content_hash,
        toml=Path(film.source.path).read_text(encoding="utf-8-sig"),
        source=str(Path(film.source.path).absolute()),
        device=device.split(":")[0],
        gang_sizes=film.cluster.gang_sizes if gpus_per_shot is None else (gpus_per_shot,),
        priority=film.cluster.priority if priority is None else priority,
        max_tries=film.cluster.max_failures,
    )
    return FilmOrder(directory=str(out.absolute()), record=record, options=FarmOptions(rents=rents))


def _need_ray() -> None:
    import importlib.util

    if importlib.util.find_spec("ray") is None:
        raise ConfigError("Ray is not installed; pip install 'longtake[ray]', or render here with longtake render")


def _submit(order: FilmOrder, address: str | None, wait: bool, signals: StopSignals) -> int:
    from longtake.jobs import submit as submission
    from longtake.jobs.local_ray import local_ray

    def say(line: str) -> None:
        print(line, flush=True)

    if address is not None:
        client = submission.connect(address)
        submitted = submission.submit(client, order)
        say(f"{'submitted' if submitted.is_new else 'running already'}: {submitted.job}")
        return submission.wait(client, submitted.job, say=say, stop=signals.requested) if wait else 0
    with local_ray() as dashboard:
        say(f"Ray runs here until the film is done; dashboard: {dashboard}")
        client = submission.connect(dashboard)
        submitted = submission.submit(client, order, python=submission.cluster_python(is_local=True))
        return submission.wait(client, submitted.job, say=say, stop=signals.requested)


def status(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The --out of render or submit.")],
    shot: ShotName = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep it up to date until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, like status.json.")] = False,
) -> None:
    """How far a film is, from its directory: no connection to the cluster is needed."""
    from rich.live import Live

    from longtake.jobs.status import read_status
    from longtake.jobs.status_table import goes_on, status_table
    from longtake.jobs.tables import print_table, table_console

    now = read_status(directory, shot)
    if as_json:
        print(json.dumps(now.to_json(), indent=1))
    elif not follow:
        print_table(status_table(now, time.time()))
    else:
        live = Live(status_table(now, time.time()), console=table_console(), auto_refresh=False)
        with live, contextlib.suppress(KeyboardInterrupt):
            while goes_on(now, shot):
                time.sleep(1.0)
                now = read_status(directory, shot)
                live.update(status_table(now, time.time()), refresh=True)


def pause(directory: RunDirectory, shot: ShotName = None) -> None:
    """Stop at the next block boundary and keep everything; resume goes on."""
    _wish(directory, "pause", shot)


def resume(directory: RunDirectory, shot: ShotName = None) -> None:
    """Go on with what was paused."""
    _wish(directory, "resume", shot)


def cancel(directory: RunDirectory, shot: ShotName = None) -> None:
    """Stop for good at the next block boundary; retry brings it back."""
    _wish(directory, "cancel", shot)


def retry(directory: RunDirectory, shot: ShotName = None) -> None:
    """Try dead shots again, from where they are."""
    _wish(directory, "retry", shot)


def logs(
    directory: RunDirectory,
    shot: ShotName = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing until Ctrl-C.")] = False,
) -> None:
    """What happened to a film, or block by block to one shot."""
    from longtake.jobs.shotlog import DIRECTOR_LOG

    known = _known_shots(directory, shot)
    path = directory / (DIRECTOR_LOG if shot is None else f"{shot}.log")
    if not path.exists() and not follow:
        raise ConfigError(f"{path}: no log yet; shots: {', '.join(known)}")
    position = 0
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            if path.exists():
                with open(path, encoding="utf-8", errors="replace") as file:
                    file.seek(position)
                    sys.stdout.write(file.read())
                    sys.stdout.flush()
                    position = file.tell()
            if not follow:
                return
            time.sleep(0.5)


def _wish(directory: Path, action: str, shot: str | None) -> None:
    """Leave a wish for the director and say whether it was taken."""
    from longtake.jobs.orders import Action
    from longtake.jobs.wishes import make_wish

    _known_shots(directory, shot)
    try:
        wish = make_wish(directory, Action(action), shot)
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be written ({error.strerror})") from error
    until = time.monotonic() + WISH_PATIENCE_S
    while time.monotonic() < until:
        if not wish.path.exists():
            print(f"{action}: taken")
            return
        time.sleep(0.1)
    print(f"{action}: no director has the film now; it is kept and taken when the film is submitted again")


def _known_shots(directory: Path, shot: str | None) -> list[str]:
    """Names of a submitted film's shots.

    Raises:
        ConfigError: no film was submitted there, or it has no such shot.
    """
    from longtake.jobs.ledger import LEDGER_NAME
    from longtake.jobs.status import read_status

    if not (directory / LEDGER_NAME).exists():
        raise ConfigError(f"{directory}: no film was submitted here; longtake submit FILM.toml --out {directory}")
    return list(read_status(directory, shot).shots)
