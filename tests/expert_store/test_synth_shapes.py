"""The 30B's shape against transformers, and the ways to reduce it."""

import math

import pytest
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from common.checkpoint.names import canonical, dense_shapes, expert_shapes, stacked_names
from common.errors import ConfigError
from common.model_config import ModelConfig
from common.record import ExpertBits, record_layouts
from expert_store.synth.shapes import NEMOTRON_30B, config_json


def test_the_pattern_has_the_published_counts() -> None:
    pattern = config_json(NEMOTRON_30B)["hybrid_override_pattern"]
    assert len(pattern) == 52
    assert {letter: pattern.count(letter) for letter in pattern} == {"M": 23, "E": 23, "*": 6}


def test_the_widths_are_the_published_ones() -> None:
    config = ModelConfig.from_dict(config_json(NEMOTRON_30B))
    assert (config.hidden_size, config.vocab_size, config.max_position_embeddings) == (2688, 131072, 262144)
    experts = (config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size)
    assert experts == (128, 6, 1856)
    assert config.moe_shared_expert_intermediate_size == 3712
    assert (config.routed_scaling_factor, config.norm_topk_prob, config.n_group) == (2.5, True, 1)
    assert (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size) == (64, 64, 128)
    assert (config.n_groups, config.conv_kernel, config.chunk_size) == (8, 4, 128)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 2, 128)


def test_transformers_builds_the_same_model() -> None:
    """Names and shapes of all 31.6 billion parameters, on a device without memory."""
    raw = config_json(NEMOTRON_30B)
    published = NemotronHConfig(**raw)
    with torch.device("meta"):
        model = NemotronHForCausalLM(published)
    theirs = {canonical(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    config = ModelConfig.from_dict(raw)
    ours = dense_shapes(config)
    for layer in range(config.num_layers):
        for name, shape in zip(stacked_names(config, layer), expert_shapes(config), strict=True):
            ours[name] = (config.n_routed_experts, *shape)
    assert theirs == ours
    assert sum(map(math.prod, ours.values())) == pytest.approx(31.6e9, rel=0.01)
    assert ModelConfig.from_dict(published.to_dict()) == config


def test_a_record_takes_six_and_a_half_megabytes() -> None:
    config = ModelConfig.from_dict(config_json(NEMOTRON_30B))
    layouts = record_layouts(config, [ExpertBits(5, 5)] * config.num_layers)
    assert layouts.stride == pytest.approx(6.50e6, rel=1e-3)
    assert config.num_layers * config.n_routed_experts == 2944


def test_reduced_forms() -> None:
    first = config_json(NEMOTRON_30B, blocks=7, experts=8, vocab=300)
    assert first["hybrid_override_pattern"] == "MEMEM*E"
    assert (first["n_routed_experts"], first["vocab_size"]) == (8, 300)
    assert config_json(NEMOTRON_30B, pattern="MEM*E")["hybrid_override_pattern"] == "MEM*E"
    assert config_json(NEMOTRON_30B)["vocab_size"] == 131072, "a reduced form changed the shape itself"


@pytest.mark.parametrize(
    ("reduction", "complaint"),
    [
        ({"blocks": 53}, "1 to 52"),
        ({"blocks": 1}, "no MoE block"),
        ({"pattern": "MQE"}, "unknown block types"),
        ({"pattern": ""}, "unknown block types"),
        ({"experts": 5}, "num_experts_per_tok 6 exceeds"),
        ({"vocab": 260}, "at least"),
    ],
)
def test_refuses_what_no_model_can_be(reduction: dict[str, int | str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        config_json(NEMOTRON_30B, **reduction)  # type: ignore[arg-type]
