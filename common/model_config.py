"""The model's shape, read from a Hugging Face `config.json` of the NemotronH family.

Field names are Hugging Face's. This file knows no tensors and no files beyond the one JSON; what
it cannot serve exactly it refuses here, with the field's name, before anything is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.json_input import parse_json

MAMBA, MOE, ATTENTION, MLP = "M", "E", "*", "-"
MOST_EXPERTS = 1 << 16  # in a layer, and as many layers: what the data plane's keys can say
# transformers 5 names the block types in words; both generations of words are in published configs.
_WORDS = {
    "mamba": MAMBA, "linear_attention": MAMBA, "moe": MOE,
    "attention": ATTENTION, "full_attention": ATTENTION, "mlp": MLP,
}  # fmt: skip
# Options of the architecture that change the arithmetic and are implemented for one value only.
_ONLY = {
    "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "mlp_bias": False, "attention_bias": False,
    "use_bias": False, "mamba_proj_bias": False, "moe_latent_size": None, "sliding_window": None,
    "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Shape of one NemotronH model; every field named as in `config.json`."""

    pattern: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    layer_norm_epsilon: float
    # attention
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    # dense MLP blocks
    intermediate_size: int
    # Mamba-2
    mamba_num_heads: int
    mamba_head_dim: int
    ssm_state_size: int
    n_groups: int
    conv_kernel: int
    use_conv_bias: bool
    chunk_size: int
    time_step_min: float
    # mixture of experts
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    n_group: int
    topk_group: int
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Validate a parsed `config.json`; raises ConfigError naming the offending field."""
        _check_architecture(raw)
        values: dict[str, Any] = {"pattern": _pattern(raw), "eos_token_ids": _eos(raw)}
        for field in fields(cls):
            if field.name in values:
                continue
            if field.name not in raw and field.name not in _DEFAULTS:
                raise ConfigError(f"config.json lacks {field.name!r}")
            values[field.name] = raw.get(field.name, _DEFAULTS.get(field.name))
        config = cls(**values)
        config._check_numbers()
        return config

    @classmethod
    def from_directory(cls, directory: Path) -> ModelConfig:
        """Read `directory/config.json`."""
        path = directory / "config.json"
        try:
            raw = parse_json(path.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{directory} has no config.json, so it is not a model directory") from None
        except ValueError as error:  # not JSON, or not UTF-8
            raise ConfigError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} holds no JSON object")
        return cls.from_dict(raw)

    def blocks_of(self, kind: str) -> tuple[int, ...]:
        """Indices of the blocks of one kind, in order; a MoE block's place in it is its *layer*."""
        return tuple(index for index, letter in enumerate(self.pattern) if letter == kind)

    @property
    def num_layers(self) -> int:
        """Number of layers: MoE blocks, counted from 0."""
        return self.pattern.count(MOE)

    @property
    def mamba_intermediate_size(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: x, B and C side by side."""
        return self.mamba_intermediate_size + 2 * self.n_groups * self.ssm_state_size

    def _check_numbers(self) -> None:
        for name in _NUMBERS:
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise ConfigError(f"config.json: {name} must be a number of at least 0, not {value!r}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"config.json: {name} must be a positive integer, not {value!r}")
        if self.n_routed_experts > MOST_EXPERTS or self.num_layers > MOST_EXPERTS:
            raise ConfigError(
                f"config.json: {self.num_layers} layers of {self.n_routed_experts} experts are more than "
                f"{MOST_EXPERTS} of one kind, which can be named"
            )
        _check_divides(self, "num_attention_heads", "num_key_value_heads")
        _check_divides(self, "mamba_num_heads", "n_groups")
        _check_divides(self, "n_routed_experts", "n_group")
        if self.topk_group > self.n_group:
            raise ConfigError(f"config.json: topk_group {self.topk_group} exceeds n_group {self.n_group}")
        choosable = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.num_experts_per_tok > choosable:
            raise ConfigError(
                f"config.json: num_experts_per_tok {self.num_experts_per_tok} exceeds the {choosable} "
                "experts that routing can choose from"
            )


_DEFAULTS: dict[str, Any] = {
    "layer_norm_epsilon": 1e-5, "use_conv_bias": True, "chunk_size": 128, "time_step_min": 0.001,
    "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
    "intermediate_size": 1,
}  # fmt: skip
_POSITIVE = [field.name for field in fields(ModelConfig) if field.type == "int"]
_NUMBERS = [field.name for field in fields(ModelConfig) if field.type == "float"]


def _check_architecture(raw: dict[str, Any]) -> None:
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list):
        raise ConfigError(f"config.json: architectures must be a list, not {architectures!r}")
    known = "NemotronHForCausalLM" in architectures or raw.get("model_type") == "nemotron_h"
    if not known:
        named = ", ".join(map(str, architectures)) or raw.get("model_type") or "none named"
        raise ConfigError(f"unsupported architecture ({named}); only NemotronHForCausalLM is served")
    for name, value in _ONLY.items():
        if raw.get(name, value) != value:
            raise ConfigError(f"config.json: {name}={raw[name]!r} is not supported, only {value!r}")


def _pattern(raw: dict[str, Any]) -> str:
    letters = raw.get("hybrid_override_pattern")
    if letters is None:
        words = raw.get("layers_block_type") or raw.get("layer_types")
        if not isinstance(words, list) or not words:
            raise ConfigError("config.json lacks both hybrid_override_pattern and layers_block_type")
        letters = "".join(_WORDS.get(str(word), "?") for word in words)
    unknown = not isinstance(letters, str) or set(letters) - {MAMBA, MOE, ATTENTION, MLP}
    if unknown or not letters:
        raise ConfigError(f"config.json: unknown block types in the pattern {letters!r}")
    if MOE not in letters:
        raise ConfigError("config.json: the pattern has no MoE block, so there are no experts to store")
    assert isinstance(letters, str)
    return letters


def _eos(raw: dict[str, Any]) -> tuple[int, ...]:
    value = raw.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) for token in ids):
        raise ConfigError(f"config.json: eos_token_id must be a token id or a list of them, not {value!r}")
    return tuple(ids)


def _check_divides(config: ModelConfig, whole: str, part: str) -> None:
    if getattr(config, whole) % getattr(config, part):
        raise ConfigError(
            f"config.json: {part} {getattr(config, part)} does not divide {whole} {getattr(config, whole)}"
        )
