"""Reasoning, content and calls out of a text that comes in pieces of any size."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baleen.data.tokenizer_training import train_tokenizer
from baleen.infer.parse import BALEEN_MARKERS, DEEPSEEK_MARKERS, AnswerParser, Call, ToolMarkers, Words

BEGIN, CALL, SEP, END, DONE = BALEEN_MARKERS
MARKERS = ToolMarkers(*BALEEN_MARKERS)


def parsed(text, cuts=(), **options):
    """(reasoning, content, calls) of a text cut at these places."""
    options = {"markers": MARKERS, "tools": ("add", "get_time"), **options}
    parser = AnswerParser(**options)
    pieces = []
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    for start, end in zip(places, places[1:], strict=False):
        pieces += parser.feed(text[start:end])
    pieces += parser.flush()
    words = {part: "".join(p.text for p in pieces if isinstance(p, Words) and p.part == part) for part in PARTS}
    return words["reasoning"], words["content"], [p for p in pieces if isinstance(p, Call)]


PARTS = ("reasoning", "content")


@pytest.mark.parametrize(
    "text, thinking, reasoning, content",
    [
        ("plain", False, "", "plain"),
        ("  plain ", False, "", "plain "),
        ("<think>\nwhy</think>\n\nso", False, "why", "so"),
        ("why</think>so", True, "why", "so"),
        ("never closed", True, "never closed", ""),
        ("a < b <thin", False, "", "a < b <thin"),
        ("</think>so", False, "", "so"),
        ("so <think>again</think> it is", False, "again", "so it is"),
        ("why <think> twice</think>so", True, "why <think> twice", "so"),
        ("", True, "", ""),
        ("<think>1+1</think><answer>2</answer>", False, "1+1", "2"),
        ("1+1</think>\n<answer> 2 </answer> or so", True, "1+1", "2  or so"),
        ("1+1</think><answer>2", True, "1+1", "2"),
        ("1+1</think><answ", True, "1+1", "<answ"),
        ("1+1</think>XML: <answer>2</answer>", True, "1+1", "XML: <answer>2</answer>"),
        ("<answer>2</answer>", False, "", "<answer>2</answer>"),
    ],
)
def test_reasoning(text, thinking, reasoning, content):
    assert parsed(text, thinking=thinking) == (reasoning, content, [])


def call(name, arguments):
    return f"{CALL}{name}{SEP}{arguments}{END}"


ADD, TIME = '{"a": 1, "b": 2}', "{}"
ONE = Call("add", ADD)


@pytest.mark.parametrize(
    "text, content, calls",
    [
        (f"{BEGIN}{call('add', ADD)}{DONE}", "", [Call("add", ADD)]),
        (f"So.{BEGIN}\n{call('add', ADD)}\n{call('get_time', TIME)}{DONE}\n", "So.", [ONE, Call("get_time", TIME)]),
        (call("add", ADD), "", [Call("add", ADD)]),
        (f"{BEGIN}{CALL}add{SEP}{ADD}", "", [Call("add", ADD)]),  # ended by its end-of-text token
        (f"{BEGIN}{call('add', ADD[:-1])}{DONE}", call("add", ADD[:-1]), []),
        (f"{BEGIN}{call('add', '[1]')}{DONE}", call("add", "[1]"), []),
        (f"{BEGIN}{call('format_disk', TIME)}{DONE}", call("format_disk", TIME), []),
        (f"{BEGIN}{CALL}add{END}{DONE}", f"{CALL}add{END}", []),
        (f"{BEGIN}{CALL}add{SEP}{{", f"{CALL}add{SEP}{{", []),
        (f"{BEGIN}{call('add', ADD)}{call('add', 'no')}{DONE}", call("add", "no"), [Call("add", ADD)]),
        (f"{BEGIN}{CALL}function{SEP}add\n```json\n{ADD}\n```{END}{DONE}", "", [Call("add", ADD)]),
    ],
)  # fmt: skip
def test_calls(text, content, calls):
    assert parsed(text) == ("", content, calls)
    assert parsed("hm</think>" + text, thinking=True) == ("hm", content, calls)


def test_without_tools_their_markers_are_text():
    text = f"{BEGIN}{call('add', ADD)}{DONE}"
    assert parsed(text, markers=None) == ("", text, [])


FRAGMENTS = (
    "<think>", "</think>", "<answer>", "</answer>", "<", "</thi", "a", " ", "\n", "é", *BALEEN_MARKERS, "add", ADD, "{",
    "get_time",
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14), st.lists(st.integers(0, 500), max_size=30), st.booleans())
def test_pieces_do_not_depend_on_the_cuts(fragments, cuts, thinking):
    text = "".join(fragments)
    whole = parsed(text, thinking=thinking)
    assert parsed(text, cuts, thinking=thinking) == whole
    assert parsed(text, range(len(text)), thinking=thinking) == whole
    reasoning, content, calls = whole
    assert "</think>" not in reasoning
    if CALL not in text:  # a malformed call comes back as it was written
        assert "<think>" not in content and "</think>" not in content
    assert all(isinstance(json.loads(c.arguments), dict) for c in calls)


def test_markers_are_the_tokenizers_own():
    tokenizer = train_tokenizer(["abc " * 10], 277)
    assert ToolMarkers.of(tokenizer) == MARKERS

    class DeepSeek:
        def id_of(self, name):
            return 5 if name in DEEPSEEK_MARKERS else None

    assert ToolMarkers.of(DeepSeek()) == ToolMarkers(*DEEPSEEK_MARKERS)
    assert ToolMarkers.of(type("None", (), {"id_of": lambda self, name: None})()) is None
