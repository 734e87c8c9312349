"""Bodies of requests, as OpenAI defines them, with this server's additions; what each field may be.

What would change an answer and is not supported is refused, by its type: a field that allows a neutral value
only. What is not declared is refused too. Turning requests into the worker's is `prompts.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_CHOICES = 128
MOST_PROMPTS = 128
# Fields of which only some values are supported, because others would change what is generated.
NEUTRAL_ONLY = {
    "frequency_penalty", "presence_penalty", "logit_bias", "best_of", "echo", "suffix", "tool_choice",
    "parallel_tool_calls", "response_format.type", "modalities", "store", "service_tier",
}  # fmt: skip
_MOST_TOKENS = (1 << 31) - 1


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _not_too_many(cls, value: Any) -> Any:
        """Before each of a million unknown fields gets an error of its own."""
        if isinstance(value, dict) and len(value) > len(cls.model_fields):
            unknown = next(name for name in value if name not in cls.model_fields)
            raise ValueError(f"unrecognized request argument: {unknown}")
        return value


StopString = Annotated[str, Field(min_length=1, max_length=1024)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 32)]], Field(min_length=1, fail_fast=True)]
Zero = Annotated[float, Field(ge=0, le=0)]
Nothing = Annotated[dict[str, Any], Field(max_length=0)]


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # nothing here is obfuscated


class Sampling(Body):
    """What both endpoints take."""

    model: str | None = Field(
        None, description="As `/v1/models` names it; the one that is served if left out."
    )
    max_tokens: int | None = Field(None, ge=1, le=_MOST_TOKENS)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description="Answers to each prompt.")
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="0 always takes the likeliest token.")
    top_p: float | None = Field(None, gt=0, le=1)
    # Not OpenAI's.
    top_k: int | None = Field(None, ge=-1, lt=1 << 32, description="0 and -1: off.")
    min_p: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    ignore_eos: bool | None = None
    priority: int | None = Field(None, ge=-(1 << 31), lt=1 << 31, description="More goes first.")
    # See NEUTRAL_ONLY.
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Nothing | None = None
    # These change nothing here.
    user: str | None = None

    @model_validator(mode="after")
    def _options_go_with_streams(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for streams: set stream as well")
        return self


class CompletionRequest(Sampling):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    )
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Literal[False] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None


class TextPart(Body):
    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]


class SystemMessage(Body):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(Body):
    name: str
    arguments: str = Field(description="A JSON object.")


class CalledTool(Body):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Body):
    """As a reply of this server has it, so that it can be sent back as it came."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[CalledTool], Field(min_length=1, fail_fast=True)] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolMessage(Body):
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema.")
    strict: Literal[False] | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class TextFormat(Body):
    type: Literal["text"]


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1, le=_MOST_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Arguments of the model's chat template, such as enable_thinking. Not OpenAI's."
    )
    # See NEUTRAL_ONLY.
    parallel_tool_calls: Literal[True] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    # These change nothing here.
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def _fit_together(self) -> ChatRequest:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens is the old name of max_completion_tokens: set one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs are for logprobs: set logprobs as well")
        return self
