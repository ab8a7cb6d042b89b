"""The command line. Exit codes: 0 done, 1 failed, 2 bad input (one line says what and how to mend it), 3 interrupted.

Nothing here imports PyTorch before a command needs it: ``longtake --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.metadata
import json
import pkgutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from longtake.jobs import cluster_cli
from longtake.jobs.stopping import EXIT_INTERRUPTED, StopNow, StopSignals
from longtake.kernels.errors import ConfigError, LongtakeError
from longtake.offload.errors import LockedError, is_disk_full

if TYPE_CHECKING:
    from longtake.engine.config import ModelSpec, ShotConfig
    from longtake.engine.gang import Gang
    from longtake.jobs.film import Film
    from longtake.jobs.render import RenderJob

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2

_CLICK_INTERRUPTED = 130
# UsageError, of click or of the copy of it that newer releases of typer carry
_USAGE_ERRORS: tuple[type[Any], ...] = typer.BadParameter.__bases__

app = typer.Typer(
    name="longtake",
    help="Film-length video from autoregressive diffusion models.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

FilmPath = Annotated[Path, typer.Argument(metavar="FILM.toml", help="The film; docs/film.md has every key.")]

JsonPath = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write it as JSON; - is stdout.")]


def main() -> NoReturn:
    """Entry point of the console script; never returns."""
    with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):  # no stderr, or one that is no file
        faulthandler.enable()  # a crash in a library says where it was; it would leave an exit code and nothing else
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; errors that mean something to a user become one line on stderr."""
    try:
        code = app(arguments, standalone_mode=False)
    except _USAGE_ERRORS as error:
        return _fail(EXIT_BAD_INPUT, f"{error.format_message().rstrip('.')}; see longtake --help")
    except LockedError as error:  # nothing is wrong with the input: the same command works when the other one is done
        return _fail(EXIT_FAILED, str(error))
    except ConfigError as error:
        return _fail(EXIT_BAD_INPUT, str(error))
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_FAILED
    except (LongtakeError, OSError) as error:
        if is_disk_full(error):
            return _fail(EXIT_INTERRUPTED, f"no room on the disk, make some and run the same command again: {error}")
        if not isinstance(error, LongtakeError):
            if error.filename is None:
                raise
            return _fail(EXIT_FAILED, f"{error.filename}: {error.strerror}")
        return _fail(EXIT_FAILED, str(error))
    except (KeyboardInterrupt, StopNow, typer.Abort):
        return _fail(EXIT_INTERRUPTED, "interrupted; run the same command again to go on")
    if code == _CLICK_INTERRUPTED:
        return _fail(EXIT_INTERRUPTED, "interrupted; run the same command again to go on")
    return code if isinstance(code, int) else EXIT_DONE


def _fail(code: int, message: str) -> int:
    from longtake.jobs.source import one_line

    print(f"longtake: {one_line(message)}", file=sys.stderr)
    return code


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(importlib.metadata.version("longtake"))
        raise typer.Exit(EXIT_DONE)
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def render(
    film_path: FilmPath,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where everything goes; run again to go on.")],
    shot: Annotated[str | None, typer.Option(metavar="NAME", help="Only this shot and those it starts from.")] = None,
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda", help="Default: cuda if there is one.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away what an earlier run made of the shots.")] = False,
) -> int:
    """Render a film on this machine; running the same command again continues it.

    Several processes, one a GPU, render each shot together: torchrun --nproc-per-node N --no-python longtake render ...
    """
    from longtake.engine.place import place
    from longtake.jobs import render as rendering
    from longtake.jobs.film import load_film

    with StopSignals() as signals, ExitStack() as held:
        gang = None
        if place().is_one_of_many:
            from longtake.engine.gang import join

            gang = join()
            if not gang.leads:
                return rendering.follow(gang, signals.requested)
            held.enter_context(gang)
        film = load_film(film_path)
        if shot is not None:
            film.shot(shot)
        rendering.make_directory(out)
        device = rendering.check_device(device)
        job = rendering.RenderJob(
            film=film, configs=_resolve(film, place().size), directory=out, device=device, only=shot, fresh=fresh
        )
        finished = _render(job, signals.requested, gang)
        if gang is not None:
            gang.dismiss(EXIT_DONE if finished else EXIT_INTERRUPTED)
    if finished:
        return EXIT_DONE
    return _fail(EXIT_INTERRUPTED, "stopped at a block boundary; run the same command again to go on")


