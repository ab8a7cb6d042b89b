"""How the ranks of a gang talk beside their collectives: one connection each to rank 0, watched by a thread.

Collectives cannot tell a slow rank from a dead one. These connections can: the system closes them when a process ends,
however it ends, so that its end is known on every rank at once. Messages are pickled; a connection counts only after
both ends proved that they know the gang's key.
"""

from __future__ import annotations

import contextlib
import hmac
import pickle
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from longtake.kernels.errors import WorkerError

# A process that lives says so; one that has not for this long is stopped, or its machine is gone.
HEARTBEAT_S = 5.0
LOST_AFTER_S = 60.0

_NONCE_BYTES = 32
# For one that knocked, to say who it is: strangers are not waited for longer.
_INTRODUCTION_S = 30.0


class Link:
    """Connections to other ranks and the thread that reads them.

    Args:
        connections: by rank; the link owns them.
        on_message: called in the link's thread with each message: (rank, message).
        on_lost: called in the link's thread when a rank's connection broke, or it fell silent: (rank, how).
        heartbeat_s: seconds between signs of life.
        lost_after_s: a rank without any for so many seconds is lost.
    """

    def __init__(
        self,
        connections: Mapping[int, Connection],
        on_message: Callable[[int, Any], None],
        on_lost: Callable[[int, str], None],
        heartbeat_s: float = HEARTBEAT_S,
        lost_after_s: float = LOST_AFTER_S,
    ) -> None:
        self._connections = dict(connections)
        self._on_message, self._on_lost = on_message, on_lost
        self._heartbeat_s, self._lost_after_s = heartbeat_s, lost_after_s
        self._locks = {rank: threading.Lock() for rank in self._connections}
        self._heard = dict.fromkeys(self._connections, time.monotonic())
        self._woken, self._waker = Pipe(duplex=False)
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="gang-link", daemon=True)

    def start(self) -> None:
        """Begin to read; messages that came before are not lost."""
        self._thread.start()

    def send(self, rank: int, message: Any) -> bool:
        """Send a message to a rank; False when its connection is broken (``on_lost`` tells)."""
        return self._send(rank, pickle.dumps(message))

    def send_all(self, message: Any) -> None:
        """Send a message to all connected ranks."""
        data = pickle.dumps(message)
        for rank in self._connections:
            self._send(rank, data)

    def close(self) -> None:
        """End the thread and the connections; nothing is called any more. Not to be called from the link's thread."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._waker.send_bytes(b"")
        if self._thread.is_alive():
            self._thread.join()
        for connection in (*self._connections.values(), self._woken, self._waker):
            connection.close()

    def _send(self, rank: int, data: bytes) -> bool:
        try:
            with self._locks[rank]:
                self._connections[rank].send_bytes(data)
        except OSError:
            return False
        return True

    def _watch(self) -> None:
        alive = pickle.dumps(None)
        ranks = {connection: rank for rank, connection in self._connections.items()}
        beat = time.monotonic()
        while not self._closed:
            ready = wait([*ranks, self._woken], timeout=max(0.0, beat - time.monotonic()))
            for connection in ready:
                if connection is not self._woken and not self._closed:
                    assert isinstance(connection, Connection)
                    self._read(connection, ranks)
            now = time.monotonic()
            if now >= beat and not self._closed:
                beat = now + self._heartbeat_s
                for connection, rank in list(ranks.items()):
                    self._send(rank, alive)
                    if now - self._heard[rank] > self._lost_after_s:
                        del ranks[connection]
                        self._on_lost(rank, f"gave no sign of life for {self._lost_after_s:.0f} s")

    def _read(self, connection: Connection, ranks: dict[Connection, int]) -> None:
        rank = ranks[connection]
        try:
            message = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            del ranks[connection]
            self._on_lost(rank, "died")
            return
        self._heard[rank] = time.monotonic()
        if message is not None:
            self._on_message(rank, message)


class Door:
    """Rank 0's end before the gang is complete: where the others knock.

    Args:
        host: address to listen at.
    """

    def __init__(self, host: str) -> None:
        self._key = secrets.token_bytes(32)
        self._server = socket.create_server((host, 0))

    @property
    def invitation(self) -> tuple[str, int, bytes]:
        """What the others need, to be given to them alone: host, port, key."""
        host, port = self._server.getsockname()[:2]
        return host, port, self._key

    def admit(self, num_ranks: int, timeout_s: float) -> dict[int, Connection]:
        """Wait for ranks 1 .. num_ranks - 1; strangers are turned away.

        Raises:
            WorkerError: not all came in time; names those missing.
        """
        admitted: dict[int, Connection] = {}
        deadline = time.monotonic() + timeout_s
        with self._server:
            while len(admitted) < num_ranks - 1:
                self._server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    client, _ = self._server.accept()
                except TimeoutError as error:
                    missing = sorted(set(range(1, num_ranks)) - admitted.keys())
                    raise WorkerError(f"rank {missing[0]} has not joined the gang within {timeout_s:.0f} s") from error
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = Connection(client.detach())
                with contextlib.suppress(OSError, EOFError, ValueError):
                    nonce = secrets.token_bytes(_NONCE_BYTES)
                    connection.send_bytes(nonce)
                    rank, proof = self._introduction(connection)
                    if hmac.compare_digest(proof, _proof(self._key, nonce, rank)) and 0 < rank < num_ranks:
                        admitted[rank] = connection
                        continue
                connection.close()
        return admitted

    @staticmethod
    def _introduction(connection: Connection) -> tuple[int, bytes]:
        if not connection.poll(_INTRODUCTION_S):
            raise EOFError
        rank, proof = connection.recv_bytes(1024).split(b" ", 1)
        return int(rank), proof


def knock(invitation: tuple[str, int, bytes], rank: int, timeout_s: float) -> Connection:
    """Connect to rank 0.

    Raises:
        WorkerError: it cannot be reached.
    """
    host, port, key = invitation
    try:
        client = socket.create_connection((host, port), timeout=timeout_s)
        client.settimeout(None)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(client.detach())
        nonce = connection.recv_bytes(_NONCE_BYTES)
        connection.send_bytes(b"%d %s" % (rank, _proof(key, nonce, rank)))
    except (OSError, EOFError) as error:
        raise WorkerError(f"rank 0 cannot be reached at {host}:{port}: {error}", rank=rank) from error
    return connection


def _proof(key: bytes, nonce: bytes, rank: int) -> bytes:
    return hmac.digest(key, b"longtake gang %d " % rank + nonce, "sha256").hex().encode()
