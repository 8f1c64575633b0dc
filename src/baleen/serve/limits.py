"""What one client may ask for. Every limit is a flag of `baleen serve`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from baleen.config import UserError


@dataclass(frozen=True)
class Limits:
    """body_bytes: of a request. prompt_tokens: of a prompt, 0 for what the model's context holds. choices: answers
    that one request may ask for, n times its prompts. queue, queue_seconds: requests that wait for room in the cache,
    and for how long. request_seconds: of its answers, from when the engine is asked for them to the last of them, the
    wait in the queue included. grace_seconds: what answers in flight get when the server is told to stop."""

    body_bytes: int = 8 * 2**20
    prompt_tokens: int = 0
    choices: int = 64
    queue: int = 1024
    queue_seconds: float = 60.0
    request_seconds: float = 600.0
    grace_seconds: float = 20.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("prompt_tokens", "grace_seconds") else 1
            if not least <= value < 2**40:
                raise UserError(f"the limit {field.name} is {value}: take {least} or more")
