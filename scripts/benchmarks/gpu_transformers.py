"""Hugging Face transformers in bfloat16 on the same GPU: the 30B's shape with random weights made there.

Resident, or with accelerate moving from memory what does not fit a budget. As a script it answers `measure`,
see `gpu_child`.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from gpu_child import answers
from gpu_report import Row, Spread
from pair import prompt_of

from common.units import parse_size
from expert_store.synth.shapes import NEMOTRON_30B, config_json

if TYPE_CHECKING:  # its import takes seconds, and is not for whoever only asks
    from transformers import NemotronHConfig, NemotronHForCausalLM

_FAST = ("mamba_ssm", "causal_conv1d")  # without these it computes Mamba-2 by plain PyTorch


@dataclass(frozen=True)
class Options:
    """What the script is told; `offload`: what the device may hold, like 7.6GB; None: everything."""

    device: str
    prompt: int
    new: int
    runs: int
    offload: str | None = None
    reduction: dict[str, Any] | None = None  # of `config_json`


@dataclass(frozen=True)
class TransformersRow(Row):
    """One way to run it."""

    title: ClassVar[str] = "transformers, bfloat16, random weights, one sequence"

    what: str
    prompt: int
    new: int
    decode: Spread  # tokens a second
    prefill: Spread
    first_ms: Spread
    device_bytes: int | None
    missing: list[str]  # packages that would make it faster

    def cells(self) -> dict[str, str]:
        return {
            "what": f"{self.what:>20}", "prompt": str(self.prompt), "tok/s": f"{self.decode.median:7.4g}",
            "spread": f"{self.decode.range:>16}", "prefill/s": f"{self.prefill.median:8.4g}",
            "first ms": f"{self.first_ms.median:8.4g}",
            "peak GB": "-" if self.device_bytes is None else f"{self.device_bytes / 1e9:.2f}",
            "not installed": ", ".join(self.missing) or "-",
        }  # fmt: skip


def benchmark(group: str, options: Options) -> Iterator[TransformersRow]:
    """One row; raises Ended."""
    for answer in answers("gpu_transformers.py", asdict(options)):
        prefill, decode = answer["prefill"], answer["decode"]
        yield TransformersRow(
            group=group,
            what=f"offloaded to {options.offload}" if options.offload else "resident",
            prompt=options.prompt,
            new=options.new,
            decode=Spread.of([(options.new - 1) / seconds for seconds in decode]),
            prefill=Spread.of([options.prompt / seconds for seconds in prefill]),
            first_ms=Spread.of([1e3 * seconds for seconds in prefill]),
            device_bytes=answer["device_bytes"],
            missing=[name for name in _FAST if find_spec(name) is None],
        )


def measure(options: Options) -> dict[str, Any]:
    """Seconds of prefill and decode of each run after a first one, as JSON takes them."""
    from transformers import NemotronHConfig
    from transformers_side import measure as timed

    config = NemotronHConfig(**config_json(NEMOTRON_30B, **(options.reduction or {})))
    model = _model(config, options.device)
    if options.offload is not None:
        model = _offloaded(model, options.offload)
    prompts = [prompt_of(seed, options.prompt, config.vocab_size) for seed in range(options.runs + 1)]
    times = [timed(model, torch.tensor([ids], device=options.device), options.new) for ids in prompts][1:]
    on_gpu = options.device == "cuda"
    return {
        "prefill": [prefill for prefill, _ in times],
        "decode": [decode for _, decode in times],
        "device_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
    }


def _model(config: NemotronHConfig, device: str) -> NemotronHForCausalLM:
    """With the weights that transformers initialises it with, made where they are used."""
    from transformers import NemotronHForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = NemotronHForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def _offloaded(model: NemotronHForCausalLM, budget: str) -> NemotronHForCausalLM:
    """All of it in memory, and as much on the device as the budget holds beside the largest block."""
    from accelerate import dispatch_model, infer_auto_device_map  # only where this is asked for

    model = model.to("cpu")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    limits: dict[int | str, int] = {0: parse_size(budget), "cpu": 1 << 40}
    places = infer_auto_device_map(model, limits, no_split_module_classes=model._no_split_modules)
    return dispatch_model(model, places, main_device=0)


def main() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(json.dumps(measure(Options(**json.loads(sys.argv[1])))), flush=True)


if __name__ == "__main__":
    main()
