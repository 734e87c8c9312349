"""How device memory is divided: slots, context and all else within the budget, or a refusal that helps."""

from __future__ import annotations

import logging
import re
from math import prod
from typing import Any

import pytest
import torch

from common.checkpoint.names import dense_shapes, packable_dense
from common.checkpoint.source import Stored
from common.errors import ConfigError
from common.model_config import ModelConfig
from common.options import settings_of
from common.record import ExpertBits, record_layouts
from common.units import parse_size
from expert_store.synth.shapes import NEMOTRON_30B, config_json
from gpu_worker import loading, sizing
from gpu_worker.account import Account, Sizes
from gpu_worker.config import AUTO, DIRECT, WorkerConfig
from gpu_worker.sizing import (
    CONTEXT_SHARE,
    LEAST_CONTEXT,
    check_expert_bits,
    choose_account,
    dense_bits_hint,
    resolve_prefix_cache,
    resolve_sequences,
)
from tests.helpers.engines import NOWHERE
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.models import tiny_config

GB = 10**9
MODEL = ModelConfig.from_dict(config_json(NEMOTRON_30B))
LAYOUTS = record_layouts(MODEL, [ExpertBits(5, 5)] * MODEL.num_layers)
EXPERTS, TOKEN_EXPERTS = 128, 6
LONGEST = MODEL.max_position_embeddings


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(total=80 * GB)


