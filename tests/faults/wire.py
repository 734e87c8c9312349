"""A man in the middle of the data plane: loses, doubles, delays and cuts messages between workers and store.

The store's socket is moved aside and another bound in its place, so both processes are as they always are.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from pathlib import Path

import zmq

FATES = ("lost", "twice", "late", "cut")


class Wire:
    """Owns a thread that carries messages; `shares` says how many of a hundred meet each fate."""

    def __init__(self, socket: Path, seed: int) -> None:
        """`socket` is the store's, which must listen already."""
        self.shares: dict[str, int] = {}
        self.met: Counter[str] = Counter()
        self._draw = random.Random(seed)
        self._socket, self._aside = socket, socket.with_name(socket.name + "-aside")
        socket.rename(self._aside)
        self._context = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._front.bind(f"ipc://{socket}")
        self._back = f"ipc://{self._aside}"
        self._peers: dict[bytes, zmq.Socket[bytes]] = {}  # by worker: the connection made on its behalf
        self._late: list[tuple[zmq.Socket[bytes], list[bytes]]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        """Whoever was connected by this wire connects to the store itself from now on."""
        self._ended.set()
        self._thread.join()
        self._context.destroy(linger=0)
        self._aside.rename(self._socket)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        while not self._ended.is_set():
            for socket, _ in poller.poll(20):
                if socket is self._front:
                    worker, message = self._front.recv_multipart()
                    if worker not in self._peers:
                        self._peers[worker] = self._context.socket(zmq.DEALER)
                        self._peers[worker].connect(self._back)
                        poller.register(self._peers[worker], zmq.POLLIN)
                    self._carry(self._peers[worker], [message])
                else:
                    worker = next(worker for worker, peer in self._peers.items() if peer is socket)
                    self._carry(self._front, [worker, socket.recv()])

    def _carry(self, to: zmq.Socket[bytes], parts: list[bytes]) -> None:
        """To be late is to come after the next one, whoever it is for."""
        held, self._late = self._late, []
        fate = self._draw.choices([*self.shares, "well"], [*self.shares.values(), self._well()])[0]
        self.met[fate] += 1
        if fate == "late":
            self._late = [(to, parts)]
        elif fate == "cut":
            to.send_multipart([*parts[:-1], parts[-1][: self._draw.randrange(len(parts[-1]))]])
        else:
            for _ in range({"lost": 0, "twice": 2, "well": 1}[fate]):
                to.send_multipart(parts)
        for socket, message in held:
            socket.send_multipart(message)

    def _well(self) -> int:
        return 100 - sum(self.shares.values())
