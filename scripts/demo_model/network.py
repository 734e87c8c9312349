"""The demo model's network: transformers' NemotronHForCausalLM, with a forward pass that is quick to train.

Parameters, names and arithmetic are the library's own, so what is saved is a genuine checkpoint; `logits`
below only computes the same function by faster means (matmul-form scan, experts over sorted tokens, no masks
or caches) and adds dropout and expert counts. `balance` is the auxiliary-loss-free load balancing of
DeepSeek-V3 (arXiv:2412.19437, 2.1.2): an expert chosen too often has its correction bias lowered, which
changes the choice but no weight.

Not here: optimization, data, saving.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import NemotronHConfig, NemotronHForCausalLM

from gpu_worker.model.ssd import ssd_chunk_scan

TIME_STEP_RANGE = (0.001, 0.1)


@dataclass(frozen=True)
class Sizes:
    """The choices of an architecture; a head of Mamba-2 or attention has 64 channels throughout."""

    pattern: str = "MEM*EME*EME"  # M Mamba-2, E mixture of experts, * attention
    hidden: int = 256
    vocab: int = 2048
    experts: int = 32
    top_k: int = 4
    expert_size: int = 72
    shared_size: int = 224
    mamba_heads: int = 8
    mamba_groups: int = 2
    state: int = 64
    heads: int = 4
    kv_heads: int = 2
    max_length: int = 4096


def build_model(sizes: Sizes, end_of_text: int, turn_end: int) -> NemotronHForCausalLM:
    config = NemotronHConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        hybrid_override_pattern=sizes.pattern,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=64,
        max_position_embeddings=sizes.max_length,
        intermediate_size=sizes.shared_size,  # of dense MLP blocks, of which there are none
        ssm_state_size=sizes.state,
        mamba_num_heads=sizes.mamba_heads,
        mamba_head_dim=64,
        n_groups=sizes.mamba_groups,
        chunk_size=128,
        n_routed_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
        moe_intermediate_size=sizes.expert_size,
        moe_shared_expert_intermediate_size=sizes.shared_size,
        n_shared_experts=1,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        n_group=1,
        topk_group=1,
        pad_token_id=end_of_text,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    model = NemotronHForCausalLM(config)
    # 0 from here on, not at construction, where the library takes its logarithm. The library clamps dt at
    # this value in prefill but not in decode, so that with any other value the two compute different
    # functions.
    config.time_step_min = 0.0
    for block in model.model.layers:
        if hasattr(block.mixer, "time_step_limit"):
            block.mixer.time_step_limit = (0.0, math.inf)
    model.generation_config.eos_token_id = [end_of_text, turn_end]
    initialise(model)
    return model


@torch.no_grad()
def initialise(model: NemotronHForCausalLM) -> None:
    """Matrices normal, std 1/sqrt(inputs); those that write to the residual stream less by sqrt(blocks)."""
    depth = len(model.model.layers)
    for name, parameter in model.named_parameters():
        if name.endswith("conv1d.weight"):
            bound = parameter.shape[-1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound)
        elif name.endswith("embeddings.weight"):
            nn.init.normal_(parameter, std=0.5)
        elif parameter.dim() >= 2:
            writes = name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight", "down_proj"))
            nn.init.normal_(parameter, std=(parameter.shape[-1] * (depth if writes else 1)) ** -0.5)
        elif name.endswith("dt_bias"):
            low, high = map(math.log, TIME_STEP_RANGE)
            dt = torch.empty_like(parameter).uniform_(low, high).exp()
            parameter.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus


def logits(
    model: NemotronHForCausalLM, ids: Tensor, dropout: float = 0.0, counts: list[Tensor] | None = None
) -> Tensor:
    """(b, t) ids to (b, t, vocab) logits. Appends each MoE block's choices per expert to `counts`."""
    hidden = F.dropout(model.model.embeddings(ids), dropout)
    for block in model.model.layers:
        normed = block.norm(hidden)
        if block.block_type == "moe":
            mixed = _moe(block.mixer, normed, counts)
        elif block.block_type == "full_attention":
            mixed, _ = block.mixer(hidden_states=normed)
        else:
            mixed = _mamba(block.mixer, normed)
        hidden = hidden + F.dropout(mixed, dropout)
    return model.lm_head(model.model.norm_f(hidden))


