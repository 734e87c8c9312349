"""Trains the demo model that is shipped in `expert_store/demo/`: a small NemotronH on the standard library.

Every kind of block of the 30B model is in it, in at most 20,000,000 bytes as a BF16 Hugging Face directory.

    python scripts/train_demo_model.py --out OUT [--device cuda] [--tokens N | --minutes N] [--stdlib DIR]
    python scripts/train_demo_model.py --out OUT --resume DIR --tokens 4000000 --lr 2e-3 --batch 8
    python scripts/train_demo_model.py --out OUT --card-only [--stdlib DIR]

Text and tokenizer, network, optimizers, and evaluation with the model card have a module each in
`scripts/demo_model/`; here are the training loop and the saving. The card takes minutes on a CPU: `--no-card`
leaves it to a later `--card-only`. The text is small, so that beyond some 50 million tokens (a dozen epochs)
the model only learns it by heart; `--resume` then anneals the best checkpoint: few tokens, the rate falling
from the start.
"""

import argparse
import dataclasses
import json
import math
import platform
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_model import card, corpus, network, optimizer
from torch import Tensor
from transformers import AutoTokenizer, NemotronHForCausalLM, PreTrainedTokenizerFast

SIZE_LIMIT = 20_000_000
NOT_WEIGHTS = 250_000  # bytes set aside for tokenizer, headers and card
WINDOW = 2048
BALANCE_RATE = 1e-3


def main() -> None:
    args = parse_arguments()
    texts = corpus.read_corpus(args.stdlib)
    if not args.card_only:
        train_and_save(args, texts)
    if not args.no_card:
        card.evaluate_and_write(args.out, texts, WINDOW)
    total = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {total:,} bytes", flush=True)
    if total > SIZE_LIMIT:
        raise SystemExit(f"that is more than {SIZE_LIMIT:,}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument(
        "--resume", type=Path, help="anneal the model of this directory instead of starting a new one"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes", type=float, help="training time, without tokenizing and saving (default 8)"
    )
    length.add_argument("--tokens", type=int, help="training tokens (default 48 million)")
    parser.add_argument("--batch", type=int, default=16, help=f"windows of {WINDOW} tokens a step")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.5)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--checks", type=int, default=20, help="how often to look at the validation text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-card", action="store_true", help="train and save only")
    parser.add_argument(
        "--card-only", action="store_true", help="evaluate what --out holds and write its card"
    )
    for field in dataclasses.fields(network.Sizes):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default)
    args = parser.parse_args()
    if args.minutes is None and args.tokens is None:
        args.tokens = 48_000_000
    return args


def train_and_save(args: argparse.Namespace, texts: corpus.Corpus) -> None:
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model, tokenizer, earlier = resume(args.resume) if args.resume else start(args, texts)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, blocks {model.config.hybrid_override_pattern}", flush=True)
    if 2 * parameters + NOT_WEIGHTS > SIZE_LIMIT:
        raise SystemExit(f"in BF16 and with a tokenizer that is more than {SIZE_LIMIT:,} bytes")

    documents = corpus.encode(tokenizer, texts.train + texts.chats)
    validation = corpus.fixed_windows(corpus.encode(tokenizer, texts.validation), WINDOW)
    print(f"{sum(map(len, documents)):,} training tokens, {validation.size:,} for validation", flush=True)
    record = train(model.to(args.device), documents, validation, args)
    save(model, tokenizer, {"parameters": parameters, "phases": [*earlier, record]}, args.out)


def start(
    args: argparse.Namespace, texts: corpus.Corpus
) -> tuple[NemotronHForCausalLM, PreTrainedTokenizerFast, list[dict]]:
    sizes = network.Sizes(**{f.name: getattr(args, f.name) for f in dataclasses.fields(network.Sizes)})
    tokenizer = corpus.train_tokenizer(texts.train, sizes.vocab, sizes.max_length)
    end_of_text, _, turn_end = tokenizer.convert_tokens_to_ids(corpus.SPECIAL_TOKENS)
    return network.build_model(sizes, end_of_text, turn_end), tokenizer, []


