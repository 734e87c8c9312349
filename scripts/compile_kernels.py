"""Compiles the GPU's kernels, for any GPU, without one.

    .venv/bin/python scripts/compile_kernels.py [--steps-only] [80 86 89 90 100 120]

Decode steps and prompts of the 30B's widths are run as they are, on CPU tensors whose contents nobody looks
at: launches compile and go no further. That a kernel compiles does not say that it is right, or fast.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.append(str(Path(__file__).parent / "benchmarks"))
from gpu_kernels import random_weights

from common.model_config import ModelConfig
from common.record import ExpertBits, RecordLayouts, record_layouts
from expert_store.synth.shapes import NEMOTRON_30B, config_json

CAPABILITIES = (80, 86, 89, 90, 100, 120)
BITS, CONTEXT, VOCABULARY, SLOTS = 5, 1024, 2048, 40
PATTERN = "MEME*E"  # two layers after the first: these are guessed for
MULTIPROCESSORS = 108

compiled: set[Any] = set()
launch = JITFunction.run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capabilities", nargs="*", type=int, default=CAPABILITIES, metavar="CAPABILITY")
    parser.add_argument(
        "--steps-only", action="store_true", help="decode steps of one sequence, nothing else"
    )
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("nothing is compiled under TRITON_INTERPRET=1")
    config = ModelConfig.from_dict(config_json(NEMOTRON_30B, pattern=PATTERN, vocab=VOCABULARY))
    layouts = record_layouts(config, [ExpertBits(BITS, BITS)] * config.num_layers)
    for capability in args.capabilities:
        only_compile(capability)
        compiled.clear()
        weights = random_weights(config, torch.device("cpu"))
        decode_steps(config, weights, layouts, rows=(1,) if args.steps_only else (1, 4))
        if not args.steps_only:
            prompts(config, weights, layouts)
        print(f"compute capability {capability / 10}: {len(compiled)} kernels", flush=True)


def only_compile(capability: int) -> None:
    """From now on, for GPUs of this compute capability."""
    from gpu_worker.cuda.kernels.overlap import overlapping

    target = GPUTarget("cuda", capability, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: capability,  # kernels are kept for each device
            get_current_stream=lambda device: 0,
        )
    )

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        compiled.add(kernel)
        return kernel

    JITFunction.run = run
    torch.cuda.get_device_capability = lambda *device: divmod(capability, 10)
    overlapping.cache_clear()  # it knew of the last one
    torch.cuda.get_device_properties = lambda *device: SimpleNamespace(multi_processor_count=MULTIPROCESSORS)


@torch.inference_mode()
def decode_steps(config: ModelConfig, weights: Any, layouts: RecordLayouts, rows: tuple[int, ...]) -> None:
    """Of so many sequences, those of one with a lane; over slots that hold some experts, and all."""
    from gpu_worker.cuda.decode_model import DecodeModel
    from gpu_worker.cuda.device_slots import DeviceSlots
    from gpu_worker.cuda.kernels.best_token import best_token
    from gpu_worker.cuda.kernels.lane import SHARES, Lane
    from gpu_worker.cuda.step_experts import SlotSteps
    from gpu_worker.kernels.expert_lane import Mailbox
    from gpu_worker.model.states import StatePools

    device, experts, k = torch.device("cpu"), config.n_routed_experts, config.num_experts_per_tok
    lane = Lane.of(Mailbox.allocate(layouts, k, pinned=False), config.num_layers, SHARES.value, device)
    gates = [block.mixer.gate for block in weights.blocks if hasattr(block.mixer, "gate")]
    model, pools = DecodeModel(config, weights), StatePools(config, 4, CONTEXT, torch.bfloat16, device)
    for slots in (SLOTS, experts):
        shape = config.num_layers, experts, slots, layouts.stride
        cache = DeviceSlots(*shape, "lfru", max(rows) * k, device)
        steps = SlotSteps(layouts, cache, gates, config, True, lane)
        for count in rows:
            tokens = torch.zeros(count, dtype=torch.int64)
            best_token(model(tokens, torch.arange(count), pools, steps))


@torch.inference_mode()
def prompts(config: ModelConfig, weights: Any, layouts: RecordLayouts) -> None:
    """A chunk of few tokens, and one of many."""
    from gpu_worker.cuda.kernels.expert_groups import expert_groups
    from gpu_worker.cuda.kernels.expert_products import Products, combine
    from gpu_worker.cuda.kernels.grouped_product import GroupedExperts
    from gpu_worker.cuda.kernels.matrix_decode import PackedLinear
    from gpu_worker.cuda.loading import _linears
    from gpu_worker.cuda.prompt_kernels import PROMPT_KERNELS
    from gpu_worker.model.nemotron_h import NemotronH
    from gpu_worker.model.states import StatePools

    kernels = GroupedExperts(layouts[0])

    def compute(layer: int, x: torch.Tensor, choices: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        pairs, nothing = choices.numel(), torch.zeros_like(x)
        spans, products = [(0, 20), (20, pairs)], torch.empty(pairs, x.shape[1])
        positions, _ = expert_groups(choices, config.n_routed_experts)
        kernels(kernels.prepare(x), [0, 0], spans, positions, choices.shape[1], products)
        return combine(Products(products), of, nothing, nothing)

    experts = SimpleNamespace(
        compute=compute, expect=lambda layer, choices: None, hint=lambda *some: None, wants_hints=False
    )
    for linear in _linears(weights):
        if not isinstance(linear.weight, torch.Tensor):
            linear.computed_by(PackedLinear(linear.weight))
    pools = StatePools(config, 1, CONTEXT, torch.bfloat16, torch.device("cpu"))
    model = NemotronH(config, weights, experts, PROMPT_KERNELS)  # type: ignore[arg-type]
    for tokens in (20, 300):
        model.prefill(torch.zeros(tokens, dtype=torch.int64), 0, pools, 0)


if __name__ == "__main__":
    main()
