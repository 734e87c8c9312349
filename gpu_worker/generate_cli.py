"""The client commands, `gpu-worker generate` and `gpu-worker score`: they talk to a worker, not PyTorch."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common.addresses import Address
from common.errors import InvalidRequest, ServingError, Unavailable
from common.message_json import as_dict, print_json
from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.client import Answers, Generated, Prompt, WorkerClient
from gpu_worker.printing import finish_table

_WORKER = typer.Option("--worker", help="Address of the worker.", metavar="ADDRESS")
_TOKEN_IDS = typer.Option("--token-ids", help="Token ids instead of text, like 1,2,3.", metavar="IDS")
_JSON = typer.Option("--json", help="One line of JSON instead of a stream.")


def register(app: typer.Typer) -> None:
    """Add the commands to the worker's command line."""
    app.command()(generate)
    app.command()(score)


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; '-' reads standard input.")] = None,
    worker: Annotated[str | None, _WORKER] = None,
    token_ids: Annotated[str | None, _TOKEN_IDS] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send PROMPT as a user's message.")] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Stop after this many tokens. Default: 256, or what the API key allows."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the K likeliest; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest that make up this mass.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop what is this much less likely than the best.")] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 disfavours what was said; 1: off.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end token.")] = False,
    samples: Annotated[int, typer.Option(help="Continuations, each told when it is whole.", min=1)] = 1,
    priority: Annotated[
        int, typer.Option(help="More of it waits less; may be negative.", min=-(1 << 31), max=(1 << 31) - 1)
    ] = 0,
    timeout: Annotated[
        float | None,
        typer.Option(help="Give up after so many seconds; default: never.", metavar="SECONDS", min=0.001),
    ] = None,
    json: Annotated[bool, _JSON] = False,
) -> None:
    """Continue a prompt, printing text as it comes. Ctrl-C ends the request.

    Example: gpu-worker generate "def fibonacci(n):" --max-new-tokens 64
    """
    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "min_p": min_p, "repetition_penalty": repetition_penalty, "seed": seed, "stop": stop or [],
        "ignore_eos": ignore_eos,
    }  # fmt: skip
    _check_unsigned(sampling)
    answers = Answers(samples)
    with WorkerClient(Address.of_option(worker, "worker"), retry_for=0) as client:
        given = _prompt(prompt, token_ids, chat)
        events = client.generate(given, samples=samples, priority=priority, timeout=timeout, **sampling)
        for event in _shown(events) if samples == 1 and not json else events:
            answers.add(event)
    _tell_what_is_unused(sampling)
    if json:
        fields = [_fields(answer) for answer in answers.complete()]
        print_json(fields[0] if samples == 1 else {"samples": fields})
    elif samples == 1:
        # Who asked by ids of a checkpoint without a tokenizer gets ids: there is no text.
        (answer,) = answers.complete()
        print("" if answer.text or token_ids is None else _ids(answer), flush=True)
        Console(stderr=True).print(finish_table(_finish(answer)))
    else:
        for answer in answers.complete():
            usage, reason = _finish(answer).usage, _finish(answer).reason
            print(f"[{answer.index}] {usage.completion_tokens} tokens, {reason}")
            print(answer.text if answer.text or token_ids is None else _ids(answer))


def score(
    worker: Annotated[str | None, _WORKER] = None,
    text: Annotated[Path | None, typer.Option(help="File of UTF-8 text; '-' reads standard input.")] = None,
    token_ids: Annotated[str | None, _TOKEN_IDS] = None,
    window: Annotated[int, typer.Option(help="Tokens read at once; 0: the worker's context.")] = 0,
    stride: Annotated[int, typer.Option(help="How far the window moves; 0: as far as it is long.")] = 0,
    json: Annotated[bool, _JSON] = False,
) -> None:
    """Teacher-forced log-probabilities and perplexity of a text.

    Example: gpu-worker score --text chapter.txt --window 1024 --stride 512
    """
    if (text is None) == (token_ids is None):
        raise typer.BadParameter("give either --text or --token-ids")
    given = _parse_ids(token_ids) if token_ids is not None else _read(text)
    _check_unsigned({"window": window, "stride": stride})
    tokens, logprobs = _collect_scores(worker, given, window, stride)
    perplexity = math.exp(-math.fsum(logprobs) / len(logprobs)) if logprobs else None
    if json:
        print_json({"tokens": tokens, "logprobs": logprobs, "perplexity": perplexity})
    else:
        shown = "undefined for a single token" if perplexity is None else f"{perplexity:.4f}"
        print(f"{len(tokens)} tokens, perplexity {shown}")


