"""Text that arrives in pieces is the text that arrives at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import ByteTokenizer

from baleen.infer.text import Detokenizer, Spelling, StopMatcher


@given(st.binary(max_size=24))
def test_detokenizer_equals_full_decode(data):
    detokenizer = Detokenizer(Spelling(ByteTokenizer()))
    pieces = [detokenizer.feed([byte]) for byte in data]
    assert "".join(pieces) + detokenizer.flush() == data.decode("utf-8", errors="replace")


def test_never_half_a_character():
    detokenizer = Detokenizer(Spelling(ByteTokenizer()))
    assert [detokenizer.feed([byte]) for byte in "é🐋".encode()] == ["", "é", "", "", "", "🐋"]
    assert detokenizer.feed([0xF0, 0x9F]) == "" and detokenizer.flush() == "\ufffd"


def test_special_tokens_are_left_out():
    tokenizer = ByteTokenizer()
    detokenizer = Detokenizer(Spelling(tokenizer))
    assert detokenizer.feed([104, tokenizer.eos_id, 105]) == "hi"


def one_at_a_time(text, stops):
    """What a reader of single characters shows: the slow twin."""
    seen = ""
    for character in text:
        seen += character
        ended = [stop for stop in stops if seen.endswith(stop)]
        if ended:
            return seen[: len(seen) - max(map(len, ended))], True
    return seen, False


@given(
    st.lists(st.text("ab", max_size=5), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
)
def test_stop_strings_across_chunks(chunks, stops):
    matcher = StopMatcher(stops)
    shown = ""
    expected, stopped = one_at_a_time("".join(chunks), stops)
    for chunk in chunks:
        shown += matcher.feed(chunk)
        assert expected.startswith(shown)  # nothing shown is ever taken back
    assert (shown + matcher.flush(), matcher.stopped) == (expected, stopped)


def test_holds_back_no_more_than_needed():
    matcher = StopMatcher(["\nUser:"])
    assert matcher.feed("well\nUs") == "well"
    assert matcher.feed("ually\n") == "\nUsually"
    assert matcher.feed("User: me") == "" and matcher.stopped


@pytest.mark.parametrize("count", [10_000])
def test_many_stop_strings(count):
    matcher = StopMatcher([f"stop{i:05}" for i in range(count)])
    assert matcher.feed("go on, stop") == "go on, "
    assert matcher.feed("00042 now") == "" and matcher.stopped
