"""Experts computed by the CPU, bit for bit as the GPU's kernels compute them; see `expert_lane.cpp`.

`ExpertLane` owns a thread that answers what a GPU asks for through a `Mailbox`; `device_experts` computes
directly. Both take one row of activations as the GPU has it: rotated, in the products' order
(`gpu_worker.cuda.kernels.rotation`), in whole blocks. Not done here: deciding what the CPU computes, and
memory that a GPU can see, but for the mailbox's own.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_int64, c_void_p
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import Exhausted
from common.hlwq import native
from common.hlwq.planes import BLOCK, RAW_BITS, padded
from common.record import RecordLayout, RecordLayouts

MOST_BLOCKS = 24  # of a row: a GPU adds those of longer ones in another order
MOST_PAIRS = 16


class _Lane(ctypes.Structure):
    """HlwqLane of expert_lane.cpp."""

    _fields_ = (
        ("up", POINTER(native.Layout)),
        ("down", POINTER(native.Layout)),
        ("layers", c_int64),
        ("frames", c_void_p),
        ("frame_count", c_int64),
        ("stride", c_int64),
        ("pairs", c_int64),
        ("hidden", c_int64),
        ("request", c_void_p),
        ("x", c_void_p),
        ("answered", c_void_p),
        ("products", c_void_p),
    )


_layouts = POINTER(native.Layout)
native.declare(
    "hlwq_device_experts", [_layouts, _layouts, c_void_p, c_int64, c_void_p, c_void_p], native.Done
)
native.declare("hlwq_lane_start", [POINTER(_Lane)], c_void_p)
native.declare("hlwq_lane_wake", [c_void_p])
native.declare("hlwq_lane_stop", [c_void_p])


class Mailbox(NamedTuple):
    """How a GPU and a lane talk: contiguous tensors in host memory, page-locked if a GPU is to reach them."""

    request: Tensor  # (2 + pairs,) int32: sequence, written last; layer; each pair's frame, or -1
    x: Tensor  # (padded in_features of up,) float32
    answered: Tensor  # (1,) int32: the sequence that was answered last
    products: Tensor  # (pairs, hidden) float32

    @staticmethod
    def allocate(layouts: RecordLayouts, pairs: int, pinned: bool) -> Mailbox:
        """An empty one, of sequence 0."""
        up = layouts[0].up
        request = torch.full((2 + pairs,), -1, dtype=torch.int32, pin_memory=pinned)
        request[:2] = 0
        return Mailbox(
            request,
            torch.zeros(padded(up.in_features), pin_memory=pinned),
            torch.zeros(1, dtype=torch.int32, pin_memory=pinned),
            torch.zeros(pairs, layouts[0].down.out_features, pin_memory=pinned),
        )


def usable(layouts: RecordLayouts) -> str | None:
    """Why a lane cannot help with these experts here, for a log; None if it can."""
    path = native.path()
    if path == native.PLAIN:
        return "the native kernels are missing or switched off"
    if path == "portable":
        return "the portable kernels are slower than any link"
    return next((reason for layout in set(layouts.layers) if (reason := _unfit(layout))), None)


def _unfit(layout: RecordLayout) -> str | None:
    for matrix in layout.matrices:
        if matrix.bits == RAW_BITS:
            return f"{matrix.name} is not packed"
        if padded(matrix.in_features) > MOST_BLOCKS * BLOCK:
            return f"rows of {matrix.name} have more than {MOST_BLOCKS} blocks"
    return None


def _check(layouts: RecordLayouts) -> None:
    reason = usable(layouts)
    if reason is not None:
        raise ValueError(f"not as a GPU computes it: {reason}")


def device_experts(layout: RecordLayout, records: Sequence[Tensor], x: Tensor, products: Tensor) -> None:
    """products[i] = down(relu(up(x))^2) of the expert in records[i].

    x: (blocks, 128) or flat, as `rotation` makes it for one row; products (len(records), hidden) float32.
    Raises ValueError for layouts, and on processors, that this order does not exist for.
    """
    _check(RecordLayouts((layout,)))
    up, down = native.record_layout(layout.up), native.record_layout(layout.down)
    assert x.dtype == products.dtype == torch.float32 and x.is_contiguous() and products.is_contiguous()
    assert x.numel() == padded(layout.up.in_features)
    assert products.shape == (len(records), layout.down.out_features)
    sources, targets = ([t.data_ptr() for t in tensors] for tensors in (records, products))
    pointers = c_void_p * len(records)
    native.call(
        "hlwq_device_experts", up, down, pointers(*sources), len(records), x.data_ptr(), pointers(*targets)
    )


def _stop(stop: Callable[[int], None], handle: int, kept: object) -> None:
    stop(handle)


class ExpertLane:
    """A thread that answers a mailbox, from `start` to `close`; the pool's threads compute with it.

    It spins while there is work: call `wake` before each step that may ask. Awake, the pool spins as well.
    Layers and frames of requests are the GPU's word: one that cannot be ends the process.
    """

    def __init__(self, layouts: RecordLayouts, frames: Tensor, mailbox: Mailbox) -> None:
        """frames: (n, stride) uint8 in host memory, kept as long as this is."""
        _check(layouts)
        pairs, up = len(mailbox.products), layouts[0].up
        hidden = layouts[0].down.out_features
        assert frames.dtype == torch.uint8 and frames.stride(1) == 1 and frames.shape[1] >= layouts.stride
        assert all(part.is_contiguous() and part.device.type == "cpu" for part in mailbox)
        assert pairs <= MOST_PAIRS and mailbox.request.shape == (2 + pairs,)
        assert mailbox.x.numel() == padded(up.in_features) and mailbox.products.shape[1] == hidden
        self._kept = frames, mailbox
        count = len(layouts.layers)
        self._layouts = [
            (native.Layout * count)(*(native.record_layout(matrix) for matrix in matrices))
            for matrices in zip(*(layout.matrices for layout in layouts.layers), strict=True)
        ]
        self._lane = _Lane(
            *self._layouts, count, frames.data_ptr(), len(frames), frames.stride(0), pairs, hidden,
            *(part.data_ptr() for part in mailbox),
        )  # fmt: skip
        self._handle: int | None = None
        self._stop: weakref.finalize | None = None

    def start(self) -> None:
        """Raises Exhausted if there can be no more threads."""
        assert self._handle is None, "a lane starts once"
        self._handle = native.call("hlwq_lane_start", self._lane)
        if self._handle is None:
            raise Exhausted("the system gives no thread to compute experts with")
        # The thread reads memory that would go with this object, or with the interpreter.
        self._stop = weakref.finalize(
            self, _stop, native.function("hlwq_lane_stop"), self._handle, self._kept
        )

    def wake(self) -> None:
        """Requests may come soon. Costs no system call while the lane is awake."""
        assert self._handle is not None, "the lane is closed"
        native.call("hlwq_lane_wake", self._handle)

    def close(self) -> None:
        """Waits for a request that is being answered; nothing once closed."""
        self._handle = None
        if self._stop is not None:
            self._stop()

    def __enter__(self) -> ExpertLane:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
