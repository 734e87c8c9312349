"""A source is whole: its files stay what they were while they are read, and are what their checksums say.

A flipped bit makes another code of a code, which no look at values finds, and what is made of it gets fresh
checksums. Those of a packed checkpoint are therefore compared whenever something is made of it, on a thread
beside whatever reads it: both take the files in the same order, so that one finds in the page cache what the
other has read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

from common.checkpoint.file_state import check_unchanged, states_of
from common.checkpoint.packed import PackedCheckpoint
from common.checkpoint.source import WeightSource
from common.errors import CheckpointError, Unavailable


class _Ended(Exception):
    """Nobody wants to know any more."""


@contextmanager
def intact(source: WeightSource) -> Iterator[Callable[[], None]]:
    """Yield what to call when all is read: it raises CheckpointError naming a file that is not what it was.

    That may take a moment, until the last checksum is computed.
    """
    states, ended = states_of(source.files()), Event()
    with ThreadPoolExecutor(1, "intact") as pool:
        compared = pool.submit(_compare, source, ended)

        def check() -> None:
            check_unchanged(states)  # first: of a file that was written to, this tells more
            compared.result()

        try:
            yield check
        finally:
            ended.set()


def _compare(source: WeightSource, ended: Event) -> None:
    """Compare all files with their checksums, where a source has any."""
    if not isinstance(source, PackedCheckpoint):
        return

    def progress(done: int, total: int) -> None:
        if ended.is_set():
            raise _Ended

    try:
        damaged = source.manifest.damaged_files(source.directory, progress)
    except OSError as error:
        raise Unavailable(f"{source.directory} cannot be read: {error.strerror}") from error
    if damaged:
        raise CheckpointError(f"{source.directory}: {', '.join(damaged)}; get a whole copy of it")
