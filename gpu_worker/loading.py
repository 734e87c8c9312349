"""From an attachment to a model that can take steps: dense weights, pools, slots, tokenizer."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.arena import MappedArena
from common.checkpoint.names import packable_dense
from common.checkpoint.packed import PackedCheckpoint
from common.checkpoint.packing import packed, unpacked
from common.checkpoint.source import Matrix
from common.errors import CheckpointError, Incompatible
from common.hlwq import native
from common.hlwq.planes import RAW_BITS
from common.json_input import parse_json
from common.model_config import ModelConfig
from common.units import format_bytes
from gpu_worker.account import Account, Sizes
from gpu_worker.config import WorkerConfig
from gpu_worker.engine import Engine
from gpu_worker.model.nemotron_h import NemotronH
from gpu_worker.model.states import StatePools
from gpu_worker.model.weights import ModelWeights, build_weights
from gpu_worker.prefix_cache.tree import PrefixCache
from gpu_worker.printing import account_table, as_text
from gpu_worker.sizing import (
    check_expert_bits,
    choose_account,
    dense_bits_hint,
    resolve_device,
    resolve_dtype,
    resolve_prefix_cache,
    resolve_sequences,
)
from gpu_worker.slots.direct import DirectExperts
from gpu_worker.slots.fetch import Fetcher
from gpu_worker.slots.hints import Hints
from gpu_worker.slots.routed_experts import SlotExperts
from gpu_worker.store_link import Attachment, StoreLink
from gpu_worker.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gpu_worker.cuda.host_memory import RegisteredArena
    from gpu_worker.cuda.memory import DeviceMemory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedModel:
    """What requests need to know of the model, and the engine that runs it."""

    name: str
    fingerprint: str
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    tokenizer: Tokenizer | None
    eos_token_ids: tuple[int, ...]
    engine: Engine
    fetcher: Fetcher
    account: Account  # of memory, as it was planned
    memory: DeviceMemory | None  # of a GPU, to see what became of it

    @property
    def max_context(self) -> int:
        return self.engine.max_context


def load_model(config: WorkerConfig, attachment: Attachment, link: StoreLink) -> ServedModel:
    """Raises Incompatible when the checkpoint on disk is no longer what the store serves, ConfigError when it
    is not what was asked for or does not fit."""
    checkpoint = PackedCheckpoint.open(attachment.checkpoint)
    here = (checkpoint.fingerprint, checkpoint.layout.digest)
    if here != (attachment.fingerprint, attachment.arena.shape.layout_digest):
        raise Incompatible(f"{checkpoint.directory} has changed since the store opened it; restart the store")
    device = resolve_device(config)
    dtype = resolve_dtype(config, device)
    model = checkpoint.config
    check_expert_bits(config.expert_bits, checkpoint.layout)
    memory = _device_memory(device)
    sequences = resolve_sequences(config, model, device, dtype)
    sizes = Sizes(model, checkpoint.dense_stored, checkpoint.layout.stride, dtype, sequences, memory)
    account = _account(config, sizes)
    registering = _registering(attachment.arena, device) if account.slots and device.type == "cuda" else None
    weights = build_weights(_dense(checkpoint, config.dense_bits), model, dtype, device)
    pools = StatePools(model, sequences, account.context, dtype, device)
    log.info("%d sequences at a time, of up to %d tokens", sequences, account.context)
    fetcher = Fetcher(link)
    kernels = f", {native.path()} kernels" if device.type == "cpu" else ""
    log.info("on %s in %s%s; dense weights %s", device, dtype, kernels, format_bytes(weights.nbytes))
    engine = _engine(config, checkpoint, weights, pools, fetcher, account, registering)
    eos_token_ids = _eos_token_ids(checkpoint.directory, model.eos_token_ids)
    engine.cut_law = replace(engine.cut_law, turn_ends=frozenset(eos_token_ids))
    engine.prefixes = PrefixCache(resolve_prefix_cache(config))
    if engine.prefixes.budget:
        log.info("beginnings of prompts are kept in up to %s of RAM", format_bytes(engine.prefixes.budget))
    if memory is not None:
        log.info("%s", memory.use().describe(account.budget))
    return ServedModel(
        name=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        config=model,
        device=device,
        dtype=dtype,
        tokenizer=Tokenizer.from_directory(checkpoint.directory),
        eos_token_ids=eos_token_ids,
        engine=engine,
        fetcher=fetcher,
        account=account,
        memory=memory,
    )


def _device_memory(device: torch.device) -> DeviceMemory | None:
    if device.type != "cuda":
        return None
    from gpu_worker.cuda.memory import DeviceMemory

    return DeviceMemory(device)


def _account(config: WorkerConfig, sizes: Sizes) -> Account:
    """How memory will be divided, as the log tells; from here on, a GPU's is kept within the budget."""
    account = choose_account(config, sizes)
    if sizes.memory is None:
        return account
    log.info("device memory as planned:\n%s", as_text(account_table(account)))
    k = min(sizes.model.num_experts_per_tok, account.experts)
    if account.slots is not None and account.slots < k:
        log.warning(
            "the host drives every step: %d slots are fewer than a token's %d experts", account.slots, k
        )
    if hint := dense_bits_hint(config, sizes, account):
        log.info("%s", hint)
    assert account.budget is not None
    sizes.memory.keep_within(account.budget)
    return account


