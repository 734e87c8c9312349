"""How many slots: what was asked for, what a VRAM budget leaves, and the default."""

import pytest
import torch

from common.errors import ConfigError
from common.model_config import ModelConfig
from gpu_worker.config import DIRECT, WorkerConfig
from gpu_worker.sizing import choose_slots
from tests.helpers.engines import NOWHERE
from tests.helpers.models import tiny_config

RECORD = 1 << 20
MODEL = ModelConfig.from_dict(tiny_config(n_routed_experts=32, num_experts_per_tok=2))  # two layers


def slots(other_bytes: int = 0, **options: int) -> int:
    config = WorkerConfig(store=NOWHERE, listen=NOWHERE, **options)  # type: ignore[arg-type]
    choice = choose_slots(config, MODEL, RECORD, other_bytes, torch.device("cuda"))
    assert choice.slots is not None
    return choice.slots


def test_slots_as_asked_but_never_more_than_experts() -> None:
    assert slots(slots=5) == 5
    assert slots(slots=500) == 32


def test_vram_less_what_is_taken_is_shared_by_the_layers() -> None:
    assert slots(other_bytes=3 * RECORD, vram=13 * RECORD) == 5
    assert slots(vram=1000 * RECORD) == 32
    with pytest.raises(ConfigError, match=r"smallest size that works is 5\.24 MB"):
        slots(other_bytes=3 * RECORD, vram=5 * RECORD - 1)


def test_a_quarter_of_the_experts_by_default() -> None:
    assert slots() == 8


def test_the_cpu_computes_from_frames_unless_asked_otherwise() -> None:
    def choice(device: str, **options: int | str) -> int | None:
        config = WorkerConfig(store=NOWHERE, listen=NOWHERE, **options)  # type: ignore[arg-type]
        return choose_slots(config, MODEL, RECORD, 0, torch.device(device)).slots

    assert choice("cpu") is None and choice("cpu", slots=DIRECT) is None
    assert choice("cpu", slots=3) == 3
    with pytest.raises(ConfigError, match="needs --device cpu"):
        choice("cuda", slots=DIRECT)
