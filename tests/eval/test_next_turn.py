"""Next-turn accuracy: scores are likelihoods, and a model that knows the answer finds it."""

import random

import pytest
import torch

from baleen.config import UserError
from baleen.data.document import Document, Message
from baleen.data.tokenizer import train_tokenizer
from baleen.eval import next_turn
from baleen.eval.next_turn import _places, _scores, next_turn_accuracy
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


def test_scores_are_log_likelihood_ratios(tiny_model, tokenizer, documents):
    model = tiny_model(dtype=torch.float64, vocab_size=tokenizer.vocab_size)
    history, turns = next(_places(documents, 1, random.Random(0)))
    scores = _scores(Engine(model, None), tokenizer, history, turns, window=128)
    before = tokenizer.encode_chat(history)
    role = "user" if history[-1].role == "assistant" else "assistant"

    def log_likelihood(past, turn_ids):
        whole = [*past, *turn_ids]
        log_probs = model.logits(model(torch.tensor([whole])).hidden_BTd)[0].log_softmax(-1)
        return sum(log_probs[t - 1, whole[t]].item() for t in range(len(past), len(whole)))

    for turn, score in zip(turns, scores, strict=True):
        ids = tokenizer.encode_chat([*history, Message(role, turn)])[len(before) :]
        assert score == pytest.approx(log_likelihood(before, ids) - log_likelihood(before[:1], ids), rel=1e-6)


def test_true_turn_is_first_and_the_others_are_from_elsewhere(documents):
    for history, turns in _places(documents, 50, random.Random(0)):
        chat = next(d.messages for d in documents if d.messages[0] == history[0])
        assert turns[0] == chat[len(history)].content
        assert len(set(turns)) == 10 and not {m.content for m in chat} & set(turns[1:])


def test_accuracy_counts_the_first(monkeypatch, tiny_model, tokenizer, documents):
    model, scores = tiny_model(vocab_size=tokenizer.vocab_size), [1.0] + [0.0] * 9
    monkeypatch.setattr(next_turn, "_scores", lambda *_: scores)
    assert next_turn_accuracy(model, tokenizer, documents, contexts=5, window=64) == 1.0
    scores[0] = -1.0
    assert next_turn_accuracy(model, tokenizer, documents, contexts=5, window=64) == 0.0


def test_too_few_conversations(tiny_model, tokenizer, documents):
    with pytest.raises(UserError, match="heldout_fraction"):
        next_turn_accuracy(tiny_model(), tokenizer, documents[:1], contexts=5, window=64)
