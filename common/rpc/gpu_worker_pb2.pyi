from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content", "fields_json")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    FIELDS_JSON_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    fields_json: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ..., fields_json: _Optional[str] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("messages", "tools_json", "template_arguments_json")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TOOLS_JSON_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_ARGUMENTS_JSON_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    tools_json: str
    template_arguments_json: str
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ..., tools_json: _Optional[str] = ..., template_arguments_json: _Optional[str] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_new_tokens", "stop", "ignore_eos", "logprobs", "lower_to_allowed")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOWER_TO_ALLOWED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    max_new_tokens: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    ignore_eos: bool
    logprobs: int
    lower_to_allowed: bool
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., ignore_eos: bool = ..., logprobs: _Optional[int] = ..., lower_to_allowed: bool = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("protocol_version", "text", "token_ids", "chat", "sampling", "samples", "priority")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    text: str
    token_ids: TokenIds
    chat: Chat
    sampling: SamplingParams
    samples: int
    priority: int
    def __init__(self, protocol_version: _Optional[int] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., samples: _Optional[int] = ..., priority: _Optional[int] = ...) -> None: ...

class Alternative(_message.Message):
    __slots__ = ("token_id", "logprob", "piece")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    piece: bytes
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., piece: _Optional[bytes] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("id", "logprob", "alternatives", "piece")
    ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    id: int
    logprob: float
    alternatives: _containers.RepeatedCompositeFieldContainer[Alternative]
    piece: bytes
    def __init__(self, id: _Optional[int] = ..., logprob: _Optional[float] = ..., alternatives: _Optional[_Iterable[_Union[Alternative, _Mapping]]] = ..., piece: _Optional[bytes] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("text", "tokens")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    text: str
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    def __init__(self, text: _Optional[str] = ..., tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "cached_prompt_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., cached_prompt_tokens: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_ms", "prefill_ms", "decode_ms", "tokens_per_second")
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_FIELD_NUMBER: _ClassVar[int]
    DECODE_MS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    tokens_per_second: float
    def __init__(self, queue_ms: _Optional[float] = ..., prefill_ms: _Optional[float] = ..., decode_ms: _Optional[float] = ..., tokens_per_second: _Optional[float] = ...) -> None: ...

class CacheCounters(_message.Message):
    __slots__ = ("hits", "misses", "hit_rate", "bytes_fetched", "staged", "fetch_seconds", "compute_seconds", "misses_on_cpu")
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    HIT_RATE_FIELD_NUMBER: _ClassVar[int]
    BYTES_FETCHED_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    FETCH_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MISSES_ON_CPU_FIELD_NUMBER: _ClassVar[int]
    hits: int
    misses: int
    hit_rate: float
    bytes_fetched: int
    staged: int
    fetch_seconds: float
    compute_seconds: float
    misses_on_cpu: int
    def __init__(self, hits: _Optional[int] = ..., misses: _Optional[int] = ..., hit_rate: _Optional[float] = ..., bytes_fetched: _Optional[int] = ..., staged: _Optional[int] = ..., fetch_seconds: _Optional[float] = ..., compute_seconds: _Optional[float] = ..., misses_on_cpu: _Optional[int] = ...) -> None: ...

class PartSeconds(_message.Message):
    __slots__ = ("mamba_seconds", "attention_seconds", "moe_seconds", "mlp_seconds", "lm_head_seconds")
    MAMBA_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MOE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MLP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LM_HEAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    mamba_seconds: float
    attention_seconds: float
    moe_seconds: float
    mlp_seconds: float
    lm_head_seconds: float
    def __init__(self, mamba_seconds: _Optional[float] = ..., attention_seconds: _Optional[float] = ..., moe_seconds: _Optional[float] = ..., mlp_seconds: _Optional[float] = ..., lm_head_seconds: _Optional[float] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ("reason", "usage", "timings", "cache", "parts")
    REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    usage: Usage
    timings: Timings
    cache: CacheCounters
    parts: PartSeconds
    def __init__(self, reason: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., cache: _Optional[_Union[CacheCounters, _Mapping]] = ..., parts: _Optional[_Union[PartSeconds, _Mapping]] = ...) -> None: ...

class GenerateEvent(_message.Message):
    __slots__ = ("delta", "finish", "index", "in_reasoning")
    DELTA_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    IN_REASONING_FIELD_NUMBER: _ClassVar[int]
    delta: Delta
    finish: Finish
    index: int
    in_reasoning: bool
    def __init__(self, delta: _Optional[_Union[Delta, _Mapping]] = ..., finish: _Optional[_Union[Finish, _Mapping]] = ..., index: _Optional[int] = ..., in_reasoning: bool = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("protocol_version", "text", "token_ids", "window", "stride")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    STRIDE_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    text: str
    token_ids: TokenIds
    window: int
    stride: int
    def __init__(self, protocol_version: _Optional[int] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., window: _Optional[int] = ..., stride: _Optional[int] = ...) -> None: ...

class ScoreStart(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class ScorePiece(_message.Message):
    __slots__ = ("logprobs",)
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class ScoreEvent(_message.Message):
    __slots__ = ("start", "piece")
    START_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    start: ScoreStart
    piece: ScorePiece
    def __init__(self, start: _Optional[_Union[ScoreStart, _Mapping]] = ..., piece: _Optional[_Union[ScorePiece, _Mapping]] = ...) -> None: ...

class ModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelInfoReply(_message.Message):
    __slots__ = ("model", "fingerprint", "vocab_size", "max_context", "has_tokenizer", "has_chat_template", "device", "dtype", "pattern", "layers", "experts_per_layer", "experts_per_token", "tool_call_form", "reasoning_form", "max_sequences")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    HAS_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PATTERN_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_PER_LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALL_FORM_FIELD_NUMBER: _ClassVar[int]
    REASONING_FORM_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    model: str
    fingerprint: str
    vocab_size: int
    max_context: int
    has_tokenizer: bool
    has_chat_template: bool
    device: str
    dtype: str
    pattern: str
    layers: int
    experts_per_layer: int
    experts_per_token: int
    tool_call_form: str
    reasoning_form: str
    max_sequences: int
    def __init__(self, model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_context: _Optional[int] = ..., has_tokenizer: bool = ..., has_chat_template: bool = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., pattern: _Optional[str] = ..., layers: _Optional[int] = ..., experts_per_layer: _Optional[int] = ..., experts_per_token: _Optional[int] = ..., tool_call_form: _Optional[str] = ..., reasoning_form: _Optional[str] = ..., max_sequences: _Optional[int] = ...) -> None: ...

class WorkerStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LayerCounters(_message.Message):
    __slots__ = ("hits", "misses")
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    hits: int
    misses: int
    def __init__(self, hits: _Optional[int] = ..., misses: _Optional[int] = ...) -> None: ...

class SequenceInfo(_message.Message):
    __slots__ = ("request_id", "state", "prompt_tokens", "prompt_tokens_read", "completion_tokens", "age_seconds", "tokens_per_second")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_READ_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    state: str
    prompt_tokens: int
    prompt_tokens_read: int
    completion_tokens: int
    age_seconds: float
    tokens_per_second: float
    def __init__(self, request_id: _Optional[str] = ..., state: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., prompt_tokens_read: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., age_seconds: _Optional[float] = ..., tokens_per_second: _Optional[float] = ...) -> None: ...

class WorkerStats(_message.Message):
    __slots__ = ("slots_per_layer", "slot_bytes", "policy", "prefetch", "cache", "hints_sent", "hints_useful", "requests", "requests_failed", "prompt_tokens", "completion_tokens", "running", "waiting", "store", "uptime_seconds", "slots_pinned", "parts", "vram_budget", "vram_peak", "vram_used", "vram_tensors_peak", "places", "places_taken", "prefix_lookups", "prefix_hits", "prefix_saved_tokens", "prefix_snapshots", "prefix_bytes", "prefix_budget", "layers", "prefetch_useful_bytes", "prefetch_wasted_bytes", "sequences", "resident_bytes", "store_address", "set_aside", "prompt_state_bytes", "state", "ready", "requests_cancelled", "requests_unread")
    SLOTS_PER_LAYER_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    HINTS_SENT_FIELD_NUMBER: _ClassVar[int]
    HINTS_USEFUL_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FAILED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_PINNED_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    VRAM_BUDGET_FIELD_NUMBER: _ClassVar[int]
    VRAM_PEAK_FIELD_NUMBER: _ClassVar[int]
    VRAM_USED_FIELD_NUMBER: _ClassVar[int]
    VRAM_TENSORS_PEAK_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    PLACES_TAKEN_FIELD_NUMBER: _ClassVar[int]
    PREFIX_LOOKUPS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HITS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_SAVED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_BUDGET_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_USEFUL_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_WASTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SET_ASIDE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_CANCELLED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_UNREAD_FIELD_NUMBER: _ClassVar[int]
    slots_per_layer: int
    slot_bytes: int
    policy: str
    prefetch: str
    cache: CacheCounters
    hints_sent: int
    hints_useful: int
    requests: int
    requests_failed: int
    prompt_tokens: int
    completion_tokens: int
    running: int
    waiting: int
    store: str
    uptime_seconds: float
    slots_pinned: int
    parts: PartSeconds
    vram_budget: int
    vram_peak: int
    vram_used: int
    vram_tensors_peak: int
    places: int
    places_taken: int
    prefix_lookups: int
    prefix_hits: int
    prefix_saved_tokens: int
    prefix_snapshots: int
    prefix_bytes: int
    prefix_budget: int
    layers: _containers.RepeatedCompositeFieldContainer[LayerCounters]
    prefetch_useful_bytes: int
    prefetch_wasted_bytes: int
    sequences: _containers.RepeatedCompositeFieldContainer[SequenceInfo]
    resident_bytes: int
    store_address: str
    set_aside: int
    prompt_state_bytes: int
    state: str
    ready: bool
    requests_cancelled: int
    requests_unread: int
    def __init__(self, slots_per_layer: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., policy: _Optional[str] = ..., prefetch: _Optional[str] = ..., cache: _Optional[_Union[CacheCounters, _Mapping]] = ..., hints_sent: _Optional[int] = ..., hints_useful: _Optional[int] = ..., requests: _Optional[int] = ..., requests_failed: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., store: _Optional[str] = ..., uptime_seconds: _Optional[float] = ..., slots_pinned: _Optional[int] = ..., parts: _Optional[_Union[PartSeconds, _Mapping]] = ..., vram_budget: _Optional[int] = ..., vram_peak: _Optional[int] = ..., vram_used: _Optional[int] = ..., vram_tensors_peak: _Optional[int] = ..., places: _Optional[int] = ..., places_taken: _Optional[int] = ..., prefix_lookups: _Optional[int] = ..., prefix_hits: _Optional[int] = ..., prefix_saved_tokens: _Optional[int] = ..., prefix_snapshots: _Optional[int] = ..., prefix_bytes: _Optional[int] = ..., prefix_budget: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[LayerCounters, _Mapping]]] = ..., prefetch_useful_bytes: _Optional[int] = ..., prefetch_wasted_bytes: _Optional[int] = ..., sequences: _Optional[_Iterable[_Union[SequenceInfo, _Mapping]]] = ..., resident_bytes: _Optional[int] = ..., store_address: _Optional[str] = ..., set_aside: _Optional[int] = ..., prompt_state_bytes: _Optional[int] = ..., state: _Optional[str] = ..., ready: bool = ..., requests_cancelled: _Optional[int] = ..., requests_unread: _Optional[int] = ...) -> None: ...

class StopWorkerRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StopWorkerReply(_message.Message):
    __slots__ = ("calls", "drain_timeout")
    CALLS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    calls: int
    drain_timeout: float
    def __init__(self, calls: _Optional[int] = ..., drain_timeout: _Optional[float] = ...) -> None: ...