def _tell_what_is_unused(sampling: dict[str, Any]) -> None:
    """Without a temperature nothing is drawn."""
    idle = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": None}
    unused = [f"--{name.replace('_', '-')}" for name, value in idle.items() if sampling[name] != value]
    if unused and sampling["temperature"] == 0:
        print(f"{' and '.join(unused)}: without --temperature the likeliest token is taken", file=sys.stderr)


def _collect_scores(
    worker: str | None, given: str | list[int], window: int, stride: int
) -> tuple[list[int], list[float]]:
    tokens: list[int] = []
    logprobs: list[float] = []
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with (
        WorkerClient(Address.of_option(worker, "worker"), retry_for=0) as client,
        Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar,
    ):
        task = bar.add_task("")
        for event in client.score(given, window, stride):
            tokens += event.start.tokens
            logprobs += event.piece.logprobs
            bar.update(task, total=max(1, len(tokens) - 1), completed=len(logprobs))
    if len(logprobs) != len(tokens) - 1:
        raise Unavailable("the stream ended early; the worker may have died")
    return tokens, logprobs


def _shown(events: Iterator[pb.GenerateEvent]) -> Iterator[pb.GenerateEvent]:
    """Prints text as it passes; should it break off, what is said of that has a line of its own."""
    begun = False
    try:
        for event in events:
            begun = begun or bool(event.delta.text)
            print(event.delta.text, end="", flush=True)
            yield event
    except (ServingError, KeyboardInterrupt):
        if begun:
            print(flush=True)
        raise


def _finish(answer: Generated) -> pb.Finish:
    assert answer.finish is not None
    return answer.finish


def _fields(answer: Generated) -> dict[str, Any]:
    fields = as_dict(_finish(answer))
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": fields.pop("reason"),
        **fields,
    }


def _ids(answer: Generated) -> str:
    return " ".join(map(str, answer.token_ids))


def _prompt(prompt: str | None, token_ids: str | None, chat: bool) -> Prompt:
    if (prompt is None) == (token_ids is None):
        raise typer.BadParameter("give either PROMPT or --token-ids")
    if token_ids is not None:
        if chat:
            raise typer.BadParameter("--chat takes a PROMPT, not --token-ids")
        return _parse_ids(token_ids)
    assert prompt is not None
    text = _as_utf8(prompt)
    return [{"role": "user", "content": text}] if chat else text


def _as_utf8(prompt: str) -> str:
    """It, or what standard input has for `-`."""
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()  # bytes that no terminal's encoding has come as surrogates
    except UnicodeError as error:
        raise InvalidRequest(f"the prompt is not UTF-8: {error}") from None
    return text


def _parse_ids(text: str) -> list[int]:
    try:
        ids = [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise InvalidRequest(f"--token-ids takes numbers separated by commas, not {text!r}") from None
    bad = next((token for token in ids if not 0 <= token < 1 << 32), None)
    if bad is not None:
        raise InvalidRequest(f"{bad} is not a token id")
    return ids


def _read(path: Path | None) -> str:
    assert path is not None
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read {path}: {error}") from None


def _check_unsigned(options: dict[str, Any]) -> None:
    """The wire has no negative counts; say so in the option's words. The worker checks the rest."""
    for name in ("max_new_tokens", "top_k", "seed", "window", "stride"):
        value = options.get(name)
        if value is not None and not 0 <= value < 1 << (64 if name == "seed" else 32):
            raise InvalidRequest(f"--{name.replace('_', '-')} must not be negative or huge: {value}")