class Device:
    """Choices for the 30B on a device."""

    def __init__(self, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cuda, self.monkeypatch = cuda, monkeypatch

    def sizes(self, config: WorkerConfig, stored_bits: int | None = 5) -> Sizes:
        """`stored_bits`: of dense matrices."""
        memory = self.cuda.replace(self.monkeypatch)
        stored = stored_weights(MODEL, stored_bits)
        sequences = resolve_sequences(config, MODEL, torch.device("cuda"), torch.bfloat16)
        return Sizes(MODEL, stored, LAYOUTS.stride, torch.bfloat16, sequences, memory)

    def choose(self, stored_bits: int | None = 5, **options: Any) -> Account:
        config = configured(**options)
        return choose_account(config, self.sizes(config, stored_bits))


@pytest.fixture
def device(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(cuda, monkeypatch)


def configured(**options: Any) -> WorkerConfig:
    return WorkerConfig(store=NOWHERE, listen=NOWHERE, **options)


def stored_weights(model: ModelConfig, bits: int | None) -> dict[str, Stored]:
    packable = packable_dense(model)
    return {
        name: Stored(shape, "BF16", 2 * prod(shape), bits if name in packable else None)
        for name, shape in dense_shapes(model).items()
    }


def entry(account: Account, purpose: str) -> int:
    return next(entry.nbytes for entry in account.entries if entry.purpose == purpose)


@pytest.mark.parametrize("budget", [4, 5, 7.6, 12, 16, 21, 24, 60])
@pytest.mark.parametrize("options", [{}, {"dense_bits": 8}, {"max_sequences": 4}, {"max_context": 5000}])
def test_slots_are_what_all_else_leaves_and_not_one_more(
    device: Device, budget: float, options: dict[str, Any]
) -> None:
    account = device.choose(vram=int(budget * GB), **options)
    assert account.slots is not None and 1 <= account.slots <= EXPERTS
    assert account.total <= budget * GB
    assert account.slots == EXPERTS or account.total + account.slot_bytes > budget * GB


def test_fewer_bits_and_fewer_tokens_leave_more_slots(device: Device) -> None:
    plain, eight, five = (device.choose(None, vram=8 * GB, dense_bits=bits).slots for bits in (None, 8, 5))
    long, short = (device.choose(vram=8 * GB, max_context=tokens).slots for tokens in (LONGEST, 4096))
    assert plain < eight < five and long < short  # type: ignore[operator]


def test_slots_as_asked_but_never_more_than_experts(device: Device) -> None:
    assert device.choose(slots=7).slots == 7
    assert device.choose(slots=500).slots == EXPERTS


@pytest.mark.parametrize(
    "options",
    [{}, {"max_context": LONGEST}, {"max_context": 300}, {"max_sequences": 16}, {"dense_bits": 5}],
)
@pytest.mark.parametrize("stored_bits", [None, 5])
def test_a_refusal_names_the_smallest_size_that_works(
    device: Device, stored_bits: int | None, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="holds no slot") as refused:
        device.choose(stored_bits, vram=GB, **options)
    found = re.findall(r"(?:works is|(--[a-z-]+ \d+) would need) ([\d.]+ [GM]B)", str(refused.value))
    smallest = parse_size(found[0][1])
    assert device.choose(stored_bits, vram=smallest, **options).slots == 1
    with pytest.raises(ConfigError):
        device.choose(stored_bits, vram=smallest - GB // 100, **options)
    for saving, size in found[1:]:
        name, value = saving.removeprefix("--").replace("-", "_").split()
        assert parse_size(size) < smallest
        changed = options | {name: int(value)}
        assert device.choose(stored_bits, vram=parse_size(size), **changed).slots == 1
    savings = {saving.split()[0] for saving, _ in found[1:]}
    assert ("--max-context" in savings) == (options.get("max_context", 0) > LEAST_CONTEXT)
    assert ("--dense-bits" in savings) == (stored_bits is None and "dense_bits" not in options)


def test_more_slots_than_fit_are_refused_with_what_would(device: Device) -> None:
    device.cuda.total = 8 * GB
    with pytest.raises(ConfigError, match=r"holds (\d+) slots .* for 64 slots") as refused:
        device.choose(slots=64)
    fitting = int(re.findall(r"holds (\d+)", str(refused.value))[0])
    assert device.choose(slots=fitting, max_context=LEAST_CONTEXT).slots == fitting


def test_the_context_gets_its_share_and_what_is_left_once_every_expert_has_a_slot(device: Device) -> None:
    account = device.choose(vram=8 * GB)
    kv = entry(account, "keys and values")
    assert kv <= 8 * GB * CONTEXT_SHARE < kv + 1100 * kv / account.context
    resident, roomy = device.choose(vram=23 * GB), device.choose(vram=40 * GB)
    assert resident.slots == roomy.slots == EXPERTS
    assert entry(resident, "keys and values") > 23 * GB * CONTEXT_SHARE
    assert resident.context < roomy.context == LONGEST
    assert device.choose(vram=8 * GB, max_context=2 * LONGEST).context == LONGEST


def test_a_tokens_experts_come_before_a_long_context(device: Device) -> None:
    budget = device.choose(slots=TOKEN_EXPERTS, max_context=LEAST_CONTEXT).total
    account = device.choose(vram=budget)
    assert (account.slots, account.context) == (TOKEN_EXPERTS, LEAST_CONTEXT)


def test_auto_leaves_a_reserve_beside_what_others_take(device: Device) -> None:
    device.cuda.others = 70 * GB
    default, auto = device.choose(), device.choose(vram=AUTO)
    assert default == auto and default.budget is not None
    assert 5.5 * GB < default.budget < 6.2 * GB
    assert "free memory" in default.reason
    with pytest.raises(ConfigError, match=r"--vram 11 GB: the device has 10\.2 GB"):
        device.choose(vram=11 * GB)
    assert device.choose(vram=int(9.9 * GB)).budget == int(9.9 * GB)


def test_what_packing_dense_weights_would_give_is_told_not_done(device: Device) -> None:
    def hint(stored_bits: int | None, **options: Any) -> str | None:
        config = configured(**options)
        sizes = device.sizes(config, stored_bits)
        return dense_bits_hint(config, sizes, choose_account(config, sizes))

    eight, five = (device.choose(None, vram=8 * GB, dense_bits=bits).slots for bits in (8, 5))
    told = hint(None, vram=8 * GB)
    assert told is not None
    assert f"{eight} with --dense-bits 8" in told and f"{five} with --dense-bits 5" in told
    assert hint(5, vram=8 * GB) is hint(None, vram=8 * GB, dense_bits=16) is hint(None, vram=40 * GB) is None


def test_the_log_has_the_account_and_the_allocator_its_limit(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    config = configured(vram=3_200_000_000, max_context=4096)
    with caplog.at_level(logging.INFO):
        account = loading._account(config, device.sizes(config))
    for purpose, nbytes, _ in account.entries:
        assert re.search(rf"{purpose} +{nbytes / 10 ** (9 if nbytes >= GB else 6):.3g} [GM]B", caplog.text)
    assert re.search(rf"slots .* {account.slots} of 128 a layer", caplog.text)
    assert account.slots is not None and account.slots < TOKEN_EXPERTS
    assert "the host drives every step" in caplog.text
    outside = device.cuda.context
    assert 0 < device.cuda.share * device.cuda.total < account.budget - outside  # type: ignore[operator]
    assert account.total - entry(account, "CUDA") < device.cuda.share * device.cuda.total


def test_what_is_in_use_leaves_out_what_others_take(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.others = 3 * GB
    memory = cuda.replace(monkeypatch)
    # What is CUDA's own cannot be told from what is others' then: all that is free is there all the same.
    context = memory.context
    assert 0.5 * GB <= context <= 0.7 * GB and memory.available == cuda.total - 3.5 * GB + context
    cuda.reserved, cuda.most_reserved, cuda.most_allocated = 4 * GB, 6 * GB, 5 * GB
    use = memory.use()
    assert use == (context + 4 * GB, context + 6 * GB, 5 * GB)
    assert "too much" in use.describe(6 * GB) and "too much" not in use.describe(7 * GB)


def test_a_cpu_computes_from_frames_unless_asked_otherwise() -> None:
    model = ModelConfig.from_dict(tiny_config(n_routed_experts=32))  # two layers
    stride = 1 << 20

    def choose(**options: Any) -> Account:
        config = configured(**options)
        return choose_account(config, Sizes(model, stored_weights(model, None), stride, torch.float32, 1))

    assert choose().slots is choose(slots=DIRECT).slots is None
    assert choose(slots=3).slots == 3
    assert choose().context == 512 and choose(max_context=100).context == 100
    others = choose().other_bytes
    assert choose(vram=others + 10 * stride).slots == 5
    with pytest.raises(ConfigError, match="smallest size that works is"):
        choose(vram=others + 2 * stride - 1)
    with pytest.raises(ConfigError, match="on a CPU name a size"):
        choose(vram=AUTO)


def test_sequences_as_named_else_what_costs_no_slots_and_little_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sequences(device: str = "cpu", gigabytes: int = 64, **options: Any) -> int:
        monkeypatch.setattr(sizing, "_memory", lambda: gigabytes * GB)
        return resolve_sequences(configured(**options), MODEL, torch.device(device), torch.float32)

    assert sequences("cuda", max_sequences=5) == sequences(max_sequences=5) == 5
    assert sequences("cuda") == sequences(vram=8 * GB) == 1
    # A sequence of the 30B's whole context takes 3.3 GB.
    assert [sequences(gigabytes=size) for size in (8, 64, 100, 1000)] == [1, 2, 3, 8]
    assert sequences(gigabytes=8, max_context=4096) == 8


def test_the_prefix_cache_gets_what_was_named_else_a_small_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "_memory", lambda: 32 * GB)
    assert resolve_prefix_cache(configured()) == GB
    named = {"0": 0, "1.5GB": 1_500_000_000}
    (option,) = (setting for setting in settings_of(WorkerConfig) if setting.key == "prefix-cache")
    for text, size in named.items():
        assert resolve_prefix_cache(configured(prefix_cache=option.value(text))) == size


def test_frames_serve_no_gpu(device: Device) -> None:
    with pytest.raises(ConfigError, match="needs --device cpu"):
        device.choose(slots=DIRECT)


def test_other_experts_than_those_counted_on_are_refused() -> None:
    check_expert_bits(None, LAYOUTS)
    check_expert_bits(5, LAYOUTS)
    with pytest.raises(ConfigError, match=r"--expert-bits 16: the store serves experts of 5 bits"):
        check_expert_bits(16, LAYOUTS)
    mixed = record_layouts(MODEL, [ExpertBits(3, 4)] * MODEL.num_layers)
    with pytest.raises(ConfigError, match="3 and 4 bits"):
        check_expert_bits(4, mixed)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"vram": "lots"}, "--vram must be a size or auto"),
        ({"vram": AUTO, "slots": 3}, "not both"),
        ({"max_sequences": 0}, "--max-sequences must be 1 to 16"),
        ({"max_sequences": 17}, "--max-sequences must be 1 to 16"),
        ({"max_queue": -1}, "--max-queue must be at least 0"),
        ({"sync_fetch": True, "prefetch": "on"}, "--sync-fetch"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        configured(**options)
