"""Decode steps on this GPU, at the 30B's shape with random weights: a table, then one JSON line.

    .venv/bin/python scripts/bench_gpu.py [--slots 24 38 128] [--batch 1 8] [--steps 50]

The kernels alone: no store, no prompts. All layers read one arena of 128 random records, and routers choose
at random, which is the worst case for a cache. Not done here yet: both processes, popular experts, prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table
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
class Result:
    """A row of the table; milliseconds of a step."""

    slots: int
    batch: int
    median: float
    lowest: float
    highest: float
    hit_rate: float
    megabytes: float  # moved over the link, a step
    peak: float  # GB of device memory

    @property
    def rate(self) -> float:
        return self.batch * 1e3 / self.median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, nargs="+", default=[24, 38, 128], help="a layer")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="sequences")
    parser.add_argument("--steps", type=int, default=50, help="measured, after as many that are not")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA device here")
    results = list(measure(args.slots, args.batch, args.steps))
    table = Table(title=f"decode steps, random weights at {BITS} bits, {torch.cuda.get_device_name()}")
    for column in ("slots", "sequences", "tokens/s", "ms a step", "spread", "hits", "MB a step", "peak GB"):
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            str(r.slots), str(r.batch), f"{r.rate:.0f}", f"{r.median:.2f}",
            f"{r.lowest:.2f} to {r.highest:.2f}", f"{r.hit_rate:.1%}", f"{r.megabytes:.0f}", f"{r.peak:.2f}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(json.dumps([asdict(result) for result in results]))


@torch.inference_mode()
def measure(slots: list[int], batches: list[int], steps: int) -> Iterator[Result]:
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
                yield _measure(model, SlotSteps(layouts, cache), cache, pools, batch, steps)


def _measure(
    model: DecodeModel, experts: SlotSteps, cache: DeviceSlots, pools: StatePools, batch: int, steps: int
) -> Result:
    device = pools.lengths.device
    tokens, places = torch.zeros(batch, dtype=torch.int64, device=device), torch.arange(batch, device=device)
    pools.lengths.zero_()
    model(tokens, places, pools, experts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(tokens, places, pools, experts)
    warming = 400 if cache.pool.shape[1] == model.config.n_routed_experts else steps
    _replay(graph, tokens, warming, model.config.vocab_size)
    before = cache.counters()
    times = sorted(_replay(graph, tokens, steps, model.config.vocab_size))
    counted = cache.counters().since(before)
    moved, peak = counted.bytes_fetched / steps / 1e6, torch.cuda.max_memory_allocated() / 1e9
    slots = cache.pool.shape[1]
    return Result(slots, batch, times[steps // 2], times[0], times[-1], counted.hit_rate, moved, peak)


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
    """Slots that the device fills from an arena (experts, stride) that all layers share."""
    layers, experts = len(layouts.layers), arena.shape[0]
    device = torch.device("cuda")
    cache = DeviceSlots(layers, experts, slots, layouts.stride, "lru", batch * k, device)
    cache.attach(arena.data_ptr(), torch.arange(experts, dtype=torch.int32).expand(layers, -1))
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


if __name__ == "__main__":
    main()
