"""Constraints: the grammar's tokens and no others, whatever is asked."""

import json

import pytest
import torch
from served import CONFIG

from baleen.serve.constrain import Constrainer
from baleen.serve.errors import ApiError
from baleen.serve.protocol import ChatRequest

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 23]}}, "required": ["a"], "additionalProperties": False}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("add", "get_time")]


def request(**options):
    return ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}], **options})


@pytest.fixture(scope="module")
def constrainer(tokenizer):
    return Constrainer(tokenizer, CONFIG.vocab_size)


def walk(constraint, tokenizer, choose):
    """The text that a model says which picks by `choose` among the tokens allowed."""
    ids = []
    while len(ids) < 200:
        mask = constraint.allowed(ids)
        assert mask.dtype == torch.bool and len(mask) == CONFIG.vocab_size and mask.any()
        id = choose(mask.nonzero().flatten().tolist())
        if id == tokenizer.eos_id:
            return tokenizer.decode(ids, skip_special=False), ids
        ids.append(id)
    raise AssertionError("no end")


@pytest.mark.parametrize("pick", [0, -1, 0.5])
def test_every_walk_ends_in_the_schema(constrainer, tokenizer, pick):
    (constraint,) = constrainer.of(request(response_format=FORM), thinking=False)
    text, _ = walk(constraint, tokenizer, lambda ids: ids[pick if isinstance(pick, int) else int(pick * len(ids))])
    assert json.loads(text) in ({"a": 1}, {"a": 23})


def test_many_tokens_at_once_are_as_one_by_one(constrainer, tokenizer):
    one, many = constrainer.of(request(response_format=FORM, n=2), thinking=False)
    masks = []
    _, ids = walk(one, tokenizer, lambda ids: masks.append(ids) or ids[-1])
    for count in (0, 3, 5, len(ids)):
        assert many.allowed(ids[:count]).nonzero().flatten().tolist() == masks[count]


def test_what_broke_the_grammar_frees_what_follows(constrainer, tokenizer):
    (constraint,) = constrainer.of(request(response_format=FORM), thinking=False)
    wrong = tokenizer.encode("z")
    assert constraint.allowed(wrong) is None and constraint.allowed(wrong * 5) is None


def test_after_the_end_only_the_end(constrainer, tokenizer):
    (constraint,) = constrainer.of(request(response_format=FORM), thinking=False)
    _, ids = walk(constraint, tokenizer, lambda ids: ids[0])
    assert constraint.allowed(ids).nonzero().flatten().tolist() == [tokenizer.eos_id]
    assert constraint.allowed([*ids, tokenizer.eos_id]).nonzero().flatten().tolist() == [tokenizer.eos_id]
    assert constraint.error == ""


def grammar(constrainer, thinking=False, **options):
    return constrainer.grammar(request(**options), thinking)


def test_what_is_constrained(constrainer):
    assert grammar(constrainer) is None
    assert grammar(constrainer, tools=TOOLS) is None and grammar(constrainer, tools=TOOLS, tool_choice="none") is None
    assert grammar(constrainer, response_format={"type": "text"}) is None
    both = grammar(constrainer, tools=TOOLS, response_format=FORM)
    assert "%json" in both and "| calls" in both
    assert "calls" not in grammar(constrainer, tools=TOOLS, response_format=FORM, tool_choice="none")
    forced = grammar(constrainer, tools=TOOLS, tool_choice="required", response_format=FORM)
    assert "start: (calls)" in forced and '"add"' in forced and '"get_time"' in forced and "call+" in forced
    named = {"type": "function", "function": {"name": "add"}}
    assert '"get_time"' not in grammar(constrainer, tools=TOOLS, tool_choice=named)
    assert "call+" not in grammar(constrainer, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert "THOUGHT" in grammar(constrainer, thinking=True, response_format=FORM)


def test_reasoning_is_free_until_it_ends(constrainer, tokenizer):
    (constraint,) = constrainer.of(request(response_format=FORM), thinking=True)
    thought = [*tokenizer.encode("hm, {"), tokenizer.id_of("</think>")]
    mask = constraint.allowed(thought[:-1])
    assert mask[thought[-1]] and mask[tokenizer.encode("z")[0]]
    mask = constraint.allowed(thought)
    assert mask[tokenizer.encode("{")[0]] and not mask[tokenizer.encode("z")[0]]


def test_a_schema_cannot_break_out_of_the_grammar(constrainer):
    """Names and texts of a schema are data, whatever they hold."""
    evil = '"} | /.*/ \n other: "x'
    schema = {"type": "object", "properties": {evil: {"const": evil}}, "required": [evil]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    (constraint,) = constrainer.of(request(response_format=form), thinking=False)
    assert constraint.allowed([]).sum() < 10


def test_a_thought_that_nothing_closes_cannot_be_bounded():
    """Told by a field that a request has."""

    class Plain:
        def id_of(self, *names):
            return None

    with pytest.raises(ApiError) as caught:
        Constrainer(Plain(), 10).grammar(request(response_format=FORM), thinking=True)
    fault = caught.value
    assert (fault.status, fault.code, fault.param) == (400, "no_constraints", "reasoning_effort")
    assert fault.param in ChatRequest.model_fields and fault.param in fault.message
