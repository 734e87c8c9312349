"""Which tensors a NemotronH model has: canonical names and shapes, computed from its config.

Canonical names are those of published checkpoints (`backbone.layers.N.mixer...`); everything inside this
project uses them. This is the one place that knows them; where a tensor lies on disk is not known here.
"""

from __future__ import annotations

from common.expert_key import ExpertKey
from common.model_config import ATTENTION, MAMBA, MLP, MOE, ModelConfig

Shape = tuple[int, ...]


def canonical(name: str) -> str:
    """The published name of a tensor that a file may call `model....`, as transformers 5 does in memory."""
    return "backbone." + name.removeprefix("model.") if name.startswith("model.") else name


def dense_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every dense weight by canonical name, in the order of the forward pass."""
    hidden = config.hidden_size
    shapes: dict[str, Shape] = {"backbone.embeddings.weight": (config.vocab_size, hidden)}
    for block, kind in enumerate(config.pattern):
        prefix = f"backbone.layers.{block}."
        shapes[prefix + "norm.weight"] = (hidden,)
        for name, shape in _MIXERS[kind](config).items():
            shapes[f"{prefix}mixer.{name}"] = shape
    shapes["backbone.norm_f.weight"] = (hidden,)
    shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def packable_dense(config: ModelConfig) -> tuple[str, ...]:
    """The dense matrices that may be kept packed: projections and lm_head.

    Embeddings are looked up by row, and what routes, normalises or decides recurrences needs its digits.
    """
    return tuple(name for name in dense_shapes(config) if name.endswith(("_proj.weight", "lm_head.weight")))


def expert_shapes(config: ModelConfig) -> tuple[Shape, Shape]:
    """Shapes (out, in) of one routed expert's up and down projection."""
    hidden, intermediate = config.hidden_size, config.moe_intermediate_size
    return (intermediate, hidden), (hidden, intermediate)


def expert_names(config: ModelConfig, key: ExpertKey) -> tuple[str, str]:
    """Canonical names of one routed expert's up and down projection."""
    prefix = f"{_experts_prefix(config, key.layer)}.{key.expert}"
    return f"{prefix}.up_proj.weight", f"{prefix}.down_proj.weight"


def stacked_names(config: ModelConfig, layer: int) -> tuple[str, str]:
    """Names of a layer's up and down projections where they are stacked: (experts, out, in) each."""
    prefix = _experts_prefix(config, layer)
    return f"{prefix}.up_proj", f"{prefix}.down_proj"


def _experts_prefix(config: ModelConfig, layer: int) -> str:
    return f"backbone.layers.{config.blocks_of(MOE)[layer]}.mixer.experts"


def _mamba(config: ModelConfig) -> dict[str, Shape]:
    inner, heads, channels = config.mamba_intermediate_size, config.mamba_num_heads, config.conv_dim
    shapes: dict[str, Shape] = {
        "in_proj.weight": (inner + channels + heads, config.hidden_size),
        "conv1d.weight": (channels, 1, config.conv_kernel),
        "dt_bias": (heads,),
        "A_log": (heads,),
        "D": (heads,),
        "norm.weight": (inner,),
        "out_proj.weight": (config.hidden_size, inner),
    }
    if config.use_conv_bias:
        shapes["conv1d.bias"] = (channels,)
    return shapes


def _attention(config: ModelConfig) -> dict[str, Shape]:
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return {
        "q_proj.weight": (queries, config.hidden_size),
        "k_proj.weight": (keys, config.hidden_size),
        "v_proj.weight": (keys, config.hidden_size),
        "o_proj.weight": (config.hidden_size, queries),
    }


def _mlp(config: ModelConfig) -> dict[str, Shape]:
    return _up_down("", config.hidden_size, config.intermediate_size)


def _moe(config: ModelConfig) -> dict[str, Shape]:
    return {
        "gate.weight": (config.n_routed_experts, config.hidden_size),
        "gate.e_score_correction_bias": (config.n_routed_experts,),
        **_up_down("shared_experts.", config.hidden_size, config.moe_shared_expert_intermediate_size),
    }


def _up_down(prefix: str, hidden: int, intermediate: int) -> dict[str, Shape]:
    return {
        f"{prefix}up_proj.weight": (intermediate, hidden),
        f"{prefix}down_proj.weight": (hidden, intermediate),
    }


_MIXERS = {MAMBA: _mamba, ATTENTION: _attention, MLP: _mlp, MOE: _moe}
