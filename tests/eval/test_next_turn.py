"""Next-turn accuracy: scores are likelihoods, and a model that knows the answer finds it."""

import random

import pytest
import torch

from baleen.config import UserError
from baleen.data.document import Document, Message
from baleen.data.tokenizer_training import train_tokenizer
from baleen.eval import next_turn
from baleen.eval.next_turn import OTHER_TOKENS, OTHERS, _other_histories, _places, _scores, next_turn_accuracy
from baleen.infer.engine import Engine


@pytest.fixture
def documents():
    rng = random.Random(1)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "red", "green", "blue"]
    return [
        Document.of_messages(
            [Message(("user", "assistant")[i % 2], " ".join(rng.choices(words, k=4)) + f" {n}") for i in range(6)], ""
        )
        for n in range(20)
    ]


@pytest.fixture
def tokenizer(documents):
    return train_tokenizer((m.content for d in documents for m in d.messages), 300)


def test_scores_are_likelihoods_and_what_they_gain_over_other_histories(tiny_model, tokenizer, documents):
    model = tiny_model(dtype=torch.float64, vocab_size=tokenizer.vocab_size)
    engine = Engine(model, None)
    others = _other_histories(tokenizer, documents, random.Random(0))
    chat, turn, candidates = next(_places(documents, 1, random.Random(0)))
    role, before = chat[turn].role, tokenizer.encode_chat(chat[:turn])
    gains, likelihoods = _scores(engine, tokenizer, chat, turn, candidates, others, 128)

    def log_likelihood(past, turn_ids):
        whole = [*past, *turn_ids]
        log_probs = model.logits(model(torch.tensor([whole])).hidden_BTd)[0].log_softmax(-1)
        return sum(log_probs[t - 1, whole[t]].item() for t in range(len(past), len(whole)))

    elsewhere = [ids[-OTHER_TOKENS:] for other, ids in others[role] if other is not chat][:OTHERS]
    assert len(elsewhere) == OTHERS and len({tuple(ids) for ids in elsewhere}) == OTHERS
    for text, gain, likelihood in zip(candidates, gains, likelihoods, strict=True):
        ids = tokenizer.encode_chat([*chat[:turn], Message(role, text)])[len(before) :]
        mean = sum(log_likelihood(past, ids) for past in elsewhere) / OTHERS
        assert likelihood == pytest.approx(log_likelihood(before, ids), rel=1e-6)
        assert gain == pytest.approx(likelihood - mean, rel=1e-6)


def test_true_turn_is_first_and_the_others_are_from_elsewhere(documents):
    for chat, turn, turns in _places(documents, 50, random.Random(0)):
        assert turns[0] == chat[turn].content
        assert len(set(turns)) == 10 and not {m.content for m in chat} & set(turns[1:])


def test_accuracy_counts_the_first(monkeypatch, tiny_model, tokenizer, documents):
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    right, wrong = [1.0] + [0.0] * 9, [-1.0] + [0.0] * 9
    even, two = [0.5] * 10, [1.0, 1.0] + [0.0] * 8  # of those that tie, one is the true one
    for scores, shares in (
        ((right, wrong), (1.0, 0.0)), ((wrong, right), (0.0, 1.0)), ((even, two), (pytest.approx(0.1), 0.5)),
    ):  # fmt: skip
        monkeypatch.setattr(next_turn, "_scores", lambda *_, scores=scores: scores)
        assert next_turn_accuracy(model, tokenizer, documents, contexts=5, window=64) == shares


def test_no_score_is_not_a_right_one(monkeypatch, tiny_model, tokenizer, documents):
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    monkeypatch.setattr(next_turn, "_scores", lambda *_: ([float("nan")] * 10,) * 2)
    with pytest.raises(AssertionError):
        next_turn_accuracy(model, tokenizer, documents, contexts=5, window=64)


def test_too_few_conversations(tiny_model, tokenizer, documents):
    with pytest.raises(UserError, match="heldout_fraction"):
        next_turn_accuracy(tiny_model(), tokenizer, documents[:1], contexts=5, window=64)
