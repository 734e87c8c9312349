"""The worker's configuration, frozen once and validated without PyTorch; `sizing` resolves the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from common.addresses import Address
from common.errors import ConfigError
from common.options import Option, check_bits_named
from common.process_config import MetricsConfig, ServerConfig, address_option, one_of
from common.units import parse_size
from gpu_worker.slots.policies import POLICIES

DEVICES = ("auto", "cuda", "cpu")
DTYPES = ("bfloat16", "float32")
DIRECT = "direct"  # frames of the arena serve as slots
AUTO = "auto"  # as much device memory as is free
MOST_SEQUENCES = 16
PREFETCH_MODES = ("auto", "on", "off")


def _parse_slots(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _parse_vram(text: str) -> int | str:
    return text if text == AUTO else parse_size(text)


def _parse_prefix_cache(text: str) -> int:
    return 0 if text == "0" else parse_size(text)


@dataclass(frozen=True)
class WorkerConfig(MetricsConfig, ServerConfig):
    """`slots` per layer, or DIRECT, or `vram` in bytes or AUTO, or neither; None is resolved by `sizing`."""

    store: Annotated[Address, address_option()] = field(default_factory=partial(Address.default, "store"))
    listen: Annotated[Address, address_option()] = field(default_factory=partial(Address.default, "worker"))
    device: Annotated[str, Option("auto, cuda or cpu; auto takes a GPU if there is one.")] = "auto"
    dtype: Annotated[
        str | None,
        Option("Compute type, bfloat16 or float32; default: bfloat16 on a GPU, float32 on a CPU."),
    ] = None
    slots: Annotated[
        int | str | None,
        Option(
            "Slots a layer, from 1 up, or 'direct' (the default on a CPU): compute from the store's "
            "memory. Any choice gives the same output.",
            metavar="N|direct",
            parse=_parse_slots,
        ),
    ] = None
    vram: Annotated[
        int | str | None,
        Option(
            "Device memory for everything, like 7.6GB; slots get what all else leaves. Default on a "
            "GPU: auto, most of what is free.",
            metavar="SIZE|auto",
            parse=_parse_vram,
        ),
    ] = None
    dense_bits: Annotated[
        int | None,
        Option(
            "Pack attention's, Mamba's and shared experts' projections and lm_head at 2 to 8 bits while "
            "loading, or 16 to unpack them; default: as they are stored."
        ),
    ] = None
    expert_bits: Annotated[
        int | None,
        Option("Refuse a store whose experts have other bits, so that a benchmark says what it measures."),
    ] = None
    max_context: Annotated[
        int | None,
        Option(
            "Longest prompt and answer together, in tokens. Default: the model's; on a GPU, what fits "
            "in 1/32 of the memory, or more if all experts fit.",
            metavar="N",
        ),
    ] = None
    max_sequences: Annotated[
        int | None,
        Option(
            f"Sequences at a time, 1 to {MOST_SEQUENCES}, with memory for all of them. Default: 1 on a GPU "
            "or within --vram, where more cost slots; else 8, or fewer if that took over 1/8 of the RAM.",
            metavar="N",
        ),
    ] = None
    max_queue: Annotated[
        int, Option("Requests that may wait for others to end; more are refused.", metavar="N")
    ] = 256
    drain_timeout: Annotated[
        float,
        Option(
            "Seconds that accepted requests may take to finish when the worker is asked to stop; those that "
            "do not are refused, to be sent again. 0: all of them.",
            metavar="SECONDS",
        ),
    ] = 30.0  # an answer of 256 tokens at 10 tokens a second; systemd kills after 90 s
    prefix_cache: Annotated[
        int | None,
        Option(
            "RAM for beginnings of prompts that were read before, like 2GB, so that they are not read again; "
            "0: none. Any size gives the same output. Default: 1/32 of the RAM.",
            metavar="SIZE",
            parse=_parse_prefix_cache,
        ),
    ] = None
    policy: Annotated[
        str,
        Option(
            "Which slot to give up: lru, whose expert was used least recently, or lfru, whose expert has the "
            "fewest uses for its age."
        ),
    ] = "lfru"
    prefetch: Annotated[
        str,
        Option("Bring the next layer's experts early, to RAM or a slot: auto (while it pays), on or off."),
    ] = "auto"
    eager: Annotated[bool, Option("On a GPU, launch kernels one by one instead of by CUDA graphs.")] = False
    sync_fetch: Annotated[
        bool,
        Option("On a GPU, fetch missing experts one by one and wait for each; to compare with, it is slow."),
    ] = False

    cpu_experts: Annotated[
        int | None,
        Option(
            "On a GPU whose store has every expert in RAM: threads that compute missing experts on the CPU "
            "while others come over the link, where one sequence is decoded. They are busy as long as tokens "
            "are made. 0: none. Any number gives the same output. Default: cores to spare.",
            metavar="N",
        ),
    ] = None

    def __post_init__(self) -> None:
        """Raises ConfigError naming the option."""
        super().__post_init__()
        one_of("--device", self.device, DEVICES)
        one_of("--policy", self.policy, tuple(POLICIES))
        one_of("--prefetch", self.prefetch, PREFETCH_MODES)
        if self.dtype is not None:
            one_of("--dtype", self.dtype, DTYPES)
        if self.slots is not None and self.vram is not None:
            raise ConfigError("give --slots or --vram, not both: --vram sets the number of slots")
        if isinstance(self.slots, str) and self.slots != DIRECT:
            raise ConfigError(f"--slots must be a number or {DIRECT}, not {self.slots!r}")
        if isinstance(self.vram, str) and self.vram != AUTO:
            raise ConfigError(f"--vram must be a size or {AUTO}, not {self.vram!r}")
        if self.sync_fetch and self.prefetch == "on":
            raise ConfigError(
                "--sync-fetch fetches what is missing and nothing else: leave out --prefetch on"
            )
        check_bits_named("--dense-bits", self.dense_bits)
        check_bits_named("--expert-bits", self.expert_bits)
        if self.max_sequences is not None and not 1 <= self.max_sequences <= MOST_SEQUENCES:
            raise ConfigError(f"--max-sequences must be 1 to {MOST_SEQUENCES}, not {self.max_sequences}")
        if self.cpu_experts is not None and self.cpu_experts < 0:
            raise ConfigError(f"--cpu-experts must be at least 0, not {self.cpu_experts}")
        if self.max_queue < 0:
            raise ConfigError(f"--max-queue must be at least 0, not {self.max_queue}")
        if not 0 <= self.drain_timeout < math.inf:
            raise ConfigError(f"--drain-timeout must be at least 0 seconds, not {self.drain_timeout}")
        if self.max_context is not None and self.max_context < 2:
            raise ConfigError(f"--max-context must be at least 2, not {self.max_context}")
        if isinstance(self.slots, int) and self.slots < 1:
            raise ConfigError(f"--slots must be at least 1, not {self.slots}")
