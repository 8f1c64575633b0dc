"""The OpenAI protocol: what may be asked (answers.py has what is answered).

Requests are strict: a parameter that Baleen does not have is refused, not overlooked. Those that label a request
(user, metadata, ...) are accepted and change nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, model_validator

from baleen.config import Strict

MAX_STOPS, MAX_STOP_LENGTH = 32, 500
MAX_TOOLS = 128
MAX_TOP_LOGPROBS = 20

# The bound makes pydantic read a string's characters, so that half a surrogate pair, which no answer could repeat, is
# refused.
Text = Annotated[str, Field(max_length=2**30)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


# --- what both endpoints take


class StreamOptions(Strict):
    include_usage: bool = False


class Extension(Strict):
    """Baleen's own. trace: answer with each token's experts, and with speed, energy and cost."""

    trace: bool = False


class ChatExtension(Extension):
    """fit: leave out the oldest turns of a conversation that is too long (the answer says how many). thinking_budget:
    tokens of thought, after which it is closed and the model must answer."""

    fit: bool = False
    thinking_budget: Annotated[int, Field(ge=0)] | None = None


class Sampling(Strict):
    """top_k and min_p are not OpenAI's but everybody's; 0 turns them off."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Stops | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=1024)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    baleen: Extension = Extension()

    @model_validator(mode="after")
    def _options_of_streams(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams: set stream to true, or leave it out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(Sampling):
    """POST /v1/completions. `prompt`: one or more, as text or as token ids. `suffix` fills in the middle."""

    prompt: (
        Text
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = 16  # OpenAI's default
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    suffix: Text | None = None
    best_of: Literal[1] | None = None

    @model_validator(mode="after")
    def _possible(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0: nothing to answer, unless echo is true")
        if self.suffix is not None and (self.echo or not isinstance(self.prompt, str)):
            raise ValueError("suffix goes with one prompt of text, and without echo")
        return self


# --- chat


class TextPart(Strict):
    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[TextPart], Field(min_length=1)]


class FunctionCall(Strict):
    name: ToolName
    arguments: str


class ToolCall(Strict):
    """`index` comes back in a history that a client put together from chunks; it is dropped."""

    index: int | None = Field(default=None, exclude=True)
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Strict):
    role: Literal["user"]
    content: Content
    name: str | None = None


class ToolMessage(Strict):
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


class AssistantMessage(Strict):
    """The last four are of the official client's answers, which come back in a history; they are dropped."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1)] | None = None
    name: str | None = None
    annotations: list[Any] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message of the assistant needs content or tool_calls")
        return self


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Strict):
    """`strict` has no effect: arguments are held to `parameters` where tool_choice forces a call, not otherwise."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class ChosenName(Strict):
    name: ToolName


class ChosenTool(Strict):
    type: Literal["function"]
    function: ChosenName


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchema(Strict):
    name: ToolName
    description: str | None = None
    schema_: dict[str, Any] = Field(validation_alias=AliasChoices("schema"), serialization_alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class TemplateArguments(Strict):
    """`thinking` opens the reasoning (true) or closes it (false); without it the model decides."""

    thinking: bool | None = None


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    baleen: ChatExtension = ChatExtension()
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: TemplateArguments | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def _possible(self) -> ChatRequest:
        lengths = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(lengths) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ: give one, max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, ChosenTool):
            chosen = self.tool_choice.function.name
            if chosen not in [tool.function.name for tool in self.tools or ()]:
                raise ValueError(f"tool_choice names {chosen}, which is not among the tools")
        return self

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def length(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def thinking(self) -> bool | None:
        """What the template is told."""
        if self.chat_template_kwargs is not None and self.chat_template_kwargs.thinking is not None:
            return self.chat_template_kwargs.thinking
        return None if self.reasoning_effort is None else self.reasoning_effort != "none"


class TokenizeRequest(Strict):
    """POST /tokenize: the tokens of a prompt, or of a conversation as the chat endpoint would begin its answer."""

    model: str
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class RenderRequest(Strict):
    """POST /render, for the chat page: Markdown to sanitised HTML."""

    text: Text