def _registering(arena: MappedArena, device: torch.device) -> Future[RegisteredArena]:
    """What takes seconds and wants no weights, beside loading these: telling CUDA of the arena, and Triton's
    import and first launch."""
    from gpu_worker.cuda.host_memory import RegisteredArena

    def prepare() -> RegisteredArena:
        registered = RegisteredArena(arena, device)
        launched.result()  # nobody else may use CUDA while steps are captured
        return registered

    pool = ThreadPoolExecutor(2, thread_name_prefix="prepare")
    launched = pool.submit(_first_launch, device)
    registering = pool.submit(prepare)
    pool.shutdown(wait=False)
    return registering


def _first_launch(device: torch.device) -> None:
    """Of any kernel: before it Triton reads all of itself, for the keys of its cache."""
    import_module("gpu_worker.cuda.loading")
    from gpu_worker.cuda.kernels.best_token import best_token

    best_token(torch.zeros(1, 1, device=device))


def _dense(checkpoint: PackedCheckpoint, bits: int | None) -> dict[str, Matrix]:
    """The dense weights as they are stored, mapped; or matrices made anew at `bits` (16: not packed)."""
    changing = set(packable_dense(checkpoint.config)) if bits is not None else set()
    dense = {}
    for name, stored in checkpoint.dense_stored.items():
        if name not in changing or bits == (stored.bits or RAW_BITS):
            dense[name] = checkpoint.mapped_dense_matrix(name)
        elif bits == RAW_BITS:
            dense[name] = unpacked(checkpoint.dense_matrix(name))
        else:
            assert bits is not None
            dense[name] = packed(checkpoint.dense_matrix(name), bits)
    return dense


def _engine(
    config: WorkerConfig,
    checkpoint: PackedCheckpoint,
    weights: ModelWeights,
    pools: StatePools,
    fetcher: Fetcher,
    account: Account,
    registering: Future[RegisteredArena] | None,
) -> Engine:
    """The engine, by where routed experts are computed: in frames, or in slots of the host or the device."""
    model, layout = checkpoint.config, checkpoint.layout
    slots, reason = account.slots, account.reason
    hints = Hints(config.prefetch, fetcher)
    if registering is not None and slots is not None:
        from gpu_worker.cuda.loading import device_engine  # Triton is for those who have a GPU

        log.info("%d slots a layer (%s)", slots, reason)
        cache = slots, config.policy, config.eager
        fetching = config.sync_fetch, config.cpu_experts
        arena = registering.result()
        return device_engine(weights, pools, layout, *cache, fetcher, arena, hints, model, *fetching)
    experts: SlotExperts | DirectExperts
    if slots is None:
        log.info("no slots (%s)", reason)
        experts = DirectExperts(layout, fetcher, hints)
    else:
        experts = SlotExperts(layout, slots, model.n_routed_experts, config.policy, fetcher, hints)
        log.info("%d slots a layer (%s): %s", slots, reason, format_bytes(experts.nbytes))
    return Engine(NemotronH(model, weights, experts), pools, experts)


def _eos_token_ids(directory: Path, fallback: tuple[int, ...]) -> tuple[int, ...]:
    """generation_config.json's, which names every id that ends a turn; else config.json's."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return fallback
    try:
        value = parse_json(path.read_text()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in ids):
        raise CheckpointError(f"{path}: eos_token_id must be a token id or a list of them, not {value!r}")
    return tuple(ids) or fallback