def resume(directory: Path) -> tuple[NemotronHForCausalLM, PreTrainedTokenizerFast, list[dict]]:
    model = NemotronHForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for trace_of_loading in (
        "is_local",
        "local_files_only",
    ):  # would be saved with the tokenizer's own settings
        tokenizer.init_kwargs.pop(trace_of_loading, None)
    return model, tokenizer, json.loads((directory / card.RECORD).read_text())["phases"]


def train(
    model: NemotronHForCausalLM, documents: list[np.ndarray], validation: np.ndarray, args: argparse.Namespace
) -> dict:
    """Trains in place, leaves the parameters that did best on the validation text, returns figures."""
    optimizers = optimizer.make_optimizers(model, args.lr, args.weight_decay)
    batches = corpus.shuffled_batches(documents, WINDOW, args.batch, np.random.default_rng(args.seed))
    best: dict[str, Tensor] = {}
    best_loss, checked, started = math.inf, 0, time.monotonic()
    step, tokens, kept_tokens, progress = 0, 0, 0, 0.0
    while progress < 1.0:
        factor = optimizer.learning_rate_factor(progress, hold_until=0.0 if args.resume else 0.3)
        optimizer.set_learning_rate(optimizers, args.lr * factor)
        windows = torch.from_numpy(next(batches)).to(args.device)
        loss = train_step(model, windows, optimizers, args.dropout, BALANCE_RATE * factor)
        step, tokens = step + 1, tokens + windows[:, 1:].numel()
        seconds = time.monotonic() - started
        progress = tokens / args.tokens if args.tokens else seconds / (60 * args.minutes)
        if min(progress, 1.0) * args.checks < checked + 1:
            continue
        checked += 1
        validation_loss = loss_on(model, validation, args)
        print(
            f"{progress:4.0%} step {step} {tokens / 1e6:.1f} M tokens {seconds:.0f} s: "
            f"training {loss.item():.3f} validation {validation_loss:.4f}",
            flush=True,
        )
        if validation_loss < best_loss:
            best_loss, kept_tokens = validation_loss, tokens
            best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(best)
    return {
        "steps": step,
        "tokens": tokens,
        "kept_tokens": kept_tokens,
        "epochs": round(tokens / sum(map(len, documents)), 1),
        "seconds": round(time.monotonic() - started),
        "hardware": torch.cuda.get_device_name() if windows.is_cuda else f"{platform.machine()} CPU",
        "validation_loss": round(best_loss, 4),
        **{name: getattr(args, name) for name in ("batch", "lr", "weight_decay", "dropout", "seed")},
    }


def train_step(
    model: NemotronHForCausalLM,
    windows: Tensor,
    optimizers: list[torch.optim.Optimizer],
    dropout: float,
    balance_rate: float,
) -> Tensor:
    counts: list[Tensor] = []
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=windows.is_cuda):
        logits = network.logits(model, windows[:, :-1], dropout, counts)
    loss = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for each in optimizers:
        each.step()
        each.zero_grad()
    network.balance(model, counts, balance_rate)
    return loss.detach()


@torch.no_grad()
def loss_on(model: NemotronHForCausalLM, windows: np.ndarray, args: argparse.Namespace) -> float:
    losses = []
    for part in torch.from_numpy(windows).split(args.batch):
        part = part.to(args.device)
        with torch.autocast(part.device.type, torch.bfloat16, enabled=part.is_cuda):
            logits = network.logits(model, part[:, :-1])
        losses.append(F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten(), reduction="none"))
    return torch.cat(losses).mean().item()


@torch.no_grad()
def save(model: NemotronHForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict, out: Path) -> None:
    """Rounds the model to BF16 (not the correction biases), writes the directory and reads it back."""
    model.cpu()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(out, max_shard_size="6MB")
    tokenizer.save_pretrained(out)
    (out / card.RECORD).write_text(json.dumps(record, indent=2) + "\n")
    for path in out.iterdir():
        path.chmod(0o644)

    loaded = NemotronHForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.arange(300)[None] % model.config.vocab_size
    difference = (loaded(ids, use_cache=False).logits - network.logits(model.float(), ids)).abs().max().item()
    print(
        f"saved; read back, transformers' logits are within {difference:.1e} of the trained model's",
        flush=True,
    )
    if not difference < 1e-3:
        raise SystemExit("that is too far")


if __name__ == "__main__":
    main()
