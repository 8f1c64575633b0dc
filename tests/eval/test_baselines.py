import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baleen.config import UserError
from baleen.eval.baselines import NgramModel, xz_bits_per_byte


def english(seed: int, words: int) -> bytes:
    rng = random.Random(seed)
    vocabulary = b"the whale sieve sea small large krill a of in lives on water eats swims sings and deep".split()
    weights = [1 / rank for rank in range(1, len(vocabulary) + 1)]
    return b" ".join(rng.choices(vocabulary, weights, k=words))


class SlowKneserNey:
    """Modified Kneser-Ney by dictionaries, straight from Chen and Goodman's formulas."""

    def __init__(self, order: int, train: bytes) -> None:
        windows = [train[i : i + order] for i in range(len(train) - order + 1)]
        self.counts = {order: Counter(windows)}
        for k in range(order - 1, 0, -1):
            self.counts[k] = Counter(gram[1:] for gram in self.counts[k + 1])
        self.order = order

    def discount(self, k: int, count: int) -> float:
        n = [sum(c == m for c in self.counts[k].values()) for m in range(5)]
        if 0 in n[1:]:
            return 0.5
        m = min(count, 3)
        estimate = m - (m + 1) * n[1] / (n[1] + 2 * n[2]) * n[m + 1] / n[m]
        return min(max(estimate, 0.05), m)

    def probability(self, history: bytes, byte: int) -> float:
        p = 1 / 256
        for k in range(1, min(len(history) + 1, self.order) + 1):
            context = history[len(history) - k + 1 :]
            followers = {g: c for g, c in self.counts[k].items() if g[:-1] == context}
            if followers:
                total = sum(followers.values())
                reserved = sum(self.discount(k, c) for c in followers.values())
                count = followers.get(context + bytes([byte]), 0)
                p = (count - self.discount(k, count) if count else 0.0) / total + reserved / total * p
        return p


@pytest.mark.parametrize(("order", "words"), [(1, 60), (3, 60), (6, 60), (6, 2), (8, 40)])
def test_equals_the_slow_twin(order, words):
    train, heldout = english(1, words), english(2, 6) + b" \x00\xff zebra"
    slow = SlowKneserNey(order, train)
    expected = [slow.probability(heldout[:i], heldout[i]) for i in range(len(heldout))]
    np.testing.assert_allclose(NgramModel(order).fit(train).probabilities(heldout), expected, rtol=1e-12)


def test_the_twin_uses_estimated_discounts_and_not_only_the_default():
    discounts = {SlowKneserNey(3, english(1, 60)).discount(3, c) for c in (1, 2, 3)}
    assert len(discounts) == 3 and 0.5 not in discounts


@settings(max_examples=12, deadline=None)
@given(train=st.binary(min_size=6, max_size=400), context=st.binary(max_size=7), start=st.integers(0, 399))
def test_the_256_probabilities_sum_to_one(train, context, start):
    model = NgramModel(6).fit(train)
    for history in (context, train[start : start + 5]):
        p = [model.probabilities(history + bytes([byte]))[-1] for byte in range(256)]
        assert min(p) > 0
        assert math.isclose(sum(p), 1, rel_tol=1e-12)


def test_learns_from_the_training_text_alone():
    train, heldout = english(3, 3000), english(4, 500)
    model = NgramModel().fit(train)
    before = model.bits_per_byte(heldout)
    assert model.bits_per_byte(train) < before < NgramModel(2).fit(train).bits_per_byte(heldout)
    assert model.bits_per_byte(heldout) == before
    assert before < xz_bits_per_byte(heldout)


def test_fit_forgets_the_text_before():
    again = NgramModel(4).fit(english(5, 200)).fit(english(6, 200))
    assert again.bits_per_byte(b"the sea") == NgramModel(4).fit(english(6, 200)).bits_per_byte(b"the sea")


def test_xz_counts_every_byte_of_the_container():
    noise = random.Random(0).randbytes(4096)
    assert 8 < xz_bits_per_byte(noise) < 8.3
    assert xz_bits_per_byte(b"krill " * 5000) < 0.1


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: xz_bits_per_byte(b""),
        lambda: NgramModel(9),
        lambda: NgramModel(0),
        lambda: NgramModel(6).fit(b"short"),
        lambda: NgramModel(2).fit(b"text").bits_per_byte(b""),
    ],
)
def test_mistakes_are_named(mistake):
    with pytest.raises(UserError):
        mistake()
