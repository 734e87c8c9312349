"""Between the wire and the worker's own types: requests checked and converted, results made messages."""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import Incompatible, InvalidRequest
from common.key_usage import allowed_output
from common.messages import PROTOCOL_VERSION
from common.model_config import ATTENTION, MAMBA, MLP, MOE
from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.chats import chat_tokens
from gpu_worker.engine import Engine
from gpu_worker.model.part_times import LM_HEAD, PartTimes
from gpu_worker.sampling import Choice, SamplingParams
from gpu_worker.slots.counters import CacheCounters
from gpu_worker.tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 256
MOST_SAMPLES = 128


def check_version(version: int) -> None:
    """Raises Incompatible unless the client speaks this protocol, or does not say (0)."""
    if version not in (0, PROTOCOL_VERSION):
        raise Incompatible(
            f"this worker speaks protocol {PROTOCOL_VERSION}, the client {version}; install one version"
        )


def prompt_tokens(
    request: pb.GenerateRequest | pb.ScoreRequest, tokenizer: Tokenizer | None, most: int
) -> Sequence[int]:
    """Token ids of whatever form the prompt has; InvalidRequest for a text of far more than `most`."""
    form = request.WhichOneof("prompt" if isinstance(request, pb.GenerateRequest) else "input")
    if form == "token_ids":
        return list(request.token_ids.ids)
    if form is None:
        raise InvalidRequest("the request has no prompt: give text, token ids or a chat")
    if tokenizer is None:
        raise InvalidRequest("this checkpoint has no tokenizer; send token ids")
    if form == "text":
        return tokenizer.encode(request.text, most)
    assert isinstance(request, pb.GenerateRequest)
    return chat_tokens(request.chat, tokenizer, most)


def samples_of(request: pb.GenerateRequest) -> int:
    """How many continuations are asked for."""
    if request.samples > MOST_SAMPLES:
        raise InvalidRequest(f"samples must be at most {MOST_SAMPLES}, not {request.samples}")
    return request.samples or 1


def sampling_params(message: pb.SamplingParams, samples: int) -> SamplingParams:
    """Validated parameters of each sample; absent fields take the neutral value."""
    return SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        seed=message.seed if message.HasField("seed") else None,
        max_new_tokens=_new_tokens(message, samples),
        stop=tuple(message.stop),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs,
    )


def _new_tokens(message: pb.SamplingParams, samples: int) -> int:
    """At most. What nobody asked for is not refused to a key that may have less."""
    if not message.HasField("max_new_tokens"):
        return allowed_output(DEFAULT_NEW_TOKENS, samples)
    wanted = message.max_new_tokens
    return allowed_output(wanted, samples) if message.lower_to_allowed else wanted


def token_message(choice: Choice, tokenizer: Tokenizer | None) -> pb.Token:
    """With the bytes of every token, if there is a tokenizer."""
    piece = tokenizer.piece if tokenizer else lambda token: b""
    alternatives = [
        pb.Alternative(token_id=token, logprob=logprob, piece=piece(token))
        for token, logprob in choice.alternatives
    ]
    return pb.Token(
        id=choice.token, logprob=choice.logprob, alternatives=alternatives, piece=piece(choice.token)
    )


def cache_message(counters: CacheCounters) -> pb.CacheCounters:
    return pb.CacheCounters(
        hits=counters.hits,
        misses=counters.misses,
        hit_rate=counters.hit_rate,
        bytes_fetched=counters.bytes_fetched,
        misses_on_cpu=counters.misses_on_cpu,
        staged=counters.staged,
        fetch_seconds=counters.fetch_seconds,
        compute_seconds=counters.compute_seconds,
    )


def prefix_fields(engine: Engine) -> dict[str, int]:
    """Fields of WorkerStats about places and the prefix cache."""
    prefixes, places = engine.prefixes, engine.pools.sequences
    return {
        "places": places,
        "places_taken": places - engine.free_places,
        "prefix_lookups": prefixes.counters.lookups,
        "prefix_hits": prefixes.counters.hits,
        "prefix_saved_tokens": prefixes.counters.saved_tokens,
        "prefix_snapshots": prefixes.snapshots,
        "prefix_bytes": prefixes.nbytes,
        "prefix_budget": prefixes.budget,
    }


def layer_messages(counters: CacheCounters) -> list[pb.LayerCounters]:
    return [pb.LayerCounters(hits=layer.hits, misses=layer.misses) for layer in counters.layers]


def parts_message(times: PartTimes, cache: CacheCounters) -> pb.PartSeconds:
    """`cache` of the same span of time: what it says of routed experts is not said twice.

    On a GPU the parts are those of prompts alone, while `cache` counts the fetching of every step that the
    host drives, which may be more than the parts' own.
    """
    return pb.PartSeconds(
        mamba_seconds=times[MAMBA],
        attention_seconds=times[ATTENTION],
        moe_seconds=max(0.0, times[MOE] - cache.fetch_seconds - cache.compute_seconds),
        mlp_seconds=times[MLP],
        lm_head_seconds=times[LM_HEAD],
    )
