"""Text <-> tokens: a byte-level BPE with a chat template, our own or any Hugging Face fast tokenizer's."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from baleen.config import UserError, read_json
from baleen.data.control import REASONING_TOKENS, ControlTokens
from baleen.data.document import Message
from baleen.data.template import ChatTemplate

PUNCTUATION_AND_BREAKS = re.compile(r"( ?[^\w\s]+)([\r\n]+)")

Chat = Sequence[Message | Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]  # as in the OpenAI protocol: {type: function, function: {name, parameters, ...}}


@dataclass(frozen=True)
class _Prompt:
    messages: list[dict[str, Any]]
    add_generation_prompt: bool = False
    thinking: bool | None = None
    tools: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def parts(self) -> list[Mapping[str, Any]]:
        """All that was written by others, the tools in the form of a message first."""
        return [{"role": "tool", "tools": self.tools}, *self.messages]


class Tokenizer:
    """A fast tokenizer, its special ids and its chat template.

    Text that somebody typed never becomes a control token: `encode` and the content of messages are split by a twin
    of the tokenizer that knows none of them. The assistant's own `<think>`, `</think>`, `<answer>` and `</answer>` are
    let through in its messages.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: Mapping[str, Any], template: str | None) -> None:
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self._settings = dict(settings)
        self._template = ChatTemplate(template) if template else None
        added = backend.get_added_tokens_decoder()
        self._control = ControlTokens(
            {t.content: id for id, t in added.items() if t.special or re.fullmatch(r"<.+>", t.content)}
        )
        description = json.loads(backend.to_str())
        self._plain = _without_tokens(description, self._control.ids)
        self._added = {id: token.content for id, token in added.items()}
        self._byte_level = '"ByteLevel"' in json.dumps([description.get("decoder"), description.get("pre_tokenizer")])
        self._halves: dict[int, tuple[list[int], list[int]]] | None = None

    # --- ids

    @property
    def vocab_size(self) -> int:
        """One more than the highest id: the least `vocab_size` of a model for it."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def bos_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_id(self) -> int:
        eos = self._named_id("eos_token")
        if eos is None:
            raise UserError("the tokenizer names no eos_token: add it to tokenizer_config.json")
        return eos

    @property
    def pad_id(self) -> int:
        pad = self._named_id("pad_token")
        return self.eos_id if pad is None else pad

    @property
    def user_id(self) -> int | None:
        return self.id_of("<|user|>", "<｜User｜>")

    def id_of(self, *names: str) -> int | None:
        """The id of the first of these control tokens that there is."""
        return next((self._control.ids[name] for name in names if name in self._control.ids), None)

    def _named_id(self, key: str) -> int | None:
        name = self._settings.get(key)
        return None if name is None else self._backend.token_to_id(name)

    @property
    def template(self) -> str | None:
        """Source of the chat template."""
        return self._template.source if self._template else None

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that give equal tokens and equal chats."""
        template = self._template.source if self._template else ""
        text = json.dumps([self._backend.to_str(), template, self._settings], sort_keys=True)
        return blake2b(text.encode(), digest_size=12).hexdigest()

    # --- text

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], allow_special: bool = False) -> list[list[int]]:
        """Many texts at once, on all cores. No beginning or end token is added."""
        backend = self._backend if allow_special else self._plain
        try:
            return [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError:  # a lone surrogate has no bytes
            cleaned = [text.encode(errors="replace").decode() for text in texts]
            return [e.ids for e in backend.encode_batch_fast(cleaned, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Special tokens are left out unless asked for; `<think>` and its kin are words and always stay."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def token_bytes(self, id: int) -> bytes:
        """The bytes one token stands for; joined over a text they are its UTF-8."""
        if id in self._added:
            return self._added[id].encode()
        token = self._backend.id_to_token(id)
        if token is None:
            return b""  # a row of the embedding that no token uses
        if self._byte_level:
            return bytes(BYTE_OF_CHARACTER[c] for c in token)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    def split_joined(self, ids: Sequence[int], rate: float, rng: np.random.Generator) -> list[int]:
        """A random share of the tokens that join punctuation and line breaks, each replaced by its two halves.

        V3 §4.1: a model that only ever saw them joined goes wrong on a prompt that ends between the two.
        """
        if rate == 0.0:
            return list(ids)
        if self._halves is None:
            self._halves = self._joined_tokens()
        out: list[int] = []
        for id in ids:
            if id in self._halves and rng.random() < rate:
                out.extend(self._halves[id][0] + self._halves[id][1])
            else:
                out.append(id)
        return out

    def _joined_tokens(self) -> dict[int, tuple[list[int], list[int]]]:
        halves = {}
        for id in range(self.vocab_size):
            if id not in self._added:
                try:
                    match = PUNCTUATION_AND_BREAKS.fullmatch(self.token_bytes(id).decode())
                except UnicodeDecodeError:  # part of a character
                    continue
                if match:
                    halves[id] = (self.encode(match[1]), self.encode(match[2]))
        return halves

    # --- chat

    def render(
        self,
        messages: Chat,
        add_generation_prompt: bool = False,
        thinking: bool | None = None,
        tools: Tools = (),
    ) -> str:
        """The template's text. `thinking` opens (True) or closes (False) the reasoning after a generation prompt."""
        return self._render(_Prompt([_as_dict(m) for m in messages], add_generation_prompt, thinking, list(tools)))

    def encode_chat(
        self,
        messages: Chat,
        add_generation_prompt: bool = False,
        thinking: bool | None = None,
        tools: Tools = (),
    ) -> list[int]:
        """The tokens of `render`, but that nothing in a message or a tool becomes a control token."""
        prompt = _Prompt([_as_dict(m) for m in messages], add_generation_prompt, thinking, list(tools))
        return self._encode_prompts([prompt])[0]

    def encode_chats(self, chats: Iterable[Chat]) -> list[list[int]]:
        """Many conversations at once, on all cores."""
        return self._encode_prompts([_Prompt([_as_dict(message) for message in chat]) for chat in chats])

    @cached_property
    def _turn(self) -> tuple[list[int], int | None]:
        """(the tokens that open a turn of the assistant, the control token that closes it), as the template has them;
        ([], None) if it has none."""
        if self.template is None:
            return [], None
        question, answer = Message("user", "?"), Message("assistant", "!")
        closed, said = self.encode_chats([[question], [question, answer]])
        opened = self.encode_chat([question], add_generation_prompt=True)
        if opened[: len(closed)] != closed:
            return [], None
        opening = list(os.path.commonprefix([opened, said])[len(closed) :])
        control = {id for name, id in self._control.ids.items() if name not in REASONING_TOKENS}
        closing = next((id for id in said[len(closed) + len(opening) :] if id in control), None)
        return (opening, closing) if control & set(opening) else ([], closing)

    @property
    def assistant_opening(self) -> list[int]:
        """The tokens with which the chat template lets the assistant speak; empty if it has nothing of the kind."""
        return self._turn[0]

    @property
    def turn_end_id(self) -> int | None:
        """The control token with which the chat template ends the assistant's turns: mostly, not always, the eos."""
        return self._turn[1]

    @property
    def answer_ends(self) -> tuple[int, ...]:
        """Tokens at which the assistant's turn is over: the end of a text, what the template closes a turn with, and
        the opening of the user's next turn, which a small model may begin instead of ending its own."""
        ends = (self.eos_id, self.turn_end_id, self.user_id)
        return tuple(dict.fromkeys(id for id in ends if id is not None))

    def assistant_mask(self, ids: Sequence[int]) -> list[int]:
        """1 at the tokens an assistant turn is made of, its end token included: what SFT learns to predict.

        Raises UserError if the template marks the beginning or the end of a turn by nothing that a user could not have
        typed.
        """
        opening, closing = self._turn
        if not opening or closing is None:
            raise UserError(
                "the chat template marks the assistant's turns by no control token: its words cannot be told from the "
                "user's"
            )
        # A line break at the end of the opening may have become one token with what follows.
        bare = len(opening)
        while not self.token_bytes(opening[bare - 1]).strip():
            bare -= 1
        core, blank = opening[:bare], opening[bare:]
        mask = [0] * len(ids)
        at = find(ids, core)
        while at >= 0:
            start = at + bare
            if list(ids[start : start + len(blank)]) == blank:
                start += len(blank)
            end = next((i for i in range(start, len(ids)) if ids[i] == closing), len(ids) - 1) + 1
            mask[start:end] = [1] * (end - start)
            at = find(ids, core, end)
        return mask

    def _render(self, prompt: _Prompt) -> str:
        if self._template is None:
            raise UserError("the tokenizer has no chat template: add chat_template.jinja beside tokenizer.json")
        variables: dict[str, Any] = {
            k: v for k, v in self._settings.items() if k.endswith("_token") and isinstance(v, str)
        }
        if prompt.thinking is not None:
            variables["thinking"] = prompt.thinking
        if prompt.tools:
            variables["tools"] = prompt.tools
        return self._template.render(prompt.messages, add_generation_prompt=prompt.add_generation_prompt, **variables)

    def _encode_prompts(self, prompts: list[_Prompt]) -> list[list[int]]:
        honest = [not any(self._control.forged_in(part) for part in prompt.parts) for prompt in prompts]
        texts = [self._render(prompt) for prompt, is_honest in zip(prompts, honest, strict=True) if is_honest]
        encoded = iter(self.encode_batch(texts, allow_special=True))
        return [
            next(encoded) if is_honest else self._encode_forged(prompt)
            for prompt, is_honest in zip(prompts, honest, strict=True)
        ]

    def _encode_forged(self, prompt: _Prompt) -> list[int]:
        """Spoil the forged control tokens, render, cut at the true ones, and mend the forged as ordinary text."""
        (tools, *messages), guard = self._control.spoil(prompt.parts)
        spoilt = replace(prompt, messages=messages, tools=tools["tools"])
        ids: list[int] = []
        for piece in self._control.cut(self._render(spoilt)):
            ids += [piece] if isinstance(piece, int) else self.encode(piece.replace(guard, ""))
        return ids

    # --- files

    @property
    def definition(self) -> str:
        """The text of tokenizer.json."""
        return self._backend.to_str()

    def save(self, directory: Path) -> None:
        """tokenizer.json, tokenizer_config.json and chat_template.jinja, as transformers' AutoTokenizer reads them."""
        directory.mkdir(parents=True, exist_ok=True)
        # The library's own `save` raises a bare Exception when the disk is full.
        (directory / "tokenizer.json").write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        text = json.dumps(self._settings, indent=2, ensure_ascii=False) + "\n"
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
        if self._template is not None:
            (directory / "chat_template.jinja").write_text(self._template.source, encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """A tokenizer of ours, or any Hugging Face fast tokenizer. Raises UserError if files are missing or broken."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            cure = ""
            if (directory / "tiktoken.model").is_file():  # Moonlight, Kimi K2
                cure = "; transformers' convert_tiktoken_to_fast makes one of tiktoken.model"
            raise UserError(f"{path} is missing: Baleen loads fast tokenizers, which are kept in that file{cure}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path} is not a tokenizer that `tokenizers` can load: {error}") from None
        config = directory / "tokenizer_config.json"
        settings = read_json(config)
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = settings.get(key)
            if isinstance(token, dict):
                settings[key] = token = token.get("content", token)
            if not isinstance(token, str | None):
                raise UserError(f"{config} has {key} = {token!r}: it needs a string, or an object with `content`")
        for key in ("bos_token", "eos_token", "pad_token"):
            if settings.get(key) is None:
                settings[key] = _token_of_config(backend, directory / "config.json", f"{key}_id")
        template = _one_template(settings.pop("chat_template", None), config)
        if (directory / "chat_template.jinja").is_file():
            template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        return cls(backend, settings, template)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


def _without_tokens(description: dict[str, Any], names: Mapping[str, int]) -> tokenizers.Tokenizer:
    """The same tokenizer, to which these added tokens are ordinary text."""
    kept = [token for token in description["added_tokens"] if token["content"] not in names]
    model = dict(description["model"])
    if model["type"] == "BPE":  # else a whole pretoken that equals one would still be looked up
        model["vocab"] = {t: i for t, i in model["vocab"].items() if t not in names or t == model.get("unk_token")}
    plain = {**description, "added_tokens": kept, "model": model, "post_processor": None}
    return tokenizers.Tokenizer.from_str(json.dumps(plain))


def _one_template(given: Any, config: Path) -> str | None:
    """Of several by name the default one, else the first."""
    try:
        by_name = {one["name"]: one["template"] for one in given} if isinstance(given, list) else {"default": given}
    except (KeyError, TypeError):
        by_name = {"default": given}
    template = by_name.get("default", next(iter(by_name.values()), None))
    if not isinstance(template, str | None):
        raise UserError(f"{config}: chat_template is neither a string nor a list of {{name, template}}")
    return template


def _token_of_config(backend: tokenizers.Tokenizer, path: Path, key: str) -> str | None:
    id = read_json(path).get(key) if path.is_file() else None
    id = id[0] if isinstance(id, list) and id else id
    return backend.id_to_token(id) if isinstance(id, int) and 0 <= id < 2**32 else None  # some write -1 for none


def find(ids: Sequence[int], part: Sequence[int], start: int = 0) -> int:
    """The first place from `start` on at which `part` begins in `ids`; -1 if there is none."""
    part = list(part)
    return next((i for i in range(start, len(ids) - len(part) + 1) if list(ids[i : i + len(part)]) == part), -1)


def _as_dict(message: Message | Mapping[str, Any]) -> dict[str, Any]:
    return {"role": message.role, "content": message.content} if isinstance(message, Message) else dict(message)
