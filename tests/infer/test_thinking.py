"""Answers are read in one way, votes are counted, and a thought ends when its budget does."""

import io
from types import SimpleNamespace

import pytest
import torch

from baleen.config import UserError
from baleen.data.tokenizer_training import train_tokenizer
from baleen.infer.answers import majority
from baleen.infer.engine import Engine, Request
from baleen.infer.sampler import SamplingParams
from baleen.infer.thinking import ThinkingBudget


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["3+4=7 " * 9], 276)


def said(*answers):
    return [f"<think>so</think><answer>{answer}</answer>" for answer in answers]


@pytest.mark.parametrize(
    ("completions", "expected"),
    [
        (said(7, 8, 8), (1, 2, 3)),
        (said(7, 8), (0, 1, 2)),  # equally common: the first
        (["<think>never ends", *said(7)], (1, 1, 1)),
        (["<think>never ends", "<think>so</think><answer></answer>"], None),
        ([], None),
    ],
)
def test_majority(completions, expected):
    assert majority(completions) == expected


def test_the_budget_closes_the_thought_and_nothing_else(tokenizer):
    think, end = tokenizer.id_of("<think>"), tokenizer.id_of("</think>")
    budget = ThinkingBudget(tokenizer, 276, 2)
    for free in ([], [40, 41, 42], [think], [think, 40]):
        assert budget.allowed(free) is None, free
    for thought in ([think, 40, end], [think, 40, end, 41, 42, 43], [end]):
        assert (~budget.allowed(thought)).nonzero().flatten().tolist() == [think], "a second thought"
    for full in ([think, 40, 41], [39, think, 40, 41, 42]):
        allowed = budget.allowed(full)
        assert allowed.nonzero().flatten().tolist() == [end]
    assert ThinkingBudget(tokenizer, 276, 0, opened=True).allowed([]) is not None
    assert ThinkingBudget(tokenizer, 276, 1, opened=True).allowed([]) is None


def test_the_engine_keeps_to_it(tokenizer, tiny_model):
    model = tiny_model(vocab_size=276).eval()
    think, end = tokenizer.id_of("<think>"), tokenizer.id_of("</think>")
    prompt = [tokenizer.bos_id, think]
    free = SamplingParams(seed=0, max_tokens=12, ignore_eos=True, logit_bias={end: -100.0})
    bound = SamplingParams(
        seed=0, max_tokens=12, ignore_eos=True, constraint=ThinkingBudget(tokenizer, 276, 5, opened=True)
    )
    never, closed = Engine(model, tokenizer).complete([Request(prompt, free), Request(prompt, bound)])
    assert end not in never.token_ids
    assert end in closed.token_ids[:6]
    assert torch.tensor(closed.token_ids).eq(end).any()


def test_a_budget_wants_a_model_that_thinks(tokenizer):
    class Plain:
        def id_of(self, *names):
            return None

    with pytest.raises(UserError, match="cannot be bounded"):
        ThinkingBudget(Plain(), 276, 5)
    with pytest.raises(UserError, match="budget is -1"):
        ThinkingBudget(tokenizer, 276, -1)


def test_the_majority_of_many_answers_is_printed(tokenizer, tiny_model, monkeypatch):
    from baleen.infer import chat

    engine = Engine(tiny_model(vocab_size=276).eval(), tokenizer)
    params = SamplingParams(temperature=3.0, max_tokens=3, seed=0)
    vote = chat.answer_by_vote(engine, chat.asked("3+4="), io.StringIO(), io.StringIO(), 5, params)
    assert 1 <= vote.votes <= vote.cast <= 5
    texts = []
    monkeypatch.setattr(chat, "majority", texts.extend)
    with pytest.raises(UserError, match="none of the 5 answers"):
        chat.answer_by_vote(engine, chat.asked("3+4="), io.StringIO(), io.StringIO(), 5, params)
    assert len({*texts}) > 1


def test_the_winner_is_printed_without_its_thought(tokenizer):
    from baleen.infer import chat

    texts = said(6, 7, 7)
    engine = SimpleNamespace(tokenizer=tokenizer, complete=lambda requests: [SimpleNamespace(text=t) for t in texts])
    out, thoughts = io.StringIO(), io.StringIO()
    assert chat.answer_by_vote(engine, chat.asked("3+4="), out, thoughts, 3) == (1, 2, 3)
    assert (out.getvalue(), thoughts.getvalue()) == ("7\n", "so\n")
