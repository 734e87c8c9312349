"""Fetching: records from the arena's frames into slots, and asking the store for those that are absent.

The life of a miss. A READY frame is copied straight from the mapped arena, or computed from where it lies: no
message. An absent expert is asked for by STAGE; once the reply is there its frame is pinned for this worker
until RELEASE. A message that is lost or damaged on the way counts as not sent: whatever has no reply after a
while is asked for again under the same id, and an answer nobody waits for is ignored. Used by the engine's
thread alone; the link behind it is kept up by the event loop (`gpu_worker.store_link`).
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import zmq
from torch import Tensor

from common import origin
from common.arena import MappedArena
from common.errors import CheckpointError, Exhausted, ServingError, Unavailable
from common.expert_key import ExpertKey
from common.messages import Done, Failed, Fault, Kind, Malformed, Reply, request, unpack_reply
from common.origin import NOBODY
from gpu_worker.slots.counters import CacheCounters
from gpu_worker.store_link import Attachment, StoreLink

log = logging.getLogger(__name__)

Wanted = tuple[ExpertKey, Tensor]
# Copies those of the records that are READY to their places; returns which, once they are there whole.
Read = Callable[[MappedArena, Sequence[Wanted]], set[ExpertKey]]
# Fills all of the places; returns the experts that had to be staged first.
Fetch = Callable[[Sequence[Wanted]], set[ExpertKey]]
# Makes use of a record that was staged; False if its frame was reused meanwhile.
Take = Callable[[MappedArena, ExpertKey], bool]

# One core copies records at half of what memory moves; several share a wave from this size up, below which
# handing the work over costs more than it saves.
_COPIERS = ThreadPoolExecutor(2, thread_name_prefix="fetch")
_SHARED_BYTES = 4 << 20

FETCH_TIMEOUT = 30.0  # seconds a step waits for the store's disk; longer than the store's own limit
ASK_AGAIN = 2.0  # seconds without a reply, after which everything without one is asked for again
RETURN_TIMEOUT = 5.0  # seconds a step waits for a lost store to come back
_POLL_MS = 50


def read_ready(arena: MappedArena, wanted: Sequence[Wanted]) -> set[ExpertKey]:
    """Copy those of the records that are READY into their slots; returns which."""
    share = len(wanted) > 1 and sum(slot.nbytes for _, slot in wanted) >= _SHARED_BYTES
    read = (_COPIERS.map if share else map)(lambda item: arena.read(*item), wanted)
    return {key for (key, _), whole in zip(wanted, read, strict=True) if whole}


class CountedFetch:
    """Fetches, and counts what that took."""

    def __init__(
        self,
        fetch: Fetch,
        counters: CacheCounters,
        note: Callable[[Sequence[ExpertKey], set[ExpertKey]], None],
    ) -> None:
        """`note` is told the experts of every fetch, and which of them were staged."""
        self._fetch, self._counters, self._note = fetch, counters, note

    def __call__(self, wanted: Sequence[Wanted]) -> None:
        with self._counters.fetching():
            staged = self._fetch(wanted)
        self._counters.bytes_fetched += sum(place.nbytes for _, place in wanted)
        self._counters.staged += len(staged)
        self._note([key for key, _ in wanted], staged)


class _StoreGone(Exception):
    """The attachment ended while its replies were awaited."""


class Fetcher:
    """Owns the DEALER socket of the current attachment."""

    def __init__(self, link: StoreLink) -> None:
        self._link = link
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None  # made at the first absent expert
        self._socket: zmq.Socket[bytes] | None = None
        self._attachment: Attachment | None = None
        self._ids = itertools.count(1)

    def all_fit(self) -> bool:
        """Whether the store has a frame for every expert, so that nothing stays absent."""
        attachment = self._link.last_attachment
        return attachment is not None and attachment.all_fit

    @property
    def arena(self) -> MappedArena:
        """The frames as they are mapped now, whether the store lives or not."""
        assert self._link.last_attachment is not None, "fetching before the first attachment"
        return self._link.last_attachment.arena

    def full_arena(self, timeout: float) -> MappedArena:
        """The frames, once the store has read every expert into them; of its successor, should it die before.

        Raises Unavailable when that takes over `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while missing := self.arena.missing():
            self._link.check_interrupted()
            if time.monotonic() > deadline:
                raise Unavailable(f"the store has not read {missing} experts after {timeout:.0f} s")
            time.sleep(_POLL_MS / 1e3)
        return self.arena

    def fetch(self, wanted: Sequence[Wanted], read: Read = read_ready) -> set[ExpertKey]:
        """Copy each record into its slot; returns the experts that had to be staged first.

        `read` says how, and must have ended when it returns: then the frame is released. Raises what `stage`
        raises.
        """
        ready = read(self.arena, wanted)
        absent = {key: slot for key, slot in wanted if key not in ready}
        self.stage(absent, lambda arena, key: bool(read(arena, [(key, absent[key])])))
        return set(absent)

    def stage(self, keys: Iterable[ExpertKey], take: Take) -> None:
        """Have each record staged, and `take` it while its frame is pinned, in whatever order they come.

        Raises Unavailable when the store is gone and does not come back in time, CheckpointError when it
        cannot read a record, Exhausted when it has no frame for one.
        """
        absent = dict.fromkeys(keys)
        deadline = time.monotonic() + FETCH_TIMEOUT
        while absent:
            attachment = self._link.wait_attached(RETURN_TIMEOUT)
            try:
                self._stage(attachment, absent, take, deadline)
            except _StoreGone:
                continue  # whatever is still in `absent` is asked for again, of the store's successor
            except ServingError:
                # Requests without a reply are left behind; with the lease ends whatever they come to pin.
                self._link.give_up(attachment)
                raise

    def hint(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Hint those of `keys` that are absent, if a store is attached; returns them. Never waits."""
        attachment = self._link.attachment
        if attachment is None:
            return []
        absent = [key for key in keys if not attachment.arena.is_ready(key)]
        if absent:
            socket = self._connect(attachment)
            self._discard_replies(socket)
            self._send(socket, attachment, Kind.HINT, absent)
        return absent

    def close(self) -> None:
        if self._context is not None:
            self._context.destroy(linger=0)

    def _stage(
        self, attachment: Attachment, absent: dict[ExpertKey, None], take: Take, deadline: float
    ) -> None:
        """Ask for all of `absent` at once; take each record as it comes, and its key out of the dict."""
        socket = self._connect(attachment)
        asked = {self._send(socket, attachment, Kind.STAGE, [key]): key for key in absent}
        heard = time.monotonic()
        while absent:
            self._link.check_interrupted()
            if time.monotonic() > deadline:
                raise Unavailable(f"the store did not stage {next(iter(absent))} in {FETCH_TIMEOUT:.0f} s")
            if not socket.poll(_POLL_MS):
                if self._link.attachment is not attachment:
                    raise _StoreGone
                if time.monotonic() > heard + ASK_AGAIN:
                    self._ask_again(socket, attachment, asked)
                    heard = time.monotonic()
                continue
            reply = _receive(socket)
            if reply is None or reply.request_id not in asked or isinstance(reply, Done):
                continue  # the answer to a hint or a release, or to a request given up before
            if isinstance(reply, Failed):
                self._raise(attachment, reply)
            heard, key = time.monotonic(), asked.pop(reply.request_id)
            whole = take(attachment.arena, key)
            self._send(socket, attachment, Kind.RELEASE, [key])
            if whole:
                del absent[key]
            else:  # the lease ended and the frame was reused: ask again
                asked[self._send(socket, attachment, Kind.STAGE, [key])] = key

    def _ask_again(
        self, socket: zmq.Socket[bytes], attachment: Attachment, asked: dict[int, ExpertKey]
    ) -> None:
        """A message may be lost, or the disk is slow and the store has these in hand. While replies are
        awaited no frame is in use, so the release frees what a lost message has left pinned."""
        self._send(socket, attachment, Kind.RELEASE, [])
        for request_id, key in asked.items():
            self._send(socket, attachment, Kind.STAGE, [key], request_id)

    def _raise(self, attachment: Attachment, reply: Failed) -> None:
        if reply.fault is Fault.NO_LEASE:
            self._link.give_up(attachment)
            raise _StoreGone
        if reply.fault in (Fault.NO_FRAME, Fault.BUSY):
            raise Exhausted(f"the store could not stage an expert: {reply.text}")
        if reply.fault is Fault.TOO_SLOW:
            raise Unavailable(f"the store could not stage an expert: {reply.text}")
        raise CheckpointError(f"the store could not stage an expert: {reply.text}")

    def _connect(self, attachment: Attachment) -> zmq.Socket[bytes]:
        """The socket of this attachment; a former one's is closed, and with it its unanswered requests."""
        if self._socket is None or self._attachment is not attachment:
            if self._socket is not None:
                self._socket.close(linger=0)
            self._socket = None
            self._context = self._context or zmq.Context()
            try:
                socket = self._context.socket(zmq.DEALER)
            except zmq.ZMQError as error:  # of open files, there can be no more
                raise Exhausted(f"the worker cannot open its connection to the store: {error}") from None
            socket.linger = 0
            socket.connect(attachment.data_endpoint)
            self._socket, self._attachment = socket, attachment
        return self._socket

    def _send(
        self,
        socket: zmq.Socket[bytes],
        attachment: Attachment,
        kind: Kind,
        keys: Sequence[ExpertKey],
        request_id: int | None = None,
    ) -> int:
        """Returns the request's id: a new one, unless it is asked again."""
        request_id = request_id or next(self._ids)
        try:
            asking = NOBODY if kind is Kind.RELEASE else origin.current()
            socket.send(request(kind, request_id, attachment.lease_id, keys, asking), zmq.NOBLOCK)
        except zmq.Again:
            if kind is Kind.STAGE:  # a full queue means that nobody reads
                self._link.give_up(attachment)
                raise _StoreGone from None
        return request_id

    @staticmethod
    def _discard_replies(socket: zmq.Socket[bytes]) -> None:
        while socket.poll(0):
            socket.recv()


def _receive(socket: zmq.Socket[bytes]) -> Reply | None:
    """The next reply; None if it is none, or says that the request was none when it arrived."""
    try:
        reply = unpack_reply(socket.recv())
    except Malformed as error:
        log.warning("a damaged reply of the store is ignored: %s", error)
        return None
    if isinstance(reply, Failed) and reply.fault is Fault.MALFORMED:
        log.warning("a request reached the store damaged, and will be sent again: %s", reply.text)
        return None
    return reply
