"""Bits per byte: every token counted once, against a computation document by document."""

import math

import pytest
import torch

from baleen.data.document import Document, Message
from baleen.data.tokenizer_training import train_tokenizer
from baleen.eval import bits_per_byte as module
from baleen.eval.bits_per_byte import _windows, bits_per_byte


class Bytes:
    """A tokenizer of bytes: 0 begins, 1 ends, 2 opens a turn, a byte b is b % 90 + 5."""

    bos_id: int | None = 0
    eos_id = 1

    def encode(self, text):
        return [byte % 90 + 5 for byte in text.encode()]

    def encode_chat(self, messages):
        return [0] + [id for m in messages for id in (2, *self.encode(m.content), 1)]


class NoBeginning(Bytes):
    bos_id = None


TEXTS = ["a whale", "krill and baleen, a sieve", "ünïcode ☃", "", "x", "the deep blue sea " * 3]
DOCUMENTS = [Document(text, "here") for text in TEXTS]


def nats_of(model, ids, first, last, start=0):
    """Sum of -log p of ids[first:last], read from `start`."""
    log_probs = model.logits(model(torch.tensor([ids[start:last]])).hidden_BTd)[0].double().log_softmax(-1)
    return -sum(log_probs[i - start - 1, ids[i]].item() for i in range(first, last))


@pytest.mark.parametrize("kind", [Bytes, NoBeginning])
@pytest.mark.parametrize("tokens_at_once", [1, 100, 8192])
def test_a_window_that_is_long_enough_reads_the_full_context(tiny_model, monkeypatch, kind, tokens_at_once):
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", tokens_at_once)
    model, tokenizer = tiny_model(dtype=torch.float64), kind()
    nats, tokens = 0.0, 0
    for document in DOCUMENTS:
        ids = [1 if tokenizer.bos_id is None else 0, *tokenizer.encode(document.text), 1]
        nats += nats_of(model, ids, 1, len(ids))
        tokens += len(ids) - 1
    result = bits_per_byte(model, tokenizer, DOCUMENTS, window=64)
    size = sum(len(text.encode()) for text in TEXTS)
    assert (result["bytes"], result["tokens"]) == (size, tokens)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)


@pytest.mark.parametrize("window, stride", [(8, 4), (8, 7), (8, 1), (2, 1), (9, 5)])
def test_long_documents_are_read_in_windows(tiny_model, window, stride):
    model, tokenizer = tiny_model(dtype=torch.float64), Bytes()
    text = "the whale sings in the deep"
    ids = [0, *tokenizer.encode(text), 1]
    nats, done = nats_of(model, ids, 1, window), window
    for start in range(stride, len(ids), stride):
        if done < len(ids):
            last = min(start + window, len(ids))
            nats += nats_of(model, ids, done, last, start)
            done = last
    result = bits_per_byte(model, tokenizer, [Document(text, "here")], window=window, stride=stride)
    assert result["tokens"] == len(ids) - 1
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-6)


@pytest.mark.parametrize("length", range(0, 40))
def test_windows_count_every_token_but_the_first_exactly_once(length):
    for window in range(2, 12):
        for stride in range(1, window):
            counted = []
            for ids, first in _windows(list(range(length)), window, stride):
                assert 1 <= first < len(ids) <= window  # something new, and a token of context before it
                counted += ids[first:]
            assert counted == list(range(1, length))


def test_the_default_stride_keeps_half_a_window_of_context(tiny_model):
    document = Document("the whale sings in the deep", "here")
    model = tiny_model()
    default = bits_per_byte(model, Bytes(), [document], window=8)
    assert default == bits_per_byte(model, Bytes(), [document], window=8, stride=4)
    assert default != bits_per_byte(model, Bytes(), [document], window=8, stride=7)


@pytest.mark.parametrize("window, stride", [(8, 8), (8, 9), (1, None), (8, -1)])
def test_windows_that_would_skip_tokens_are_refused(tiny_model, window, stride):
    with pytest.raises(AssertionError):
        bits_per_byte(tiny_model(), Bytes(), DOCUMENTS, window=window, stride=stride)


def test_a_conversation_counts_the_bytes_of_its_turns(tiny_model):
    model = tiny_model(dtype=torch.float64)
    messages = (Message("user", "hi"), Message("assistant", "höw do you do"))
    ids = Bytes().encode_chat(messages)
    result = bits_per_byte(model, Bytes(), [Document.of_messages(messages, "here")], window=64)
    size = len("hi\nhöw do you do\n".encode())
    assert (result["bytes"], result["tokens"]) == (size, len(ids) - 1)
    assert result["bits_per_byte"] == pytest.approx(nats_of(model, ids, 1, len(ids)) / math.log(2) / size, rel=1e-6)


def test_no_document_is_zero_bytes(tiny_model):
    assert bits_per_byte(tiny_model(), Bytes(), [], window=8) == {"bits_per_byte": 0.0, "bytes": 0, "tokens": 0}


def test_logits_are_made_some_rows_at_a_time(tiny_model, monkeypatch):
    model, tokenizer, seen = tiny_model(dtype=torch.float64), Bytes(), []
    whole = bits_per_byte(model, tokenizer, DOCUMENTS, window=64)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 7)
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: seen.append(len(hidden)) or logits(hidden))
    assert bits_per_byte(model, tokenizer, DOCUMENTS, window=64) == pytest.approx(whole)
    assert max(seen) == 7 and sum(seen) == whole["tokens"]


def test_thoughts_that_the_template_leaves_out_are_no_bytes(tiny_model):
    tokenizer = train_tokenizer(["the whale and the krill " * 20], 290)
    model = tiny_model(vocab_size=290)
    asked, last = Message("user", "krill?"), Message("assistant", "<think>I see</think>whale")

    def measured(first):
        return bits_per_byte(model, tokenizer, [Document.of_messages([asked, first, asked, last], "here")], window=256)

    plain = measured(Message("assistant", "krill"))
    assert measured(Message("assistant", f"<think>{'hm ' * 100}</think>krill")) == plain
    assert plain["bytes"] == len("krill?\nkrill\nkrill?\n<think>I see</think>whale\n")
