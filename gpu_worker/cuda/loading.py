"""From dense weights and an arena to an engine on a GPU. Imported where there is one."""

from __future__ import annotations

import logging

from common.model_config import ModelConfig
from common.record import RecordLayouts
from common.units import format_bytes
from gpu_worker.cuda.decode_model import DecodeModel
from gpu_worker.cuda.device_slots import DeviceSlots
from gpu_worker.cuda.engine import DeviceEngine
from gpu_worker.cuda.experts import DeviceExperts
from gpu_worker.cuda.host_memory import RegisteredArena, wait_until_full
from gpu_worker.model.nemotron_h import NemotronH
from gpu_worker.model.states import StatePools
from gpu_worker.model.weights import ModelWeights
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
    hints: Hints,
    config: ModelConfig,
) -> DeviceEngine:
    """For a store that keeps every expert in RAM, and slots for one row's experts at least."""
    device = pools.lengths.device
    wait_until_full(fetcher.arena, FULL_TIMEOUT)
    shape = (config.num_layers, config.n_routed_experts, slots, layouts.stride)
    pairs = pools.sequences * config.num_experts_per_tok
    cache = DeviceSlots(*shape, policy, pairs, device)
    experts = DeviceExperts(layouts, cache, RegisteredArena(fetcher.arena, device), hints)
    log.info("%d slots a layer, filled by the device: %s", slots, format_bytes(experts.nbytes))
    model = NemotronH(config, model_weights, experts)
    return DeviceEngine(model, DecodeModel(config, model_weights), pools, experts, eager)
