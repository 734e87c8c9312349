"""The worker's configuration, frozen once and validated without PyTorch; `sizing` resolves the rest."""

from __future__ import annotations

from dataclasses import dataclass

from common.addresses import Address
from common.errors import ConfigError
from gpu_worker.slots.policies import POLICIES

DEVICES = ("auto", "cuda", "cpu")
DTYPES = ("bfloat16", "float32")
DIRECT = "direct"  # frames of the arena serve as slots
AUTO = "auto"  # as much device memory as is free
MOST_SEQUENCES = 16
PREFETCH_MODES = ("auto", "on", "off")


@dataclass(frozen=True)
class WorkerConfig:
    """`slots` per layer, or DIRECT, or `vram` in bytes or AUTO, or neither; `device`, `dtype` as named.

    `dense_bits`: what to pack dense matrices at while loading, None to leave them as they are stored.
    `expert_bits`: what the store's records must have, None for whatever they have.
    """

    store: Address
    listen: Address
    device: str = "auto"
    dtype: str | None = None
    slots: int | str | None = None
    vram: int | str | None = None
    policy: str = "lru"
    prefetch: str = "auto"
    dense_bits: int | None = None
    expert_bits: int | None = None
    max_context: int | None = None  # tokens of prompt and answer together; None: see `sizing`
    max_sequences: int | None = None  # at a time; None: see `sizing`
    max_queue: int = 256  # requests that may wait for a place
    eager: bool = False  # no captured graphs
    sync_fetch: bool = False  # records are fetched one by one, and each is waited for

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
        if isinstance(self.vram, str) and self.vram != AUTO:
            raise ConfigError(f"--vram must be a size or {AUTO}, not {self.vram!r}")
        if self.sync_fetch and self.prefetch == "on":
            raise ConfigError(
                "--sync-fetch fetches what is missing and nothing else: leave out --prefetch on"
            )
        if self.max_sequences is not None and not 1 <= self.max_sequences <= MOST_SEQUENCES:
            raise ConfigError(f"--max-sequences must be 1 to {MOST_SEQUENCES}, not {self.max_sequences}")
        if self.max_queue < 0:
            raise ConfigError(f"--max-queue must be at least 0, not {self.max_queue}")
        if self.max_context is not None and self.max_context < 2:
            raise ConfigError(f"--max-context must be at least 2, not {self.max_context}")
        if isinstance(self.slots, int) and self.slots < 1:
            raise ConfigError(f"--slots must be at least 1, not {self.slots}")


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{option} must be one of {', '.join(allowed)}, not {value!r}")
