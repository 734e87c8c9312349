"""The worker's configuration, frozen once and validated without PyTorch; `sizing` resolves the rest."""

from __future__ import annotations

from dataclasses import dataclass

from common.addresses import Address
from common.errors import ConfigError
from gpu_worker.slots.policies import POLICIES

DEVICES = ("auto", "cuda", "cpu")
DTYPES = ("bfloat16", "float32")
DIRECT = "direct"  # frames of the arena serve as slots
PREFETCH_MODES = ("auto", "on", "off")


@dataclass(frozen=True)
class WorkerConfig:
    """`slots` per layer, or DIRECT, or `vram` in bytes, or neither; `device`, `dtype` as the user named them.

    `dense_bits`: what to pack dense matrices at while loading, None to leave them as they are stored.
    """

    store: Address
    listen: Address
    device: str = "auto"
    dtype: str | None = None
    slots: int | str | None = None
    vram: int | None = None
    policy: str = "lru"
    prefetch: str = "auto"
    dense_bits: int | None = None
    max_context: int | None = None  # tokens of prompt and answer together; None: as many as the model takes
    eager: bool = False  # no captured graphs

    def __post_init__(self) -> None:
        """Raises ConfigError naming the option."""
        _one_of("--device", self.device, DEVICES)
        _one_of("--policy", self.policy, tuple(POLICIES))
        _one_of("--prefetch", self.prefetch, PREFETCH_MODES)
        if self.dtype is not None:
            _one_of("--dtype", self.dtype, DTYPES)
        if self.slots is not None and self.vram is not None:
            raise ConfigError("give --slots or --vram, not both: --vram sets the number of slots")
        if isinstance(self.slots, str) and self.slots != DIRECT:
            raise ConfigError(f"--slots must be a number or {DIRECT}, not {self.slots!r}")
        if self.max_context is not None and self.max_context < 2:
            raise ConfigError(f"--max-context must be at least 2, not {self.max_context}")
        if isinstance(self.slots, int) and self.slots < 1:
            raise ConfigError(f"--slots must be at least 1, not {self.slots}")


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{option} must be one of {', '.join(allowed)}, not {value!r}")
