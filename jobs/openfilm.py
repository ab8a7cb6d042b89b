"""A film that the director has open."""

from __future__ import annotations

from pathlib import Path

from longtake.jobs.ledger import LEDGER_NAME, FilmRecord, Ledger
from longtake.jobs.orders import FilmView, Gang, outcome


class OpenFilm:
    """A film's ledger with what is known of its leases in memory only: when each was heard of, counted, and saved."""

    def __init__(self, directory: str, ledger: Ledger, record: FilmRecord, now: float) -> None:
        self.directory, self.ledger, self.record = directory, ledger, record
        self.heard_s = {task.name: now for task in ledger.tasks.values() if task.leased}
        self.counted_s = dict(self.heard_s)
        self.saved_s: dict[str, float] = {}

    def view(self) -> FilmView:
        """For people."""
        tasks = tuple(self.ledger.tasks.values())
        return FilmView(directory=self.directory, film=self.record, tasks=tasks, outcome=outcome(tasks))

    def fits(self, gang: Gang) -> bool:
        """Whether a gang is of a kind and a size that the film allows."""
        return self.record.device == gang.device and gang.num_devices in self.record.gang_sizes


def open_ledger(directory: str) -> Ledger:
    """The ledger of a film's directory; see `Ledger`."""
    return Ledger(Path(directory) / LEDGER_NAME)
