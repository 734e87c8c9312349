"""The expert lane: a mailbox that a Python thread fills in the GPU's place."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.hlwq import native
from common.hlwq.codebook import packing_codebook
from common.hlwq.planes import BLOCK
from common.hlwq.quantize import pack_matrix
from common.model_config import ModelConfig
from common.record import ExpertBits, RecordLayouts, record_layouts
from gpu_worker.kernels import expert_lane
from gpu_worker.kernels.expert_lane import ExpertLane, Mailbox, device_experts
from tests.helpers.models import tiny_config
from tests.helpers.native_paths import forced_or_skipped
from tests.helpers.no_room import without_more_room

pytestmark = pytest.mark.skipif(native.path() in (native.PLAIN, "portable"), reason="takes AVX2 or AVX-512")

HIDDEN, INNER, PAIRS, FRAMES = 264, 72, 3, 4
SLEPT = 0.3  # seconds: long enough for a lane to sleep


def layouts_of(bits: Sequence[ExpertBits], hidden: int = HIDDEN) -> RecordLayouts:
    config = ModelConfig.from_dict(tiny_config(hidden_size=hidden, moe_intermediate_size=INNER))
    return record_layouts(config, bits)


LAYOUTS = layouts_of([ExpertBits(5, 4), ExpertBits(3, 6)])


@pytest.fixture(scope="module")
def frames() -> Tensor:
    """Frame i holds an expert of layer i % 2; the stride is more than a record."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(256, (FRAMES, LAYOUTS.stride + 4096), dtype=torch.uint8, generator=generator)
    for frame, record in enumerate(frames):
        for matrix in LAYOUTS[frame % 2].matrices:
            weight = torch.randn(matrix.out_features, matrix.in_features, generator=generator)
            matrix.store(pack_matrix(weight, matrix.bits, packing_codebook(matrix.bits)), record)
    return frames


class Gpu:
    """Asks and waits, as a kernel does."""

    def __init__(self, frames: Tensor) -> None:
        self.frames = frames
        self.mailbox = Mailbox.allocate(LAYOUTS, PAIRS, pinned=False)
        self.mailbox.products.fill_(torch.nan)
        self.sequence = 0

    def ask(self, layer: int, chosen: Sequence[int]) -> None:
        self.mailbox.x.copy_(torch.randn(self.mailbox.x.shape))
        self.mailbox.request[1] = layer
        self.mailbox.request[2:] = torch.tensor(chosen, dtype=torch.int32)
        self.sequence += 1
        self.mailbox.request[0] = self.sequence

    def wait(self) -> None:
        until = time.monotonic() + 20
        while int(self.mailbox.answered) != self.sequence:
            assert time.monotonic() < until, "no answer"

    def expected(self, layer: int, frame: int) -> Tensor:
        products = torch.empty(1, HIDDEN)
        device_experts(LAYOUTS[layer], [self.frames[frame]], self.mailbox.x, products)
        return products[0]

    def check(self, layer: int, chosen: Sequence[int]) -> None:
        """Products of pairs with a frame, after an answer; others still have what was there."""
        before = self.mailbox.products.clone()
        self.ask(layer, chosen)
        self.wait()
        for pair, frame in enumerate(chosen):
            expected = before[pair] if frame < 0 else self.expected(layer, frame)
            got = self.mailbox.products[pair]
            assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


@pytest.fixture
def gpu(frames: Tensor) -> Gpu:
    return Gpu(frames)


@pytest.fixture
def lane(gpu: Gpu) -> Iterator[ExpertLane]:
    with ExpertLane(LAYOUTS, gpu.frames, gpu.mailbox) as lane:
        yield lane


@pytest.mark.parametrize("path", ["avx512", "avx2"])
def test_answers(gpu: Gpu, path: str) -> None:
    """The first request right after the start, layers of other bits, pairs with and without a frame."""
    with forced_or_skipped(path), ExpertLane(LAYOUTS, gpu.frames, gpu.mailbox):
        gpu.check(0, [2, -1, -1])
        gpu.check(1, [-1, 3, 1])
        gpu.check(0, [-1, -1, -1])
        gpu.check(0, [0, 2, 0])


def test_a_request_from_before_the_start_is_answered(gpu: Gpu) -> None:
    gpu.ask(1, [1, -1, 3])
    with ExpertLane(LAYOUTS, gpu.frames, gpu.mailbox):
        gpu.wait()
    assert torch.equal(gpu.mailbox.products[2], gpu.expected(1, 3))


