"""The slot cache on the device, for stores that keep every expert in RAM: no step of it asks the host.

Owns the directory, the usage, the pool, and the buffers of a step; decisions and copies are the kernels' in
`kernels.slots`, and equal those of `gpu_worker.slots.cache` slot for slot. All buffers are allocated once and
changed in place, so that a captured graph finds them again. Not done here: steps that need more experts than
there are slots and experts without a frame, which are the host's (it reads `columns` of a layer and puts back
what became of them by `restore`), prompts (which only `settle` in free slots), and registering the arena.

Order. resolve, fetch and the expert kernels of a step run in one stream, and so does the next step: a slot is
overwritten only after every kernel that reads its former record, and read only after it was filled. The
kernel after a fetch may begin before that has ended: it waits slot by slot. What is copied ahead runs beside
them, into slots that nobody reads or fills until the layer's `fetch` has seen the copies through. Frames of
such a store are never reused, so a record needs no second look at the arena's directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor

from gpu_worker.cuda.kernels import orders, prefetch
from gpu_worker.cuda.kernels import slots as kernels
from gpu_worker.cuda.kernels.lane import Lane
from gpu_worker.cuda.kernels.orders import Coming
from gpu_worker.cuda.kernels.slots import ABSENT, Awaited, Directory
from gpu_worker.cuda.transfers import Download, upload
from gpu_worker.slots.cache import LayerState
from gpu_worker.slots.counters import CacheCounters, LayerCounters
from gpu_worker.slots.policies import POLICIES

MAX_PAIRS = 128  # the look-up compares all pairs of a step in one program


def layer_state(clock: list[int], experts: list[int], last_used: list[int], uses: list[int]) -> LayerState:
    """What `DeviceSlots.columns` say, once they are on the host."""
    return LayerState(clock[0], experts, last_used, uses)


class DeviceSlots:
    """Owns the slots of all layers.

        FREE --resolve--> RESIDENT, its record to come --fetch--> RESIDENT --(victim of resolve)--+
                                    ^                                                             |
                                    +--------------------- another expert's ----------------------+
        FREE or RESIDENT --reserve--> AWAITED --resolve--> RESIDENT if it was chosen, else FREE
                                      AWAITED --resolve--> FREE if it was handed over to a lane
                                      AWAITED --reserve--> FREE if it is no longer predicted, nor begun

    Invariant: an expert's slot holds that expert, and no other slot does. Every `resolve` is followed by the
    same layer's `fetch` before anything reads the pool. Nothing is awaited between steps.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        slots: int,
        stride: int,
        policy: str,
        max_pairs: int,
        device: torch.device,
    ) -> None:
        """max_pairs: rows times experts per row of the largest step, at most MAX_PAIRS."""
        assert policy in POLICIES and max_pairs <= MAX_PAIRS and stride % 4096 == 0
        self.policy = policy

        def ints(*shape: int, value: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.directory = Directory(
            slot_of=ints(layers, experts, value=ABSENT),
            expert_of=ints(layers, slots, value=ABSENT),
            last_used=ints(layers, slots),
            uses=ints(layers, experts),
            clock=ints(layers),
            counters=ints(layers, 2, dtype=torch.int64),
        )
        self.frame_of = ints(layers, experts)
        # A tensor, so that the kernels need not be compiled for an address.
        self.arena_base = ints(1, dtype=torch.int64)
        self.slot_ids = ints(max_pairs)
        self.orders = orders.no_orders(layers, max_pairs, device)
        self.awaited = Awaited(
            expert=ints(layers, orders.AHEAD, value=ABSENT),
            counters=ints(layers, 3, dtype=torch.int64),
        )
        self.ahead = ints(1, value=1)  # 0: nothing is copied ahead
        self._tables = policy, self.directory, self.awaited, self.orders, self.frame_of
        # The pool is the weight tensor: kernels are handed slots, never copies.
        self.pool = torch.empty(layers, slots, stride, dtype=torch.uint8, device=device)

    def attach(self, arena_base: int, frame_of: Tensor) -> None:
        """The device's address of frame 0, a multiple of 16, and the frames (layers, experts), all READY."""
        self.arena_base.fill_(arena_base)
        self.frame_of.copy_(frame_of)

    @property
    def holds_all(self) -> bool:
        """Whether every expert has its slot, which is then the one of its number: nothing is looked up."""
        return self.pool.shape[1] == self.frame_of.shape[1]

    def resolve(
        self, layer: int, choices: Tensor, lane: Lane | None = None, x: Tensor | None = None
    ) -> Tensor:
        """choices (rows, k) int64, contiguous, to slot ids (rows, k) int32, valid until the next call.

        The different experts must fit the slots; the host cannot be told here that they did not. Of one row,
        some may be handed over to a lane, with its activations x (1, blocks, 128) float32.
        """
        kernels.resolve(choices, layer, *self._tables, self.slot_ids, self.pool.shape[2], lane, x)
        return self.slot_ids[: choices.numel()].view(choices.shape)

    def fetch(self, layer: int) -> Coming:
        """See that what the last `resolve` of `layer` found, or gave slots to, is there for the kernels that
        follow; the next one may begin before, and wait for what is coming itself."""
        orders.copy(range(layer, layer + 1), self.orders, self.arena_base, self.pool, wait=True)
        return Coming(self.orders, layer)

    def can_guess(self, pairs: int) -> bool:
        """Whether steps of so many pairs leave slots for what they may not need."""
        return prefetch.most_guesses(self.pool.shape[1], pairs) > 0

    def reserve(self, first: int, choices: Tensor) -> None:
        """Layers from `first` on will probably choose these (layers, rows, k): slots for absent ones.

        To be followed by `resolve` and `fetch` of all these layers, in the same step.
        """
        prefetch.reserve(choices, first, *self._tables, self.ahead, self.pool.shape[2])

    def fetch_ahead(self, layers: range) -> None:
        """Copy what was ordered for some layers, the first ones first, for as long as it is wanted."""
        orders.copy(layers, self.orders, self.arena_base, self.pool)

    def counters(self) -> CacheCounters:
        """Hits, misses and bytes since the start; waits for the device."""
        layers = [LayerCounters(*counted) for counted in self.directory.counters.tolist()]
        counters = CacheCounters(layers)
        ahead = sum(copied for _, _, copied in self.awaited.counters.tolist())
        counters.bytes_fetched = counters.misses * self.pool.shape[2] + ahead
        return counters

    def start_counting(self) -> None:
        """Forget what was counted so far; between steps."""
        self.directory.counters.zero_()
        self.awaited.counters.zero_()

    def columns(self, layer: int) -> list[Tensor]:
        """What is known of a layer's slots, as `layer_state` takes it: to be brought to the host."""
        columns = (self.directory.expert_of, self.directory.last_used, self.directory.uses)
        return [self.directory.clock[layer, None], *(column[layer] for column in columns)]

    def snapshot(self) -> list[LayerState]:
        """The directory layer by layer; waits for the device."""
        layers = range(self.pool.shape[0])
        return [layer_state(*Download(self.columns(layer)).wait()) for layer in layers]

    def restore(self, layer: int, state: LayerState) -> None:
        """Go on from what the host made of a layer; the records lie in the pool or are on their way."""
        slot_of = [ABSENT] * self.directory.slot_of.shape[1]
        for slot, expert in enumerate(state.experts):
            if expert != ABSENT:
                slot_of[expert] = slot
        values = (slot_of, state.experts, state.last_used, state.uses, [state.clock])
        uploaded = upload(list(chain(*values)), self.pool.device, torch.int32).split([*map(len, values)])
        for tensor, row in zip(self.directory, uploaded, strict=False):  # all but the counters
            tensor[layer] = row if tensor.dim() > 1 else row[0]

    def settle(self, layer: int, slot_of: Mapping[int, int]) -> None:
        """Some experts are in free slots now, as if the last step had used them; their records come there."""
        experts, slots = upload([*slot_of, *slot_of.values()], self.pool.device).view(2, -1)
        directory = self.directory
        directory.slot_of[layer].index_copy_(0, experts, slots.int())
        directory.expert_of[layer].index_copy_(0, slots, experts.int())
        directory.last_used[layer].index_copy_(0, slots, directory.clock[layer].expand(len(slot_of)))
        directory.uses[layer].index_add_(0, experts, torch.ones_like(experts, dtype=torch.int32))

    def check_integrity(self) -> None:
        """To be called between steps; waits for the device. Conservation: both directions say the same."""
        directory = Directory(*(tensor.cpu() for tensor in self.directory))
        residents = (directory.expert_of != ABSENT).sum(1)
        placed = directory.slot_of != ABSENT
        assert torch.equal(residents, placed.sum(1)), "a slot is lost or held twice"
        layers, experts = torch.nonzero(placed, as_tuple=True)
        slots = directory.slot_of[layers, experts].long()
        assert torch.equal(directory.expert_of[layers, slots].long(), experts), "a slot holds another expert"
        assert (directory.last_used <= directory.clock[:, None]).all(), "a slot was used in the future"
        assert (self.awaited.expert == ABSENT).all(), "an expert is still awaited"
        assert (directory.uses >= 0).all() and (directory.counters >= 0).all()
        assert torch.equal(self.orders.done, self.orders.due), "a copy was left unfinished, or made twice"
