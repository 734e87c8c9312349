"""Automatic choices of the worker, resolved once, with their reason: device, compute type, slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.errors import ConfigError
from common.model_config import ModelConfig
from common.units import format_bytes
from gpu_worker.config import DIRECT, WorkerConfig


@dataclass(frozen=True)
class SlotChoice:
    """Slots per layer, None for direct, and the reason in words for the log."""

    slots: int | None
    reason: str


def resolve_device(config: WorkerConfig) -> torch.device:
    """`auto` takes a GPU if PyTorch sees one; ConfigError for `cuda` without one."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("--device cuda: PyTorch sees no CUDA device; use --device cpu")
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


def resolve_dtype(config: WorkerConfig, device: torch.device) -> torch.dtype:
    """What was named; else bfloat16 on a GPU, float32 on a CPU."""
    name = config.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def choose_slots(
    config: WorkerConfig, model: ModelConfig, stride: int, other_bytes: int, device: torch.device
) -> SlotChoice:
    """Slots per layer; `other_bytes` is what weights and states take of --vram already."""
    experts, layer_bytes = model.n_routed_experts, stride * model.num_layers
    if config.slots == DIRECT and device.type != "cpu":
        raise ConfigError(f"--slots {DIRECT} computes from the store's frames, which needs --device cpu")
    if config.slots == DIRECT:
        return SlotChoice(None, f"--slots {DIRECT}")
    if config.slots is None and config.vram is None and device.type == "cpu":
        return SlotChoice(None, "the CPU computes from the store's frames, by default")
    if isinstance(config.slots, int):
        return SlotChoice(min(config.slots, experts), f"--slots {config.slots}")
    if config.vram is None:
        slots = min(experts, max(experts // 4, 2 * model.num_experts_per_tok))
        return SlotChoice(slots, "a quarter of the experts, by default")
    slots = (config.vram - other_bytes) // layer_bytes
    if slots < 1:
        least = format_bytes(other_bytes + layer_bytes)
        raise ConfigError(
            f"--vram {format_bytes(config.vram)} cannot hold one slot a layer beside weights and states; "
            f"the smallest size that works is {least}"
        )
    reason = f"--vram {format_bytes(config.vram)} less {format_bytes(other_bytes)}"
    return SlotChoice(min(slots, experts), reason)
