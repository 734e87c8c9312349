"""Small random NemotronH models on disk, as transformers writes them, and ways to damage them.

Every block type is there, and weights are drawn so that mistakes show: biases, decays, norms and router
corrections all differ from their neutral values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM
from transformers.utils import logging

from common.checkpoint import PackedCheckpoint, open_checkpoint
from common.checkpoint.packed_writer import pack
from common.checkpoint.plan import make_plan
from common.checkpoint.unpacking import unpack

TINY: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h",
    "hybrid_override_pattern": "ME*E-M",
    "vocab_size": 96, "hidden_size": 128, "max_position_embeddings": 512, "layer_norm_epsilon": 1e-5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96,
    "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2, "conv_kernel": 4,
    "chunk_size": 16, "time_step_min": 0.0, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 72, "moe_shared_expert_intermediate_size": 144, "routed_scaling_factor": 2.5,
}  # fmt: skip


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """A `config.json` of the published kind: the pattern in letters."""
    return TINY | overrides


def make_hf_model(
    directory: Path, seed: int = 0, *, dtype: torch.dtype = torch.bfloat16, **overrides: Any
) -> Path:
    """A random model of `tiny_config(**overrides)` saved by transformers in one file; returns `directory`."""
    random_model(seed, dtype=dtype, **overrides).save_pretrained(directory)
    return directory


def random_model(seed: int = 0, *, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Any:
    """The same model in memory, for other ways of saving it."""
    logging.disable_progress_bar()
    config = tiny_config(**overrides)
    # transformers takes the logarithm of this to draw dt_bias; the wanted value is set once that is done.
    time_step_min = config.pop("time_step_min")
    model = NemotronHForCausalLM(NemotronHConfig(**config)).to(dtype)
    model.config.time_step_min = time_step_min
    randomise(model, torch.Generator().manual_seed(seed))
    return model


def pack_model(source: Path, destination: Path, up_bits: int = 5, down_bits: int = 5) -> PackedCheckpoint:
    """Pack an unpacked directory, without a progress bar."""
    checkpoint = open_checkpoint(source)
    recipe = {"*.experts.*.up_proj": up_bits, "*.experts.*.down_proj": down_bits}
    return pack(checkpoint, destination, make_plan(checkpoint, recipe=recipe), lambda done, total: None)


def unpack_model(source: Path, destination: Path, layout: str = "bf16", largest_shard: int = 10**9) -> Path:
    """Unpack any checkpoint, without a progress bar; returns `destination`."""
    unpack(open_checkpoint(source), destination, layout, lambda done, total: None, largest_shard)
    return destination


@contextmanager
def edited_tensors(path: Path) -> Iterator[dict[str, Tensor]]:
    """The tensors of a safetensors file, written back at the end of the block."""
    tensors = load_file(path)
    yield tensors
    save_file(tensors, path)


@contextmanager
def edited_json(path: Path) -> Iterator[dict[str, Any]]:
    """A JSON file's object, written back at the end of the block."""
    value = json.loads(path.read_text())
    yield value
    path.write_text(json.dumps(value))


@torch.no_grad()
def randomise(model: NemotronHForCausalLM, generator: torch.Generator) -> None:
    """Every bias, decay, skip, norm and router correction away from its neutral value; matrices keep the
    residual stream near unit size, so that logits are far apart."""
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith(("norm.weight", "norm_f.weight", "mixer.D")):
            tensor.copy_(1 + 0.3 * noise)
        elif name.endswith("A_log"):
            tensor.copy_(noise)
        elif name.endswith("dt_bias"):
            tensor.copy_(noise - 3)  # time steps around 0.05
        elif name.endswith("e_score_correction_bias"):
            tensor.copy_(0.2 * noise)
        elif name.endswith(("embeddings.weight", "conv1d.bias")):
            tensor.copy_(noise)
        else:
            tensor.copy_(noise / math.sqrt(tensor.shape[-1]))
