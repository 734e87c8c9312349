"""The gateway's one object: its worker, the requests in progress, and whether more are accepted.

    SERVING --drain--> DRAINING

Made for one event loop. What is said over HTTP is `app.py`'s; the process is `server.py`'s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from common.api_keys import KeyRing
from common.errors import Unavailable
from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.client import AsyncWorkerClient, Prompt
from gpu_worker.gateway.caller import Caller
from gpu_worker.gateway.errors import model_not_found, not_passed_on
from gpu_worker.gateway.generations import Generations
from gpu_worker.gateway.metrics import GatewayMetrics
from gpu_worker.gateway.prompts import Asked


class Gateway:
    """See above. The client is its owner's to close."""

    def __init__(
        self,
        client: AsyncWorkerClient,
        model_name: str | None,
        request_timeout: float,
        keys: KeyRing | None = None,
    ) -> None:
        """Without `keys`, the worker decides whether a client's key is needed, and known."""
        self._client, self._model_name, self._keys = client, model_name, keys
        self.request_timeout = request_timeout
        self.created = int(time.time())
        self.draining = False
        self.metrics = GatewayMetrics(lambda: len(self._running))
        self._running: set[Generations] = set()
        self._requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def authenticate(self, caller: Caller) -> None:
        """Raises Unauthenticated unless the caller's key is known, or none are asked for here."""
        if self._keys is not None:
            caller.usage = self._keys.find(caller.authorization)

    async def model(self, caller: Caller, wanted: str | None = None) -> tuple[str, pb.ModelInfoReply]:
        """The model that is served, with its name here; RequestError if another one is wanted."""
        info = await self._client.showing(caller.api_key).model_info()
        name = self._model_name or info.model
        if wanted not in (None, name):
            raise model_not_found(str(wanted))
        return name, info

    async def ready(self) -> bool:
        """Whether requests would be answered."""
        return not self.draining and await self._client.serving()

    @contextmanager
    def request(self, caller: Caller) -> Iterator[None]:
        """The block is a request in progress; raises Unavailable if none is accepted, Exhausted if the
        caller has too many."""
        if self.draining:
            raise Unavailable("the gateway is draining: it finishes what it has and ends; try again later")
        if caller.usage is not None:
            caller.usage.begin()
        self._requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            if caller.usage is not None:
                caller.usage.end()
            self._requests -= 1
            if not self._requests:
                self._idle.set()

    @asynccontextmanager
    async def generate(self, asked: Asked, caller: Caller) -> AsyncIterator[Generations]:
        """The worker's answers; leaving the block cancels them."""
        with self._further_prompts(asked, caller):
            async with self._generations(asked, caller) as generations:
                yield generations

    @contextmanager
    def _further_prompts(self, asked: Asked, caller: Caller) -> Iterator[None]:
        """Each prompt is a request of the worker's, and counts as one; `request` has counted the first."""
        usage, further = caller.usage, len(asked.prompts) - 1
        if usage is None:
            yield
            return
        asked.check_allowance(usage)
        usage.begin(further)
        try:
            yield
        finally:
            usage.end(further)

    @asynccontextmanager
    async def _generations(self, asked: Asked, caller: Caller) -> AsyncIterator[Generations]:
        try:
            streams = [self._stream(prompt, asked, caller) for prompt in asked.prompts]
        except ValueError as error:  # such as text that has no UTF-8
            raise not_passed_on(error) from None
        async with Generations(streams) as generations:
            self._running.add(generations)
            try:
                yield generations
            finally:
                self._running.remove(generations)

    def _stream(self, prompt: Prompt, asked: Asked, caller: Caller) -> AsyncIterator[pb.GenerateEvent]:
        return self._client.showing(caller.api_key).generate(
            prompt,
            samples=asked.samples,
            priority=asked.priority,
            request_id=caller.request_id,
            timeout=self.request_timeout,
            together=len(asked.prompts),
            **asked.sampling,
        )

    async def drain(self, timeout: float) -> bool:
        """Accept nothing more, and wait for what is in progress; whether it ended by itself in time.

        What did not is ended with an error, which its client is told.
        """
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except asyncio.TimeoutError:
            for generations in self._running:
                generations.abort(Unavailable("the gateway ends, and the answer was not complete in time"))
            return False
        return True
