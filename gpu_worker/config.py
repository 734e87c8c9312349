"""The worker's configuration, frozen once; automatic choices are resolved here, with their reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.addresses import Address
from common.errors import ConfigError
from common.model_config import ModelConfig
from common.units import format_bytes
from gpu_worker.slots.policies import POLICIES

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PREFETCH_MODES = ("auto", "on", "off")


@dataclass(frozen=True)
class WorkerConfig:
    """`slots` per layer or `vram` in bytes or neither; `device`, `dtype` as the user named them."""

    store: Address
    listen: Address
    device: str = "auto"
    dtype: str | None = None
    slots: int | None = None
    vram: int | None = None
    policy: str = "lru"
    prefetch: str = "auto"

    def __post_init__(self) -> None:
        """Raises ConfigError naming the option."""
        _one_of("--device", self.device, ("auto", "cuda", "cpu"))
        _one_of("--policy", self.policy, tuple(POLICIES))
        _one_of("--prefetch", self.prefetch, PREFETCH_MODES)
        if self.dtype is not None:
            _one_of("--dtype", self.dtype, tuple(DTYPES))
        if self.slots is not None and self.vram is not None:
            raise ConfigError("give --slots or --vram, not both: --vram sets the number of slots")
        if self.slots is not None and self.slots < 1:
            raise ConfigError(f"--slots must be at least 1, not {self.slots}")

    def resolve_device(self) -> torch.device:
        """`auto` takes a GPU if PyTorch sees one."""
        available = torch.cuda.is_available()
        if self.device == "cuda" and not available:
            raise ConfigError("--device cuda: PyTorch sees no CUDA device; use --device cpu")
        return torch.device("cuda" if available and self.device != "cpu" else "cpu")

    def resolve_dtype(self, device: torch.device) -> torch.dtype:
        """bfloat16 on a GPU, float32 on a CPU, unless named."""
        default = "float32" if device.type == "cpu" else "bfloat16"
        return DTYPES[self.dtype or default]

    def choose_slots(self, model: ModelConfig, stride: int, other_bytes: int) -> SlotChoice:
        """Slots per layer; `other_bytes` is what weights and states take of `vram` already."""
        experts, layers = model.n_routed_experts, model.num_layers
        if self.slots is not None:
            slots = min(self.slots, experts)
            return SlotChoice(slots, f"--slots {self.slots}")
        if self.vram is not None:
            slots = (self.vram - other_bytes) // (stride * layers)
            if slots < 1:
                least = format_bytes(other_bytes + stride * layers)
                raise ConfigError(
                    f"--vram {format_bytes(self.vram)} cannot hold one slot a layer beside weights and "
                    f"states; the smallest size that works is {least}"
                )
            slots = min(slots, experts)
            return SlotChoice(slots, f"--vram {format_bytes(self.vram)} less {format_bytes(other_bytes)}")
        slots = min(experts, max(experts // 4, 2 * model.num_experts_per_tok))
        return SlotChoice(slots, "a quarter of the experts, by default")


@dataclass(frozen=True)
class SlotChoice:
    """Slots per layer, and the reason in words for the log."""

    slots: int
    reason: str


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{option} must be one of {', '.join(allowed)}, not {value!r}")
