"""Records on their way through device memory: for prompts, whose experts must not push out those of decode.

A ring of a few groups of records. The copy engine fills the groups that are free while experts are computed
from those that are filled; what is asked for ahead of time stays until it is wanted or found useless. Not
done here: which records, and computing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from common.expert_key import ExpertKey
from gpu_worker.cuda.record_copies import RecordCopies, now, wait_for
from gpu_worker.slots.fetch import CountedFetch

WAVE = 6  # records in a group: 39 MB of the 30B's, 0.75 ms of a PCIe 5 link
GROUPS = 4


class _Wave(NamedTuple):
    group: int
    keys: list[ExpertKey]
    ahead: bool
    ready: torch.cuda.Event | None


class StagingRing:
    """Owns the groups.

        FREE --fill--> FILLED --waves--> IN USE --(the next wave is taken)--> FREE

    A group is filled again only after the kernels that were launched while it was in use.
    """

    def __init__(self, copies: RecordCopies, fetch: CountedFetch, stride: int, device: torch.device) -> None:
        """`fetch` counts what `copies` does."""
        self.useful_bytes = 0  # of records that were fetched ahead and wanted then
        self.wasted_bytes = 0  # of those that were not
        self._copies, self._fetch, self._device = copies, fetch, device
        self._records = torch.empty(GROUPS, WAVE, stride, dtype=torch.uint8, device=device)
        self._free, self._filled = deque(range(GROUPS)), deque[_Wave]()
        # Copies have a stream of their own: what lay here before may be in use until now.
        self._last_use = [now(device)] * GROUPS

    @property
    def nbytes(self) -> int:
        return self._records.nbytes

    @property
    def here(self) -> set[ExpertKey]:
        """Those that are filled, or on their way."""
        return {key for wave in self._filled for key in wave.keys}

    def fill(self, keys: Iterable[ExpertKey], ahead: bool = False) -> None:
        """Start fetching those of `keys` that are not here yet, in order, as far as the ring reaches.

        `ahead`: it is not known yet whether they will be wanted. Raises what `Fetcher.stage` raises.
        """
        here = self.here
        missing = [key for key in keys if key not in here]
        for start in range(0, len(missing), WAVE):
            if not self._free:
                return
            self._fill(missing[start : start + WAVE], ahead)

    def waves(self, keys: Iterable[ExpertKey]) -> Iterator[list[tuple[ExpertKey, Tensor]]]:
        """The records (stride,) of `keys`, some at a time; each valid until the next is taken.

        Raises what `Fetcher.stage` raises.
        """
        wanted = dict.fromkeys(keys)
        self.fill(wanted)
        while self._filled:
            wave = self._filled.popleft()
            wait_for(wave.ready)
            records = zip(wave.keys, self._records[wave.group], strict=False)
            useful = [(key, record) for key, record in records if key in wanted]
            stride = self._records.shape[2]
            self.wasted_bytes += (len(wave.keys) - len(useful)) * stride
            self.useful_bytes += len(useful) * stride if wave.ahead else 0
            try:
                if useful:
                    yield useful
            finally:
                self._last_use[wave.group] = now(self._device)
                self._free.append(wave.group)
            for key, _ in useful:
                del wanted[key]
            self.fill(wanted)
        assert not wanted, "a record was neither here nor fetched"

    def _fill(self, keys: list[ExpertKey], ahead: bool) -> None:
        group = self._free[0]
        self._copies.after(self._last_use[group])
        self._fetch(list(zip(keys, self._records[group], strict=False)))
        self._filled.append(_Wave(self._free.popleft(), keys, ahead, self._copies.done()))