def _render(job: RenderJob, stop: Callable[[], bool], gang: Gang | None = None) -> bool:
    from longtake.jobs import render as rendering
    from longtake.jobs.progress import make_display, plain_console

    with make_display(plain_console(), job.num_frames) as display:
        render_shot, join = rendering.engine() if gang is None else rendering.engine(gang)
        return rendering.FilmRenderer(job, render_shot=render_shot, join=join, display=display, stop=stop).run()


@app.command()
def plan(
    film_path: FilmPath,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="cuda: bfloat16; cpu: float32.")] = "cuda",
    gpus: Annotated[int, typer.Option(metavar="N", help="Devices that render shots side by side.")] = 1,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of longtake bench rollout; default: this project's own.")
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Frames, blocks, bytes on device, host and disk, and time, before anything is rendered or rented."""
    from longtake.jobs import calibration as calibrating
    from longtake.jobs import plan as planning
    from longtake.jobs.film import load_film
    from longtake.jobs.quantities import format_bytes
    from longtake.jobs.tables import plan_table, print_table

    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: unknown device; write cpu or cuda")
    configs = _resolve(load_film(film_path))
    if not 1 <= gpus <= 4096:
        raise ConfigError(f"--gpus {gpus}: write a number from 1 to 4096")
    path = calibration or calibrating.shipped_calibration(device)
    known = calibrating.read_calibrations(path)
    plans = planning.plan_film(configs, "float32" if device == "cpu" else "bfloat16", known)
    if json_path is None:
        print_table(plan_table(plans, gpus))
        print(
            f"render: on {gpus} device{'s' * (gpus > 1)}, from the rollout benchmark on {known[0].source} ({path.name})"
        )
        for shot in plans:
            if shot.lacking_bytes:
                hint = 'raise cache.disk, or write keep = "needed"'
                print(f"{shot.name} stops with a full disk budget, {format_bytes(shot.lacking_bytes)} short; {hint}")
        return
    _write_json(json_path, planning.to_json(plans, gpus))


@app.command()
def calibrate(
    film_path: FilmPath,
    blocks: Annotated[int, typer.Option(metavar="N", help="Of each shot, from its first.")] = 12,
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda", help="Default: cuda if there is one.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: in the model's folder.")] = None,
) -> None:
    """Make the table of a film's model that the codecs pc2, pc3 and pc4 need, from what the model makes of the film."""
    from longtake.jobs.film import load_film
    from longtake.jobs.render import check_device
    from longtake.jobs.resolve import plain_film

    if not 1 <= blocks <= 4096:
        raise ConfigError(f"--blocks {blocks}: write a number from 1 to 4096")
    film = load_film(film_path)
    shots = list(_resolve(plain_film(film)).values())
    if len({shot.model.path for shot in shots}) > 1:
        raise ConfigError(f"{film_path}: its shots name several models; calibrate each with a film of its own")
    from longtake.engine.basis import BASIS_NAME, write_basis
    from longtake.engine.calibrate import calibrate as gather
    from longtake.engine.shot import parse_device

    turn_LHEE, rates = gather(shots, blocks, parse_device(check_device(device)), lambda line: print(line, flush=True))
    path = out or shots[0].model.path / BASIS_NAME
    write_basis(turn_LHEE, rates, path)
    print(path)


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The --out of a render.")],
    json_path: JsonPath = None,
) -> int:
    """Check every checksum of every shot; exit 1 and the list of what is bad."""
    from longtake.jobs import verify as verifying

    verdict = verifying.verify(directory)
    if json_path is not None:
        _write_json(json_path, verifying.to_json(verdict))
    elif verdict.damages:
        print("\n".join(damage.describe() for damage in verdict.damages))
    else:
        print(
            f"{directory}: {len(verdict.shots)} shots, {verdict.num_blocks} blocks of history, "
            f"{verdict.num_latents} of latents, {verdict.num_segments} segments: all whole"
        )
    if not verdict.damages:
        return EXIT_DONE
    for line in verifying.mends(verdict):
        print(f"longtake: to mend {line}", file=sys.stderr)
    num_bad = len(verdict.damages)
    return _fail(
        EXIT_FAILED, f"{num_bad} file{'s' * (num_bad > 1)} of {directory} {'are' if num_bad > 1 else 'is'} bad"
    )


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The --out of render or submit.")],
    html_path: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Where to write it; default: DIR/report.html.")
    ] = None,
) -> None:
    """One HTML page about a film: pictures, plots and figures of every shot; it needs no network and no other file."""
    from longtake.jobs.report import REPORT_NAME, write_report

    path = html_path or directory / REPORT_NAME
    write_report(directory, path)
    print(path)


