"""Loading a packed checkpoint into an arena, against reading its files: from disk, and from the page cache.

What comes from the disk is counted by the kernel, so a run that the page cache has fed is refused. Caches
below the kernel, such as those of a virtual machine's host, cannot be dropped; both sides meet them.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator

from machine import bytes_from_disk, drop_page_cache
from measure import Comparison, compare
from records import new_arena, preload
from synthetic import marked, synthetic_checkpoint

from common.arena import OwnedArena
from common.checkpoint import PackedCheckpoint

PATTERN = "EEE"  # 2.5 GB of records in three files
PAIRS = 5
_READ_BYTES = 32 << 20
_GOAL = 0.8


def benchmark() -> Iterator[Comparison]:
    """The disk first, with the page cache dropped before each run; then everything from the page cache."""
    with synthetic_checkpoint(PATTERN, vocab=512) as checkpoint:
        gigabytes = checkpoint.routed_bytes / 1e9
        loading = _Loading(checkpoint)
        yield compare(
            marked("loading from disk, page cache dropped", checkpoint),
            ("Stager.preload, new arena", lambda: loading.from_disk(loading.load)),
            ("sequential read(), one buffer", lambda: loading.from_disk(lambda: loading.read(reused=True))),
            gigabytes, "GB/s", _GOAL, PAIRS, loading.forget,
        )  # fmt: skip
        yield compare(
            marked("loading from the page cache", checkpoint),
            ("Stager.preload, new arena", loading.load),
            ("read() into new memory", lambda: loading.read(reused=False)),
            gigabytes, "GB/s", _GOAL, PAIRS, loading.release,
        )  # fmt: skip
        loading.release()


class _Loading:
    """What both sides do. One arena at a time; giving its memory back is not part of loading."""

    def __init__(self, checkpoint: PackedCheckpoint) -> None:
        self._checkpoint = checkpoint
        config = checkpoint.config
        self._layers = [checkpoint.records_file(layer) for layer in range(config.num_layers)]
        self._layer_bytes = config.n_routed_experts * checkpoint.layout.stride
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._arena: OwnedArena | None = None

    def load(self) -> None:
        """As a starting store does: memory is made, locked and filled."""
        self._arena = new_arena(self._checkpoint)
        asyncio.run(preload(self._checkpoint, self._arena))

    def read(self, reused: bool) -> None:
        """All records in file order, in large reads: into one buffer, or into new memory for all of them."""
        memory = self._buffer if reused else memoryview(bytearray(self._checkpoint.routed_bytes))
        taken = 0
        for path, offset in self._layers:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                left = self._layer_bytes
                while left:
                    start = 0 if reused else taken
                    count = file.readinto(memory[start : start + min(left, _READ_BYTES)])
                    left -= count
                    taken += count

    def from_disk(self, action: Callable[[], None]) -> None:
        """Do it; refuse what did not come from a disk."""
        before = bytes_from_disk()
        action()
        found = bytes_from_disk() - before
        if found < 0.95 * self._checkpoint.routed_bytes:
            raise SystemExit(
                f"of {self._checkpoint.routed_bytes:,} bytes {found:,} came from a disk: "
                "set TMPDIR to a directory on one"
            )

    def release(self) -> None:
        """Give the last arena's memory back."""
        if self._arena is not None:
            self._arena.close()
            self._arena = None
            gc.collect()  # the stager's callbacks hold it in a cycle

    def forget(self) -> None:
        """The same, and let the files be read from the disk again."""
        self.release()
        drop_page_cache(path for path, _ in self._layers)
