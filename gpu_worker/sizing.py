"""Automatic choices of the worker, resolved once, with their reason: device, compute type, context, slots.

Everything is chosen before anything is allocated, from an `Account` of what each choice takes. A budget that
is too small is refused with the smallest that works: nothing spills. Not done here: the account's arithmetic.
"""

from __future__ import annotations

import os

import torch

from common.errors import ConfigError
from common.model_config import ModelConfig
from common.record import RecordLayouts
from common.units import format_bytes
from gpu_worker.account import Account, Entry, Sizes
from gpu_worker.config import AUTO, DIRECT, WorkerConfig
from gpu_worker.model.states import StatePools

# On a GPU, keys and values of a long context are bought with slots, which every token profits from. Where no
# context is named, they get this share of the budget, or whatever is left once every expert has its slot.
CONTEXT_SHARE = 1 / 32
LEAST_CONTEXT = 4096  # tokens, of those that are not named
_CONTEXT_STEP = 1024
# Where no number of sequences is named and nothing is bought with their memory: twice as many give no more
# tokens a second by two cores. Should they come to fill their pools, it is no more than this share of RAM.
SEQUENCES = 8
SEQUENCES_SHARE = 1 / 8
# Of RAM, for beginnings of prompts where no size is named: little beside the experts', and on a machine of
# 32 GB still twenty of the 30B, which has 49 MB of recurrent states and 6 KB of keys and values a token.
PREFIX_CACHE_SHARE = 1 / 32
_DENSE_BITS = (8, 5)  # what is weighed against slots where dense weights are plain


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


