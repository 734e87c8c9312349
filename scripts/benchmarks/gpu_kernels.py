"""Decode steps on this GPU, kernels alone: no store, no prompts, random weights in the 30B's shape.

All layers read one arena of 128 random records, and routers choose at random, which is the worst case for a
cache. Captured as a worker captures its steps, without copying ahead. As a script it answers `measure`, see
`gpu_child`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from gpu_child import answers
from gpu_report import Row, Spread
from torch import Tensor

from common.checkpoint.names import dense_shapes, packable_dense
from common.hlwq.codebook import packing_codebook
from common.hlwq.matrix import PackedMatrix
from common.hlwq.planes import BLOCK, PLANE_WIDTHS, padded
from common.model_config import ModelConfig
from common.record import ExpertBits, RecordLayouts, record_layouts
from expert_store.synth.shapes import NEMOTRON_30B, config_json
from gpu_worker.cuda.decode_model import DecodeModel
from gpu_worker.cuda.device_slots import DeviceSlots
from gpu_worker.cuda.step_experts import SlotSteps
from gpu_worker.model.states import StatePools
from gpu_worker.model.weights import ModelWeights, build_weights

BITS, CONTEXT = 5, 4096


@dataclass(frozen=True)
class KernelRow(Row):
    """Steps of so many sequences over so many slots a layer."""

    title: ClassVar[str] = (
        f"kernels alone: random weights at {BITS} bits, random choices, no store, no prompts"
    )

    slots: int
    batch: int
    step_ms: Spread
    hit_rate: float
    bytes_per_step: float
    device_bytes: int  # the most that was allocated

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.batch * 1e3 / self.step_ms.median

    def cells(self) -> dict[str, str]:
        return {
            "slots": f"{self.slots:5}", "sequences": str(self.batch), "tok/s": f"{self.rate:7.4g}",
            "ms a step": f"{self.step_ms.median:7.2f}", "spread": f"{self.step_ms.range:>16}",
            "hits": f"{self.hit_rate:6.1%}", "MB a step": f"{self.bytes_per_step / 1e6:6.0f}",
            "peak GB": f"{self.device_bytes / 1e9:.2f}",
        }  # fmt: skip


def benchmark(slots: list[int], batches: list[int], steps: int) -> Iterator[KernelRow]:
    """A row for each pair that the device can serve alone; `steps` are measured of each. Raises Ended."""
    for answer in answers("gpu_kernels.py", {"slots": slots, "batches": batches, "steps": steps}):
        times = answer.pop("times")
        yield KernelRow("kernels", step_ms=Spread.of(times), **answer)


@torch.inference_mode()
def measure(slots: list[int], batches: list[int], steps: int) -> Iterator[dict[str, Any]]:
    """Fields of rows, and the milliseconds of each step."""
    device = torch.device("cuda")
    config = ModelConfig.from_dict(config_json(NEMOTRON_30B))
    model = DecodeModel(config, random_weights(config, device))
    layouts = record_layouts(config, [ExpertBits(BITS, BITS)] * config.num_layers)
    arena = random_arena(layouts, config.n_routed_experts)
    pools = StatePools(config, max(batches), CONTEXT, torch.bfloat16, device)
    for count in slots:
        for batch in batches:
            if min(batch * config.num_experts_per_tok, config.n_routed_experts) <= count:
                torch.cuda.reset_peak_memory_stats()
                cache = filled_by_device(layouts, arena, count, batch, config.num_experts_per_tok)
                experts = SlotSteps(layouts, cache, (), config, ahead=False)
                yield _measure(model, experts, cache, pools, batch, steps)


def _measure(
    model: DecodeModel, experts: SlotSteps, cache: DeviceSlots, pools: StatePools, batch: int, steps: int
) -> dict[str, Any]:
    device = pools.lengths.device
    tokens, places = torch.zeros(batch, dtype=torch.int64, device=device), torch.arange(batch, device=device)
    pools.lengths.zero_()
    model(tokens, places, pools, experts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(tokens, places, pools, experts)
    _replay(graph, tokens, steps, model.config.vocab_size)
    before = cache.counters()
    times = _replay(graph, tokens, steps, model.config.vocab_size)
    counted = cache.counters().since(before)
    return {
        "slots": cache.pool.shape[1], "batch": batch, "times": times,
        "hit_rate": counted.hit_rate if counted.misses else 1.0,
        "bytes_per_step": counted.bytes_fetched / steps,
        "device_bytes": torch.cuda.max_memory_allocated(),
    }  # fmt: skip


def _replay(graph: torch.cuda.CUDAGraph, tokens: Tensor, steps: int, vocabulary: int) -> list[float]:
    """Milliseconds of each of some steps; a step's tokens are drawn, so that routers choose anew."""
    times = []
    for _ in range(steps):
        tokens.random_(vocabulary)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def filled_by_device(layouts: RecordLayouts, arena: Tensor, slots: int, batch: int, k: int) -> DeviceSlots:
    """Slots that the device fills from an arena (experts, stride) that all layers share; full if all fit."""
    layers, experts = len(layouts.layers), arena.shape[0]
    device = torch.device("cuda")
    cache = DeviceSlots(layers, experts, slots, layouts.stride, "lru", batch * k, device)
    cache.attach(arena.data_ptr(), torch.arange(experts, dtype=torch.int32).expand(layers, -1))
    if cache.holds_all:
        cache.pool.copy_(arena)
    return cache


def random_weights(config: ModelConfig, device: torch.device) -> ModelWeights:
    """Dense weights drawn on the device, packed where they can be; activations stay finite."""
    packable, dense = set(packable_dense(config)), {}
    for name, shape in dense_shapes(config).items():
        if name in packable:
            dense[name] = random_matrix(*shape, device)
        elif "norm" in name:
            dense[name] = torch.ones(shape, dtype=torch.bfloat16, device=device)
        else:
            dense[name] = (torch.randn(shape, device=device) * 0.02).bfloat16()
    return build_weights(dense, config, torch.bfloat16, device)


def random_matrix(rows: int, columns: int, device: torch.device) -> PackedMatrix:
    blocks = padded(columns) // BLOCK
    planes = tuple(
        torch.randint(256, (rows, blocks * 16 * width), dtype=torch.uint8, device=device)
        for width in PLANE_WIDTHS[BITS]
    )
    norms = (torch.rand(rows, blocks, device=device) * 0.2 + 0.2).half()
    return PackedMatrix(BITS, columns, planes, norms, packing_codebook(BITS).to(device))


def random_arena(layouts: RecordLayouts, experts: int) -> Tensor:
    """Records of random codes in page-locked memory: (experts, stride) uint8."""
    arena = torch.randint(256, (experts, layouts.stride), dtype=torch.uint8).pin_memory()
    for record in arena:
        for matrix in (layout.view(record) for layout in layouts[0].matrices):
            assert matrix.norms is not None and matrix.codebook is not None
            matrix.norms.copy_(torch.rand(matrix.norms.shape) * 0.2 + 0.2)
            matrix.codebook.copy_(packing_codebook(BITS))
    return arena


def main() -> None:
    for answer in measure(**json.loads(sys.argv[1])):
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
