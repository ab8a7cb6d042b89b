"""The director as a detached actor: `Director` behind Ray, the keeper of gangs, and the writer of status files.

An asynchronous actor: everything runs on one event loop, so the ledgers have one writer and no locks. It is restarted
by Ray when it dies and begins with no film open; gangs and drivers name the directory in whatever they say, and the
ledger there is read again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any, TypeVar

import ray

from longtake.jobs.director import Director
from longtake.jobs.filmorder import FarmOptions
from longtake.jobs.fleet import Crewing, muster, parse_name
from longtake.jobs.gang import DIRECTOR, HEAD, NAMESPACE, GangSpec, launch
from longtake.jobs.ledger import FilmRecord
from longtake.jobs.metrics import FarmMetrics
from longtake.jobs.orders import Action, FilmView, Gang, Leave, Order, Outcome, Verdict
from longtake.jobs.publish import Publisher
from longtake.jobs.rental import RESOURCES, Rental
from longtake.jobs.states import Failure, Lease, Progress, Task
from longtake.jobs.wishes import take_wishes
from longtake.kernels.errors import ConfigError

SETTLED_S = 600.0
"""A film at its end is let go after so long; its job has done so within seconds, unless it was killed."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class DirectorActor:
    """See `Director`; the methods are its own, and each names what it is about."""

    def __init__(self, options: FarmOptions) -> None:
        self._options = options
        self._metrics = FarmMetrics()
        self._publisher = Publisher(self._metrics.show)
        self._mind = Director(lease_s=options.lease_s, publish=self._publisher.note, progress_s=1.0)
        self._changed = asyncio.Event()
        self._idle_since: dict[str, float] = {}
        self._launched: dict[str, float] = {}
        self._heard: dict[str, float] = {}
        self._num_young_deaths, self._no_launch_before = 0, 0.0
        self._rental = Rental()
        self._settled_since: dict[str, float] = {}
        self._watch: asyncio.Task[None] | None = None

    async def submit(self, directory: str, record: FilmRecord, tasks: list[Task]) -> FilmView:
        """Take a film on, or go on with it."""
        self._begin()
        self._mind.submit(directory, record, tasks)
        self._fulfil(directory, but=Action.PAUSE)  # whoever submits after a pause wants it to go on
        return self._woken(self._mind.view(directory))

    async def control(self, directory: str, action: Action, shot: str | None) -> FilmView:
        """Pause, resume, cancel, retry."""
        self._begin()
        return self._woken(self._mind.control(directory, action, shot))

    async def view(self, directory: str) -> FilmView:
        """The film as it stands."""
        self._begin()
        return self._mind.view(directory)

    async def film(self, directory: str) -> FilmRecord:
        """The film's record."""
        return self._mind.view(directory).film

    async def release(self, directory: str) -> None:
        """Write the film's last status and let go of its ledger."""
        if any(task.leased for task in self._mind.view(directory).tasks):
            return
        self._close(directory)

    async def next_order(self, gang: Gang, wait_s: float) -> Order | Leave | None:
        """A task for a gang; waits up to ``wait_s`` for one."""
        self._begin()
        self._heard[gang.name] = time.monotonic()
        until = time.monotonic() + wait_s
        while True:
            changed = self._changed
            answer = self._mind.next_order(gang)
            now = time.monotonic()
            if answer is not None:
                self._idle_since.pop(gang.name, None)
                return answer
            if now - self._idle_since.setdefault(gang.name, now) > self._options.gang_idle_s:
                return Leave()
            left = min(until - now, self._mind.next_wait_s() or wait_s)
            if until <= now:
                return None
            try:
                await asyncio.wait_for(changed.wait(), max(left, 0.01))
            except TimeoutError:
                continue

    async def heartbeat(self, lease: Lease, progress: Progress) -> Verdict:
        """A gang works on its task."""
        self._begin()
        self._heard[lease.gang] = time.monotonic()
        return self._mind.heartbeat(lease, progress)

    async def stopped(self, lease: Lease) -> bool:
        """A gang has stopped at a block boundary."""
        return self._woken(self._mind.stopped(lease))

    async def finish(self, lease: Lease, video: str | None) -> bool:
        """A gang has finished its task."""
        return self._woken(self._mind.finish(lease, video))

    async def fail(self, lease: Lease, failure: Failure) -> bool:
        """A gang's try failed."""
        return self._woken(self._mind.fail(lease, failure))

    def _woken(self, answer: T) -> T:
        """The answer, after waking the gangs that wait for work."""
        self._changed.set()
        self._changed = asyncio.Event()
        return answer

    def _begin(self) -> None:
        if self._watch is None or self._watch.done():
            self._watch = asyncio.get_running_loop().create_task(self._keep_watch())

    async def _keep_watch(self) -> None:
        while True:
            try:
                await self._look()
            except (OSError, ray.exceptions.RayError):
                log.exception("the director could not look after its gangs; it tries again")
            self._publisher.flush()
            await asyncio.sleep(self._options.watch_s)

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        names, hosts = await loop.run_in_executor(None, _cluster)
        self._mind.hosts = hosts
        gangs = {name: gang for name in names if (gang := parse_name(name)) is not None}
        self._idle_since = {name: since for name, since in self._idle_since.items() if name in gangs}
        self._mourn(set(gangs))
        self._mind.reconcile([*gangs, *self._launched])
        for view in self._mind.views():
            self._fulfil(view.directory)
        self._mind.tick()
        self._close_settled()
        for view in self._mind.views():
            self._metrics.show(view)  # Ray forgets what is not told again
        for name in self._stuck(set(gangs)):
            log.warning("killing %s, which said nothing for %g s", name, self._options.gang_stuck_s)
            await loop.run_in_executor(None, _kill, name)
        self._woken(None)
        known = [*gangs.values(), *(parse_name(name) for name in self._launched if name not in gangs)]
        await self._launch([gang for gang in known if gang is not None], hosts)

    def _close(self, directory: str) -> None:
        self._publisher.flush()
        self._mind.close(directory)
        self._publisher.forget(directory)

    def _close_settled(self) -> None:
        now = time.monotonic()
        settled = [
            view.directory
            for view in self._mind.views()
            if view.outcome is not Outcome.OPEN and not any(task.leased for task in view.tasks)
        ]
        self._settled_since = {where: self._settled_since.get(where, now) for where in settled}
        for directory, since in self._settled_since.items():
            if now - since > SETTLED_S:
                self._close(directory)

    def _stuck(self, alive: set[str]) -> list[str]:
        """Gangs that said nothing for long: shots of theirs went to others, but they may still hold the folders."""
        now = time.monotonic()
        begun = now + self._options.gang_start_s - self._options.gang_stuck_s
        self._heard = {name: self._heard.get(name, begun) for name in alive}
        return [name for name, heard in self._heard.items() if now - heard > self._options.gang_stuck_s]

    def _fulfil(self, directory: str, *, but: Action | None = None) -> None:
        try:
            for wish in take_wishes(directory):
                try:
                    if wish.action is not but:
                        self._mind.control(directory, wish.action, wish.shot)
                except ConfigError as error:
                    log.warning("%s", error)
                wish.done()
        except OSError as error:  # of this film's storage; the others are to be looked after
            log.warning("wishes wait in %s: %s", directory, error)

    def _mourn(self, alive: set[str]) -> None:
        """Notice gangs that died young, so that what cannot start is not started over and over."""
        now = time.monotonic()
        for name, since in list(self._launched.items()):
            if name in alive or now - since < 5.0:
                continue
            del self._launched[name]
            self._num_young_deaths = self._num_young_deaths + 1 if now - since < 60 else 0
            if self._num_young_deaths:
                self._no_launch_before = now + min(60.0, self._options.relaunch_s * 2.0 ** (self._num_young_deaths - 1))

    async def _launch(self, gangs: list[Crewing], hosts: dict[str, list[int]]) -> None:
        if time.monotonic() < self._no_launch_before:
            return
        loop = asyncio.get_running_loop()
        quiet_s = time.monotonic() - 2 * self._options.lease_s
        silent = [name for name, heard in self._heard.items() if heard < quiet_s]
        wanted = muster(self._mind.demand(), gangs, hosts, self._options.max_gangs, silent)
        if self._options.rents:
            lacking = () if self._at_limit(gangs) else wanted.lacking
            await loop.run_in_executor(None, self._rental.ask, lacking, hosts)
        homes = {view.film: view.directory for view in self._mind.views()}
        for crewing, film in wanted.started:
            spec = GangSpec(
                crewing=crewing,
                storage=f"{homes[film]}/.ray",
                max_failures=film.max_tries,
                lease_s=self._options.lease_s,
                grow_s=self._options.grow_s,
            )
            self._launched[crewing.name] = time.monotonic()
            log.info("starting %s for %s", crewing.name, film.title)
            try:
                await loop.run_in_executor(None, launch, spec)
            except OSError as error:  # of this film's storage; the others are to be looked after
                del self._launched[crewing.name]
                log.warning("no gang was started for %s: %s", film.title, error)

    def _at_limit(self, gangs: list[Crewing]) -> bool:
        return self._options.max_gangs is not None and len(gangs) >= self._options.max_gangs


def _cluster() -> tuple[list[str], dict[str, list[int]]]:
    """Names of the actors of the namespace, and devices of each host by kind."""
    list_nodes: Any = ray.nodes  # has no types
    alive = [node["Resources"] for node in list_nodes() if node["Alive"]]
    hosts = {
        device: [count for resources in alive if (count := int(resources.get(kind, 0)))]
        for device, kind in RESOURCES.items()
    }
    actors = ray.util.list_named_actors(all_namespaces=True)  # without: those of this job's namespace
    return [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE], hosts


def _kill(name: str) -> None:
    with contextlib.suppress(ValueError):  # it is gone already
        ray.kill(ray.get_actor(name, namespace=NAMESPACE))


def start_director(options: FarmOptions) -> None:
    """Make sure that the cluster has a director; one that is there keeps its options."""
    actor: Any = ray.remote(DirectorActor)
    actor.options(
        name=DIRECTOR,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        num_cpus=0,
        resources=HEAD,
        max_concurrency=1000,
    ).remote(options)
