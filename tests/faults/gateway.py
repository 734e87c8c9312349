"""The gateway dies under its HTTP clients, beside clients that speak to the worker itself."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Iterator

from tests.faults.case import Case
from tests.faults.rig import Rig
from tests.system.processes import Process, eventually

_CLIENTS = 3
_PROMPT = "def fibonacci("
_LATEST = 10.0  # seconds from the gateway's death to the end of every answer it was streaming


class Gateway:
    """A gateway before the first worker, and what its clients got: whole answers, or errors."""

    def __init__(self, rig: Rig) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        command = ("gpu-worker", "gateway", "--worker", str(rig.addresses[0]), "--model-name", "any")
        listen = ("--listen", f"127.0.0.1:{self._port}")
        self.process = Process(rig.pair.runtime, *command, *listen, forked=not rig.pair.environment)
        rig.pair.processes.append(self.process)
        eventually(self._healthy, 60, f"the gateway's start ({self.process.log})")

    def complete(self) -> str:
        """The text of one streamed answer that came to its end; raises ConnectionError."""
        body = {"model": "any", "prompt": _PROMPT, "max_tokens": 48, "temperature": 0, "stream": True}
        text = ""
        for line in self._lines("POST", "/v1/completions", json.dumps(body)):
            if line == "data: [DONE]":
                return text
            if line.startswith("data: "):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        raise ConnectionError("the stream ended before its end")

    def _healthy(self) -> bool:
        try:
            return bool(list(self._lines("GET", "/health")))
        except ConnectionError:
            return False

    def _lines(self, method: str, path: str, body: str | None = None) -> Iterator[str]:
        """Of a reply that is well; raises ConnectionError."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            assert reply.status in (200, 503), f"{reply.status}: {reply.read()!r}"
            while reply.status == 200 and (line := reply.readline()):
                yield line.decode().strip()
        except http.client.HTTPException as error:
            raise ConnectionError(str(error)) from None
        finally:
            connection.close()


class KillGateway(Case):
    name = "kill -9 gateway"
    expected = "its clients' connections break at once; the worker frees their places; others are right"
    model = "demo"
    frames = None

    def strike(self, rig: Rig, draw: random.Random) -> set[int]:
        gateway = Gateway(rig)
        expected = gateway.complete()
        answers: list[str] = []
        broken = threading.Event()

        def client() -> None:
            try:
                while True:
                    answers.append(gateway.complete())
            except ConnectionError:
                broken.set()

        clients = [threading.Thread(target=client) for _ in range(_CLIENTS)]
        for thread in clients:
            thread.start()
        time.sleep(draw.uniform(0.2, 2.0))
        gateway.process.kill()
        for thread in clients:
            thread.join(_LATEST)
            assert not thread.is_alive(), f"a client of a dead gateway still waits after {_LATEST:.0f} s"
        assert broken.is_set()
        assert set(answers) <= {expected}, f"WRONG: {answers}"
        successor = Gateway(rig)
        assert successor.complete() == expected
        successor.process.stop()
        return set()


CASES = [KillGateway()]
