"""The newest turns that fit, found in few encodings: the same as by leaving out one turn after the other."""

import math

import pytest

from baleen.data.document import Message
from baleen.infer.recent import recent

HEADS = ([], [Message("system", "s" * 7)], [Message("developer", "s"), Message("system", "ss")])


def conversation(turns):
    said = [[Message("user", "u" * (3 + i % 5)), Message("assistant", "a" * (i % 7))] for i in range(turns)]
    return [message for turn in said for message in turn][:-1]


def encode(messages):
    """A token for each message and each of its characters: its place in the conversation does not matter."""
    return [id for message in messages for id in (0, *message.content.encode())]


def one_by_one(messages, room):
    """The slow twin."""
    head = [message for message in messages if message.role in ("system", "developer")]
    turns = messages[len(head) :]
    while len(encode(head + turns)) > room:
        following = next((i for i, message in enumerate(turns) if i and message.role == "user"), None)
        if following is None:
            break
        turns = turns[following:]
    return encode(head + turns), len(messages) - len(head) - len(turns)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("turns", [1, 2, 3, 9])
def test_as_few_turns_go_as_must(head, turns):
    messages = [*head, *conversation(turns)]
    for room in range(len(encode(messages)) + 2):
        assert recent(messages, encode, room) == one_by_one(messages, room)


def test_what_has_no_turn_to_leave_out_stays_whole():
    for messages in (HEADS[1], [Message("assistant", "hello")], [Message("assistant", "hi"), Message("user", "you?")]):
        assert recent(messages, encode, 0) == one_by_one(messages, 0)


@pytest.mark.parametrize("room", [0, 40, 700, 10**6])
def test_two_hundred_turns_are_encoded_a_few_times(room):
    messages, times = conversation(200), []

    def counted(kept):
        times.append(len(kept))
        return encode(kept)

    assert recent(messages, counted, room) == one_by_one(messages, room)
    assert len(times) <= (1 if room == 10**6 else 2 + math.ceil(math.log2(200)))