@app.command()
def models() -> None:
    """The models that a film can name: shipped, fetched, and those that longtake pull can fetch."""
    from longtake.engine.presets import PRESETS
    from longtake.engine.store import fetched
    from longtake.engine.weights import SHIPPED, read_spec
    from longtake.jobs.tables import models_table, presets_table, print_table

    specs: dict[str, ModelSpec | str] = {}
    for name in (*SHIPPED, *fetched()):
        try:
            specs[name] = read_spec(name)
        except ConfigError as error:
            specs[name] = str(error)
    print_table(models_table(specs))
    rest = {name: preset for name, preset in PRESETS.items() if name not in specs}
    if rest:
        print("\nto be fetched with  longtake pull NAME:")
        print_table(presets_table(rest))


@app.command()
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model of longtake models.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list files, sizes and licences.")] = False,
) -> None:
    """Fetch a model into the local store (LONGTAKE_HOME); run again, it goes on where it stopped."""
    from longtake.engine import hub
    from longtake.jobs.quantities import format_bytes

    preset = hub.find_preset(name)
    listing = hub.list_files(name)
    for repo, licence in listing.licences:
        print(f"licence of {repo}: {licence}")
    for doubt in preset.unverified:
        print(f"not verified: {doubt}")
    if not preset.few_step:
        print("a base model: it needs guidance and many steps, which longtake does not do; other models build on it")
    print(f"{len(listing.files)} files, {format_bytes(listing.num_bytes)}")
    if dry_run:
        for file in listing.files:
            print(f"{file.repo}/{file.name} -> {file.target} ({format_bytes(file.num_bytes)})")
        return
    print(f"{name} is in {hub.pull(listing, lambda file: print(f'{file.repo}/{file.name}', flush=True))}")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def bench(context: typer.Context) -> int:
    """Measure: longtake bench NAME [options] --json FILE. Without a name: the list."""
    names = bench_names()
    arguments = list(context.args)
    if not arguments or arguments[0] in ("--help", "-h"):
        print("usage: longtake bench NAME [options] --json FILE")
        print("names:", ", ".join(names) if names else "none")
        return EXIT_DONE
    if arguments[0] not in names:
        from longtake.jobs.source import nearest, quote

        raise ConfigError(f"bench {quote(arguments[0])} is unknown; {nearest(arguments[0], names)}")
    module = importlib.import_module(f"longtake.engine.bench_{arguments[0]}")
    run_bench: Callable[[list[str]], int | None] = module.main
    return run_bench(arguments[1:]) or EXIT_DONE


cluster_cli.register(app)


def bench_names() -> list[str]:
    """Names of the benchmarks: the modules ``longtake.engine.bench_*``."""
    prefix = "bench_"
    engine = importlib.import_module("longtake.engine")
    found = (module.name for module in pkgutil.iter_modules(engine.__path__))
    return sorted(name.removeprefix(prefix) for name in found if name.startswith(prefix))


def _write_json(path: Path, data: object) -> None:
    text = json.dumps(data, indent=1) + "\n"
    if str(path) == "-":
        print(text, end="")
        return
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot be written ({error.strerror})") from error


def _resolve(film: Film, num_ranks: int = 1) -> dict[str, ShotConfig]:
    from longtake.engine.weights import read_spec
    from longtake.jobs.budgets import check_budgets
    from longtake.jobs.resolve import resolve

    configs = resolve(film, read_spec)
    check_budgets(film, configs, num_ranks)
    return configs