def resolve_sequences(
    config: WorkerConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> int:
    """How many at a time: what was named; else 1 within a budget, where each costs slots, as on every GPU;
    else SEQUENCES, or as many as SEQUENCES_SHARE has room for."""
    if config.max_sequences is not None:
        return config.max_sequences
    if device.type != "cpu" or config.vram is not None:
        return 1
    longest = model.max_position_embeddings
    context = min(config.max_context or longest, longest)
    one = StatePools(model, 1, context, dtype, "meta").nbytes
    return min(max(int(_memory() * SEQUENCES_SHARE) // one, 1), SEQUENCES)


def resolve_prefix_cache(config: WorkerConfig) -> int:
    """Bytes: what was named, else PREFIX_CACHE_SHARE."""
    return int(_memory() * PREFIX_CACHE_SHARE) if config.prefix_cache is None else config.prefix_cache


def check_expert_bits(wanted: int | None, layouts: RecordLayouts) -> None:
    """ConfigError unless every record has the bits that the user counts on, if they named any."""
    served = sorted({bits for pair in layouts.bits for bits in pair})
    if wanted is not None and served != [wanted]:
        raise ConfigError(
            f"--expert-bits {wanted}: the store serves experts of {' and '.join(map(str, served))} bits; "
            f"give it a checkpoint packed with --bits {wanted}"
        )


def choose_account(config: WorkerConfig, sizes: Sizes) -> Account:
    """Slots and context within the budget; ConfigError when it does not hold what was asked for."""
    if config.slots == DIRECT and sizes.memory is not None:
        raise ConfigError(f"--slots {DIRECT} computes from the store's frames, which needs --device cpu")
    if sizes.memory is None and config.vram == AUTO:
        raise ConfigError("--vram auto divides a GPU's memory; on a CPU name a size, or --slots")
    return _Chooser(config, sizes).choose()


def dense_bits_hint(config: WorkerConfig, sizes: Sizes, account: Account) -> str | None:
    """What packing dense weights would give, where they are plain and nobody said that they shall be."""
    limited = account.budget is not None and account.slots is not None and account.slots < account.experts
    if config.dense_bits is not None or not limited or not sizes.plain_dense():
        return None
    chooser = _Chooser(config, sizes)
    slots = [(bits, chooser.fitting(account.context, bits)) for bits in _DENSE_BITS]
    instead = " and ".join(f"{count} with --dense-bits {bits}" for bits, count in slots)
    return (
        f"dense weights are kept at 16 bits; {chooser.fitting(account.context, None)} slots a layer would be "
        f"{instead}"
    )


class _Chooser:
    """The choices that one command line leaves for one model."""

    def __init__(self, config: WorkerConfig, sizes: Sizes) -> None:
        self.config, self.sizes = config, sizes
        self.experts = sizes.model.n_routed_experts
        # As many as were asked for, if that is a number.
        self.asked = min(config.slots, self.experts) if isinstance(config.slots, int) else None
        self.budget, self.source = self._budget()

    def choose(self) -> Account:
        bits = self.config.dense_bits
        if self.budget is None:
            default = "the CPU computes from the store's frames, by default"
            reason = default if self.config.slots is None else f"--slots {self.config.slots}"
            return self._account(self._longest, self.asked, reason)
        context = self._context()
        fitting = self.fitting(context, bits)
        if fitting < (self.asked or 1):
            raise ConfigError(self._refusal(fitting))
        if self.asked is not None:
            return self._account(context, self.asked, f"--slots {self.config.slots}")
        others = format_bytes(self._other_bytes(context, bits))
        return self._account(context, fitting, f"{self.source} less {others} for all else")

    def fitting(self, context: int, dense_bits: int | None) -> int:
        """Slots of a layer that the budget holds; less than 1 when it does not hold all else."""
        assert self.budget is not None
        left = self.budget - self._other_bytes(context, dense_bits)
        return min(left // self.sizes.slot_bytes, self.experts)

    @property
    def _longest(self) -> int:
        """Tokens that were named, or that the model takes."""
        longest = self.sizes.model.max_position_embeddings
        return min(self.config.max_context or longest, longest)

    def _budget(self) -> tuple[int | None, str]:
        """Bytes, and how that came about in words."""
        memory, named = self.sizes.memory, self.config.vram
        if isinstance(named, int):
            if memory is not None and named > memory.available:
                free = format_bytes(memory.available)
                raise ConfigError(f"--vram {format_bytes(named)}: the device has {free} for this process")
            return named, f"--vram {format_bytes(named)}"
        if memory is None:
            return None, ""
        return memory.automatic, f"{format_bytes(memory.automatic)} of free memory"

    def _context(self) -> int:
        """Tokens: what was named, else by CONTEXT_SHARE; less if slots for a token's experts need room."""
        longest, token_bytes = self._longest, self.sizes.token_bytes
        if self.config.max_context is not None or self.sizes.memory is None or token_bytes == 0:
            return longest
        assert self.budget is not None
        bits = self.config.dense_bits
        least = min(LEAST_CONTEXT, longest)
        context = _clamped(int(self.budget * CONTEXT_SHARE) // token_bytes, least, longest)
        slots = self.fitting(context, bits)
        if slots < (self.asked or min(self.sizes.model.num_experts_per_tok, self.experts)):
            return least
        if (self.asked or slots) < self.experts:
            return context
        unused = self.budget - self._needed(context, bits, self.experts)
        return _clamped(context + unused // token_bytes, context, longest)

    def _entries(self, context: int, dense_bits: int | None) -> tuple[Entry, ...]:
        captured = not (self.config.eager or self.config.sync_fetch)
        return self.sizes.entries(context, dense_bits, captured)

    def _other_bytes(self, context: int, dense_bits: int | None) -> int:
        return sum(entry.nbytes for entry in self._entries(context, dense_bits))

    def _needed(self, context: int, dense_bits: int | None, slots: int) -> int:
        return self._other_bytes(context, dense_bits) + slots * self.sizes.slot_bytes

    def _account(self, context: int, slots: int | None, reason: str) -> Account:
        entries = self._entries(context, self.config.dense_bits)
        return Account(self.budget, entries, slots, self.sizes.slot_bytes, self.experts, context, reason)

    def _refusal(self, fitting: int) -> str:
        """With the smallest budget that works, and what would make that smaller."""
        bits, context, slots = self.config.dense_bits, self._longest, self.asked or 1
        held = f"{fitting} slots" if fitting > 0 else "no slot"
        refused = f"{self.source} holds {held} a layer beside all else"
        least = min(LEAST_CONTEXT, context)
        if self.config.max_context is None and self.sizes.memory is not None:
            context = least
        smallest = f"the smallest size that works is {_up(self._needed(context, bits, slots))}"
        savings = []
        if context > least:
            savings.append(f"--max-context {least} would need {_up(self._needed(least, bits, slots))}")
        if bits is None and self.sizes.plain_dense():
            savings.append(f"--dense-bits 5 would need {_up(self._needed(context, 5, slots))}")
        what = "" if self.asked is None else f", for {self.asked} slots"
        return "; ".join([refused, smallest + what, *savings])


def _memory() -> int:
    """Bytes of RAM that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _clamped(tokens: int, least: int, longest: int) -> int:
    return min(max(tokens // _CONTEXT_STEP * _CONTEXT_STEP, least), longest)


def _up(size: int) -> str:
    """In words that are read back as no less."""
    return f"{-(-size // 10**7) / 100:.2f} GB" if size >= 10**9 else f"{-(-size // 10**4) / 100:.2f} MB"
