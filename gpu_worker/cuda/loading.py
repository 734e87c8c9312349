"""From dense weights and an arena to an engine on a GPU. Imported where there is one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

from common.errors import ConfigError
from common.hlwq.matrix import PackedMatrix
from common.hlwq.planes import RAW_BITS
from common.model_config import ModelConfig
from common.record import RecordLayouts
from common.units import format_bytes
from gpu_worker.cuda.decode_model import DecodeModel
from gpu_worker.cuda.device_slots import MAX_PAIRS, DeviceSlots
from gpu_worker.cuda.engine import DeviceEngine
from gpu_worker.cuda.experts import DeviceExperts
from gpu_worker.cuda.host_lane import NO_LANE, host_lane
from gpu_worker.cuda.host_memory import RegisteredArena
from gpu_worker.cuda.kernels.matrix_decode import PackedLinear
from gpu_worker.cuda.prompt_kernels import PROMPT_KERNELS
from gpu_worker.cuda.record_copies import RecordCopies
from gpu_worker.model.linear import Linear
from gpu_worker.model.nemotron_h import NemotronH
from gpu_worker.model.states import StatePools
from gpu_worker.model.weights import ModelWeights, MoEWeights
from gpu_worker.slots.fetch import Fetcher
from gpu_worker.slots.hints import Hints

log = logging.getLogger(__name__)

FULL_TIMEOUT = 600.0  # seconds that a store may take to read every expert


def device_engine(
    model_weights: ModelWeights,
    pools: StatePools,
    layouts: RecordLayouts,
    slots: int,
    policy: str,
    eager: bool,
    fetcher: Fetcher,
    registered: RegisteredArena,
    hints: Hints,
    config: ModelConfig,
    sync_fetch: bool = False,
    cpu_experts: int | None = 0,
) -> DeviceEngine:
    """`eager`: without captured graphs; `sync_fetch`: the host fetches records singly, and waits for each;
    `cpu_experts`: threads that compute missing experts, None for as many as are to spare. The engine takes
    `registered` over, which is of the fetcher's arena.

    Waits until a store that keeps every expert in RAM has read them all; Unavailable if that takes too long,
    ConfigError for more sequences than a step can take.
    """
    device = pools.lengths.device
    most = MAX_PAIRS // config.num_experts_per_tok
    if pools.sequences > most:
        raise ConfigError(f"--max-sequences {pools.sequences}: a step takes at most {most} of this model")
    full = fetcher.all_fit()
    arena = fetcher.full_arena(FULL_TIMEOUT) if full else fetcher.arena
    shape = (config.num_layers, config.n_routed_experts, slots, layouts.stride)
    cache = DeviceSlots(*shape, policy, pools.sequences * config.num_experts_per_tok, device)
    for linear in _linears(model_weights):
        if isinstance(linear.weight, PackedMatrix) and linear.weight.bits != RAW_BITS:
            linear.computed_by(PackedLinear(linear.weight))
    gates = [block.mixer.gate for block in model_weights.blocks if isinstance(block.mixer, MoEWeights)]
    copies = RecordCopies(fetcher, registered.followed_by(arena), full, device, one_by_one=sync_fetch)
    lane = None
    if full and not sync_fetch and config.num_experts_per_tok <= slots:
        if cpu_experts != 0 and slots < config.n_routed_experts:  # else nothing is missing
            lane = host_lane(layouts, copies.arena, cache.pool[0], config, cpu_experts)
    elif cpu_experts:
        log.info(NO_LANE, "the host drives every step")
    experts = DeviceExperts(layouts, cache, copies, hints, gates, config, lane)
    log.info("slots and staging: %s; %s", format_bytes(experts.nbytes), experts.describe())
    model = NemotronH(config, model_weights, experts, PROMPT_KERNELS)
    return DeviceEngine(model, DecodeModel(config, model_weights), pools, experts, eager)


def _linears(part: object) -> Iterator[Linear]:
    """All projections of some weights."""
    if isinstance(part, Linear):
        yield part
    elif isinstance(part, tuple):
        for member in part:
            yield from _linears(member)
    elif is_dataclass(part):
        for field in fields(part):
            yield from _linears(getattr(part, field.name))
