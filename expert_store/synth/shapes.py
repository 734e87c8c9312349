"""The architectures that can be synthesized, as `config.json`, and their reduced forms.

Owns names and sizes; no weights. What a config must fulfil is checked by `common.model_config`.
"""

from __future__ import annotations

from typing import Any

from common.errors import ConfigError
from common.model_config import ModelConfig
from expert_store.synth.tokenizer import BOS_ID, EOS_ID, LEAST_VOCABULARY, PAD_ID

NEMOTRON_30B = "nemotron-cascade-2-30b-a3b"

SHAPES: dict[str, dict[str, Any]] = {
    NEMOTRON_30B: {
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "vocab_size": 131072, "hidden_size": 2688, "max_position_embeddings": 262144,
        "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 1856,
        "mamba_num_heads": 64, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4,
        "chunk_size": 128, "expand": 2, "n_routed_experts": 128, "n_shared_experts": 1,
        "num_experts_per_tok": 6, "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712,
        "routed_scaling_factor": 2.5,
    },
}  # fmt: skip

_COMMON: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "dtype": "bfloat16",
    "layer_norm_epsilon": 1e-5, "attention_bias": False, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "mlp_bias": False, "use_bias": False, "mamba_proj_bias": False, "use_conv_bias": True,
    "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "mamba_ssm_cache_dtype": "float32",
    "time_step_min": 0.001, "time_step_max": 0.1, "time_step_floor": 0.0001, "norm_topk_prob": True,
    "n_group": 1, "topk_group": 1, "residual_in_fp32": False, "rescale_prenorm_residual": True,
    "initializer_range": 0.02, "tie_word_embeddings": False, "use_cache": True, "num_logits_to_keep": 1,
    "bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID,
}  # fmt: skip


def config_json(
    shape: str,
    blocks: int | None = None,
    pattern: str | None = None,
    experts: int | None = None,
    vocab: int | None = None,
) -> dict[str, Any]:
    """`config.json` of `shape`, or of its first `blocks` blocks or another `pattern`; raises ConfigError.

    `experts` are those of one layer, `vocab` the size of the vocabulary.
    """
    config = _COMMON | SHAPES[shape]
    published = config["hybrid_override_pattern"]
    if blocks is not None:
        if not 1 <= blocks <= len(published):
            raise ConfigError(f"{shape} has blocks 1 to {len(published)}, not {blocks}")
        pattern = published[:blocks]
    for name, value in (
        ("hybrid_override_pattern", pattern), ("n_routed_experts", experts), ("vocab_size", vocab)
    ):  # fmt: skip
        if value is not None:
            config[name] = value
    ModelConfig.from_dict(config)
    if config["vocab_size"] < LEAST_VOCABULARY:
        raise ConfigError(
            f"the vocabulary needs {LEAST_VOCABULARY} tokens at least, not {config['vocab_size']}: "
            "every byte and the special tokens"
        )
    return config
