"""Evaluation of a saved demo model and its card (README.md of the directory).

The model is loaded as anyone would load it and measured in float32 on text it never saw. Training figures
come from `training.json`, which training leaves in the directory; the evaluation's are added to it.
"""

import json
import math
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, NemotronHForCausalLM, PreTrainedTokenizerFast

from demo_model import corpus, network

RECORD = "training.json"
PROMPTS = ["def ", "class Queue:\n    ", "    def __init__(self, "]
QUESTION = "Return True if the path is a directory."

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# A demo model: NemotronH in 20 MB

A genuine `NemotronHForCausalLM` (Mamba-2, attention and mixture-of-experts blocks, as in
Nemotron-Cascade-2-30B-A3B) that is small enough to ship with a program and large enough to exercise every
path of one. It writes text that looks like Python. It was trained on the Python standard library by
`scripts/train_demo_model.py` of this project.

## Architecture
{architecture}

## Training
{training}

## Evaluation
On test modules of the standard library, none of which was trained on: {evaluation_tokens:,} tokens in windows
of {window}, each token but a window's first predicted from those before it in the window; BF16 weights,
float32 arithmetic.

| | |
|---|---|
| perplexity per token | {perplexity:.2f} |
| bits per byte | {bits_per_byte:.3f} |

Experts on the same text (share of all choices; entropy of the shares, 1 = uniform):

| MoE layer | min | max | normalised entropy |
|---|---|---|---|
{usage}

## Samples
Really produced by this model, at most {new_tokens} new tokens each, greedy and at temperature 0.7 (seed 0). A
model of this size falls into loops when it is greedy.
{samples}

## Limits
A toy. It has seen four million tokens of one kind of text, knows nothing, and what it writes seldom runs. Use
it to try and to test programs, for nothing else.

## Licence
The model is released under Apache-2.0. The text it was trained on is part of CPython, under the Python
Software Foundation License Version 2; completions may reproduce pieces of it.
"""


@torch.no_grad()
def evaluate_and_write(out: Path, texts: corpus.Corpus, window: int, new_tokens: int = 80) -> None:
    model = NemotronHForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    figures = evaluate(model, tokenizer, texts, window)
    print(json.dumps(figures), flush=True)
    record = json.loads((out / RECORD).read_text())
    (out / RECORD).write_text(json.dumps(record | figures, indent=2) + "\n")
    text = CARD.format(
        architecture=_architecture(model, record["parameters"]),
        training=_training(record, texts),
        usage=_usage(figures),
        samples=_samples(model, tokenizer, new_tokens),
        window=window,
        new_tokens=new_tokens,
        **{k: figures[k] for k in ("evaluation_tokens", "perplexity", "bits_per_byte")},
    )
    (out / "README.md").write_text(text)


def evaluate(
    model: NemotronHForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: corpus.Corpus, window: int
) -> dict:
    windows = torch.from_numpy(corpus.fixed_windows(corpus.encode(tokenizer, texts.evaluation), window))
    losses, totals = [], [torch.zeros(())] * len(network.gates(model))
    for part in windows.split(4):
        counts: list[Tensor] = []
        logits = network.logits(model, part[:, :-1], counts=counts)
        losses.append(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"))
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
    nll = torch.cat(losses).double()
    text_bytes = torch.from_numpy(corpus.bytes_per_token(tokenizer))[windows[:, 1:]].sum().item()
    shares = [total.double() / total.sum() for total in totals]
    return {
        "evaluation_tokens": nll.numel(),
        "perplexity": round(nll.mean().exp().item(), 4),
        "bits_per_byte": round(nll.sum().item() / math.log(2) / text_bytes, 4),
        "expert_share_min": [round(s.min().item(), 4) for s in shares],
        "expert_share_max": [round(s.max().item(), 4) for s in shares],
        "expert_entropy": [round(normalised_entropy(s), 4) for s in shares],
    }


def normalised_entropy(shares: Tensor) -> float:
    return (torch.special.entr(shares).sum() / math.log(len(shares))).item()


def _architecture(model: NemotronHForCausalLM, parameters: int) -> str:
    c = model.config
    return _bullets(
        f"""{parameters:,} parameters, BF16; blocks `{c.hybrid_override_pattern}` (M Mamba-2, E mixture of
        experts, \\* attention)""",
        f"""hidden {c.hidden_size}, vocabulary {c.vocab_size} (byte-level BPE), embeddings not tied, context
        {c.max_position_embeddings}""",
        f"""MoE: {c.n_routed_experts} routed experts of {c.moe_intermediate_size},
        top-{c.num_experts_per_tok}, and a shared one of {c.moe_shared_expert_intermediate_size};
        squared ReLU, no gate; sigmoid router with correction bias, weights normalised and scaled
        by {c.routed_scaling_factor}""",
        f"""Mamba-2: {c.mamba_num_heads} heads of {c.mamba_head_dim}, state {c.ssm_state_size}, {c.n_groups}
        groups, chunks of {c.chunk_size}""",
        f"""attention: {c.num_attention_heads} query and {c.num_key_value_heads} KV heads of {c.head_dim}, no
        positional encoding""",
        "`time_step_min` is 0, so that prefill and decode compute the same function in every implementation",
    )


def _training(record: dict, texts: corpus.Corpus) -> str:
    size = sum(len(text.encode()) for text in texts.train) / 1e6
    return _bullets(
        f"""text: {len(texts.train)} library modules ({size:.1f} MB; no test modules, no generated code page
        tables) and {len(texts.chats):,} short chats made of their functions that have a docstring""",
        "Muon for the blocks' matrices, AdamW for the rest; experts balanced by correction bias alone",
        "of each phase the checkpoint with the least loss on a validation set of other test modules was kept",
        *(f"phase {i}: {_phase(phase)}" for i, phase in enumerate(record["phases"], start=1)),
    )


def _phase(p: dict) -> str:
    return f"""{p["tokens"]:,} tokens ({p["epochs"]} epochs) in {p["steps"]:,} steps of {p["batch"]} windows,
        {p["seconds"]} s on one {p["hardware"]}; peak learning rate {p["lr"]}, weight decay
        {p["weight_decay"]}, dropout {p["dropout"]}, seed {p["seed"]}; kept after {p["kept_tokens"]:,} tokens,
        validation loss {p["validation_loss"]}"""


def _bullets(*items: str) -> str:
    return "\n".join(
        textwrap.fill(" ".join(item.split()), 110, initial_indent="- ", subsequent_indent="  ")
        for item in items
    )


def _usage(figures: dict) -> str:
    rows = zip(*(figures[f"expert_{k}"] for k in ("share_min", "share_max", "entropy")), strict=True)
    return "\n".join(f"| {i} | {low:.2%} | {high:.2%} | {e:.3f} |" for i, (low, high, e) in enumerate(rows))


def _samples(model: NemotronHForCausalLM, tokenizer: PreTrainedTokenizerFast, new_tokens: int) -> str:
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    parts = []
    for prompt in [*PROMPTS, chat]:
        ids = torch.tensor([tokenizer.encode(prompt)])
        for how in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7, "top_k": 0}):
            torch.manual_seed(0)
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **how)
            text = tokenizer.decode(out[0])
            label = "sampled" if how["do_sample"] else "greedy"
            parts.append(f"\nPrompt `{json.dumps(prompt)}`, {label}:\n```\n{text}\n```")
    return "\n".join(parts)