@pytest.mark.parametrize("threads", [1, 2])
def test_many_requests(gpu: Gpu, lane: ExpertLane, threads: int) -> None:
    native.set_threads(threads)
    try:
        for i in range(300):
            lane.wake()
            layer = i % 2
            gpu.check(layer, [layer + 2 * (i % 3 == 0), -1 if i % 5 else layer, layer + 2])
    finally:
        native.set_threads(1)


@pytest.mark.parametrize("wake", [True, False])
def test_asleep_it_still_answers(gpu: Gpu, lane: ExpertLane, wake: bool) -> None:
    for _ in range(3):
        gpu.check(0, [0, 2, -1])
        time.sleep(SLEPT)
        if wake:
            lane.wake()


def test_it_spins_no_longer_than_it_must(gpu: Gpu, lane: ExpertLane) -> None:
    """Processor time of the whole process, the pool's threads included, while nothing is asked for."""
    native.set_threads(2)
    try:
        gpu.check(0, [0, 2, -1])
        time.sleep(SLEPT)
        before = time.process_time()
        time.sleep(SLEPT)
        assert time.process_time() - before < SLEPT / 3
    finally:
        native.set_threads(1)


@pytest.mark.parametrize("slept", [0, SLEPT])
def test_close(gpu: Gpu, slept: float) -> None:
    lane = ExpertLane(LAYOUTS, gpu.frames, gpu.mailbox)
    lane.close()
    with closing(lane):
        lane.start()
        gpu.check(1, [1, 1, 1])
        time.sleep(slept)
        lane.close()
        gpu.ask(1, [1, 1, 1])
        time.sleep(0.1)
        assert int(gpu.mailbox.answered) == gpu.sequence - 1, "nobody is there"


# For a process of its own.
A_LANE = f"""
import time, torch
from common.model_config import ModelConfig
from common.record import ExpertBits, record_layouts
from gpu_worker.kernels.expert_lane import ExpertLane, Mailbox
layouts = record_layouts(ModelConfig.from_dict({tiny_config()!r}), [ExpertBits(5, 5)] * 2)
mailbox = Mailbox.allocate(layouts, 1, pinned=False)
lane = ExpertLane(layouts, torch.zeros(1, layouts.stride, dtype=torch.uint8), mailbox)
"""


def test_without_a_thread_there_is_no_lane() -> None:
    result = without_more_room(A_LANE, "try: lane.start()\nexcept Exception as e: print(type(e).__name__, e)")
    assert result.stdout.startswith("Exhausted the system gives no thread"), result.stderr


def test_a_lane_ends_whatever_computes_elsewhere() -> None:
    """Its thread reads what goes with it."""
    script = f"""{A_LANE}
import os
from common.hlwq import native
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
lane.start()
assert threads() == before + 1
with native.forced("plain"):
    lane.close()
assert threads() == before
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("layer", "frame", "said"), [(2, -1, "layer 2"), (0, 1, "frame 1"), (0, -2, "frame -2")]
)
def test_what_cannot_be_ends_the_process(layer: int, frame: int, said: str) -> None:
    script = f"""
{A_LANE}
with lane:
    mailbox.request[1:] = torch.tensor([{layer}, {frame}])
    mailbox.request[0] = 1
    time.sleep(20)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode < 0 and f"{said}, which cannot be" in result.stderr


def test_usable() -> None:
    with native.forced("portable"):
        assert "portable" in (expert_lane.usable(LAYOUTS) or "")
    with native.forced(native.PLAIN):
        assert "native kernels" in (expert_lane.usable(LAYOUTS) or "")
    if native.path() in ("avx2", "avx512"):
        assert expert_lane.usable(LAYOUTS) is None
        raw = layouts_of([ExpertBits(5, 5), ExpertBits(5, 16)])
        assert expert_lane.usable(raw) == "down_proj is not packed"
        wide = layouts_of([ExpertBits(5, 5)] * 2, hidden=25 * BLOCK)
        assert expert_lane.usable(wide) == "rows of up_proj have more than 24 blocks"
        with pytest.raises(ValueError, match="more than 24 blocks"):
            ExpertLane(wide, torch.zeros(1, wide.stride, dtype=torch.uint8), Mailbox.allocate(wide, 1, False))


def test_one_that_is_forgotten_ends(gpu: Gpu) -> None:
    """Its thread would read memory that is gone."""
    threads = Path("/proc/self/task")
    before = len(list(threads.iterdir()))
    lane = ExpertLane(LAYOUTS, gpu.frames, gpu.mailbox)
    lane.start()
    assert len(list(threads.iterdir())) == before + 1
    del lane
    assert len(list(threads.iterdir())) == before
