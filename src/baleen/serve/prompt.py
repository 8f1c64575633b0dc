"""A request's messages or text into the token ids that the engine is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from baleen.config import UserError
from baleen.data.fim import fim_tokens
from baleen.data.tokenizer import Tokenizer
from baleen.infer.parse import END_THINK, THINK
from baleen.serve.errors import BadRequest
from baleen.serve.protocol import AssistantMessage, ChatRequest, CompletionRequest, Message, SystemMessage, TextPart


def chat_prompt(tokenizer: Tokenizer, request: ChatRequest, system: str = "") -> list[int]:
    """The conversation, up to where the assistant speaks. Raises BadRequest for what the template refuses."""
    tools = [tool.model_dump(exclude_none=True) for tool in request.offered]
    return conversation(tokenizer, request.messages, request.thinking, tools, system)


def conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    thinking: bool | None = None,
    tools: Sequence[Any] = (),
    system: str = "",
) -> list[int]:
    """system: what a conversation begins with that has no system message of its own."""
    if tokenizer.template is None:
        raise BadRequest("this model has no chat template: use /v1/completions", param="model", code="no_chat_template")
    spoken = [template_message(message) for message in messages]
    if system and all(message["role"] != "system" for message in spoken):
        spoken.insert(0, {"role": "system", "content": system})
    return tokenizer.encode_chat(spoken, add_generation_prompt=True, thinking=thinking, tools=tools)


def template_message(message: Message) -> dict[str, Any]:
    """As templates want it: content is text, `developer` is `system`, and reasoning stands where it was written."""
    fields: dict[str, Any] = {"role": message.role, "content": text_of(message.content)}
    if isinstance(message, SystemMessage):
        fields["role"] = "system"
    if isinstance(message, AssistantMessage):
        if message.reasoning_content:
            fields["content"] = f"{THINK}\n{message.reasoning_content}{END_THINK}{fields['content']}"
        if message.tool_calls:
            fields["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    else:
        for name in ("name", "tool_call_id"):
            if (value := getattr(message, name, None)) is not None:
                fields[name] = value
    return fields


def text_of(content: str | Sequence[TextPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def completion_prompts(tokenizer: Tokenizer, request: CompletionRequest) -> list[list[int]]:
    """Texts begin with the model's beginning-of-text token; ids are taken as they are."""
    prompt = request.prompt
    if isinstance(prompt, str):
        if request.suffix is not None:
            return [[*beginning(tokenizer), *fill_in_the_middle(tokenizer, prompt, request.suffix)]]
        prompt = [prompt]
    if isinstance(prompt[0], int):
        return [list(prompt)]  # type: ignore[arg-type]
    if isinstance(prompt[0], str):
        return [[*beginning(tokenizer), *ids] for ids in tokenizer.encode_batch(prompt)]  # type: ignore[arg-type]
    return [list(ids) for ids in prompt]  # type: ignore[arg-type]


def beginning(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def fill_in_the_middle(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    try:
        return fim_tokens(tokenizer.encode(prefix), [], tokenizer.encode(suffix), tokenizer)
    except UserError:
        raise BadRequest("this model has no tokens to fill in the middle: leave suffix out", param="suffix") from None
