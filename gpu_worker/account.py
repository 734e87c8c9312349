"""What a worker takes of a device's memory, purpose by purpose, from shapes alone, before anything is there.

Slots share what is left. Not done here: choosing (`sizing`), and what CUDA, prompts and captured steps take
(`cuda.memory`), which a CPU does without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch

from common.checkpoint.names import packable_dense
from common.checkpoint.source import Stored
from common.hlwq import native
from common.hlwq.planes import RAW_BITS
from common.model_config import ModelConfig
from common.record import matrix_layout
from gpu_worker.model.states import StatePools

if TYPE_CHECKING:
    from gpu_worker.cuda.memory import DeviceMemory

_EMBEDDINGS = "backbone.embeddings.weight"
_FLOAT32 = ("dt_bias", "A_log", ".D", "gate.weight", "e_score_correction_bias")  # whatever the compute type


class Entry(NamedTuple):
    """One purpose of an account, and a few words about it."""

    purpose: str
    nbytes: int
    note: str = ""


@dataclass(frozen=True)
class Account:
    """How the memory is divided; what `entries` and slots leave of the budget is not used.

    budget: bytes; None where nothing limits them. slots: of a layer; None where frames serve as slots.
    slot_bytes: of one slot in every layer. context: tokens of a sequence. reason: why so many slots.
    """

    budget: int | None
    entries: tuple[Entry, ...]
    slots: int | None
    slot_bytes: int
    experts: int
    context: int
    reason: str

    @property
    def other_bytes(self) -> int:
        """Of all but slots."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def total(self) -> int:
        return self.other_bytes + (self.slots or 0) * self.slot_bytes


@dataclass(frozen=True)
class Sizes:
    """What is known of a model before it is loaded, and what it will take for whatever can be chosen.

    stored: dense weights by name. stride: bytes of a record. memory: that of the GPU; None on a CPU.
    `dense_bits` below is what was asked for, None to leave dense matrices as they are stored.
    """

    model: ModelConfig
    stored: Mapping[str, Stored]
    stride: int
    dtype: torch.dtype
    sequences: int
    memory: DeviceMemory | None = None

    @property
    def slot_bytes(self) -> int:
        """Of one slot in every layer."""
        return self.stride * self.model.num_layers

    @property
    def token_bytes(self) -> int:
        """Of keys and values, for one more token of context in every sequence."""
        pools = self._pools(1)
        return pools.keys.nbytes + pools.values.nbytes

    def entries(self, context: int, dense_bits: int | None, captured: bool) -> tuple[Entry, ...]:
        """All but slots. `captured`: whether there will be captured steps."""
        pools, dense = self._pools(context), self.dense_tensors(dense_bits)
        own = (
            Entry("dense weights", sum(dense), self._dense_note(dense_bits)),
            Entry(
                "recurrent states",
                pools.conv.nbytes + pools.ssm.nbytes,
                "1 sequence" if self.sequences == 1 else f"{self.sequences} sequences",
            ),
            Entry(
                "keys and values", pools.keys.nbytes + pools.values.nbytes, f"context of {context:,} tokens"
            ),
        )
        return own if self.memory is None else (*own, *self.memory.entries(self, context, dense, captured))

    def dense_tensors(self, dense_bits: int | None) -> list[int]:
        """Bytes of every tensor of the dense weights, as they will lie on the device."""
        packable = set(packable_dense(self.model))
        sizes: list[int] = []
        for name, stored in self.stored.items():
            bits = dense_bits if dense_bits and name in packable else stored.bits
            if bits is not None and bits != RAW_BITS:
                layout, _ = matrix_layout(name, stored.shape[0], stored.shape[1], bits)
                parts = (*layout.planes, layout.norms, layout.codebook)
                sizes += [section.size for section in parts if section is not None]
            else:
                sizes.append(prod(stored.shape) * self._itemsize(name, stored, name in packable))
        return sizes

    def plain_dense(self) -> bool:
        """Whether dense matrices are stored unpacked."""
        return any(self.stored[name].bits in (None, RAW_BITS) for name in packable_dense(self.model))

    def _itemsize(self, name: str, stored: Stored, packable: bool) -> int:
        if name == _EMBEDDINGS:
            # On a GPU they stay on the host; on a CPU they are mapped as they are stored.
            return 0 if self.memory is not None else stored.size // prod(stored.shape)
        if name.endswith(_FLOAT32):
            return torch.float32.itemsize
        mapped = self.memory is None and packable and native.path() != native.PLAIN
        return stored.size // prod(stored.shape) if mapped else self.dtype.itemsize

    def _dense_note(self, dense_bits: int | None) -> str:
        bits = {dense_bits or self.stored[name].bits or RAW_BITS for name in packable_dense(self.model)}
        return " and ".join(map(str, sorted(bits))) + " bits"

    def _pools(self, context: int) -> StatePools:
        return StatePools(self.model, self.sequences, context, self.dtype, "meta")
