"""What a corpus is made of: texts and conversations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from baleen.config import UserError


@dataclass(frozen=True)
class Message:
    """One turn: role is 'system', 'user' or 'assistant'."""

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """One text, or one conversation.

    `text` of a conversation is its turns, each ended by a line break: the bytes that bits per byte counts and that
    compressors and n-gram baselines see. `source` says where it came from, for error messages.
    """

    text: str
    source: str
    messages: tuple[Message, ...] | None = None

    @classmethod
    def of_messages(cls, messages: Iterable[Message], source: str) -> Document:
        messages = tuple(messages)
        return cls("".join(message.content + "\n" for message in messages), source, messages)


class NotText(UserError):
    """A file without text in it: an error where the user named it, passed over and counted inside a folder."""

    def __init__(self, count: str, message: str) -> None:
        super().__init__(message)
        self.count = count


def decode_text(raw: bytes, where: str) -> str:
    """UTF-8 bytes -> text. Raises NotText for anything else."""
    if b"\0" in raw:
        raise NotText("files_binary", f"{where} is binary, not text: give UTF-8 text")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotText(
            "files_binary", f"{where} is not UTF-8 (byte {error.start}): convert it, for instance with iconv -t UTF-8"
        ) from None