@torch.no_grad()
def balance(model: NemotronHForCausalLM, counts: list[Tensor], rate: float) -> None:
    for gate, count in zip(gates(model), counts, strict=True):
        count = count.float()
        gate.e_score_correction_bias += rate * (count.mean() - count).sign()
        gate.e_score_correction_bias -= gate.e_score_correction_bias.mean()


def gates(model: NemotronHForCausalLM) -> list[nn.Module]:
    return [block.mixer.gate for block in model.model.layers if block.block_type == "moe"]


def _mamba(mixer: nn.Module, x: Tensor) -> Tensor:
    groups, state = mixer.n_groups, mixer.ssm_state_size
    gate, conv, dt = mixer.in_proj(x).split(
        [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1
    )
    conv = F.silu(_causal_conv(mixer.conv1d, conv))
    inner, B, C = conv.split([mixer.intermediate_size, groups * state, groups * state], dim=-1)
    with torch.autocast(x.device.type, enabled=False):  # the scan is float32 whatever the rest is
        dt = F.softplus(dt.float() + mixer.dt_bias)
        A = -mixer.A_log.exp()
        inner = inner.float().unflatten(-1, (mixer.num_heads, mixer.head_dim))
        B, C = (m.unflatten(-1, (groups, state)) for m in (B, C))
        y, _ = ssd_chunk_scan(inner, dt, A, B, C, mixer.D, mixer.chunk_size)
    return mixer.out_proj(mixer.norm(y.flatten(2), gate))


def _causal_conv(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """Depthwise convolution over (b, t, channels) as shifted products, quick at width 4."""
    width, tokens = conv.kernel_size[0], x.shape[1]
    padded = F.pad(x.float(), (0, 0, width - 1, 0))
    taps = conv.weight[:, 0].t().contiguous()
    y = conv.bias
    for i in range(width):
        y = torch.addcmul(y, padded[:, i : i + tokens], taps[i])
    return y


def _moe(moe: nn.Module, x: Tensor, counts: list[Tensor] | None) -> Tensor:
    tokens = x.flatten(0, 1)
    chosen, weights = _route(moe.gate, tokens)
    routed = _experts(moe.experts, tokens, chosen, weights, counts)
    return routed.view_as(x) + moe.shared_experts(x)


def _route(gate: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(tokens.device.type, enabled=False):
        scores = F.linear(tokens.float(), gate.weight.float()).sigmoid()
        chosen = (scores + gate.e_score_correction_bias).topk(gate.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True) * gate.routed_scaling_factor


def _experts(
    experts: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor, counts: list[Tensor] | None
) -> Tensor:
    top_k = chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)
    # Not bincount, which waits for the device.
    ids = torch.arange(experts.num_experts, device=x.device)
    ends = torch.searchsorted(chosen.flatten()[order], ids, right=True)
    count = ends.diff(prepend=ends.new_zeros(1))
    if counts is not None:
        counts.append(count)
    rows = x.index_select(0, order // top_k)
    multiply = _grouped_on_gpu if x.is_cuda else _grouped_in_turn
    out = multiply(F.relu(multiply(rows, experts.up_proj, ends)).square(), experts.down_proj, ends)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return (out.index_select(0, back).unflatten(0, (-1, top_k)) * weights[..., None]).sum(1)


def _grouped_on_gpu(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """rows sorted by expert, each expert's ending before row `ends`, times (experts, out, in)."""
    return F.grouped_mm(rows.bfloat16(), matrices.bfloat16().transpose(1, 2), offs=ends.to(torch.int32))


def _grouped_in_turn(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    # split and unbind, whose gradients are one tensor: those of slices and indices are a whole one each.
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    parts = zip(rows.split(counts), matrices.unbind(), strict=True)
    return torch.cat([F.linear(part, matrix) for part, matrix in parts])
