from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baleen.data.clean import clean, heldout_threshold, split, text_hash
from baleen.data.document import Document

HELLO = 0x878633AA32A3B150  # blake2b of b'hello world', 8 bytes


def documents(*texts):
    return [Document(text, "here") for text in texts]


def test_short_repetitive_and_repeated_documents_go(docs_texts):
    long = docs_texts[0]
    assert len(long) > 1000
    counts = Counter()
    kept = clean(
        documents(
            "Hello there", "hi", "   ", "again and " * 500, "hello \n THERE", long, long.upper(), long + " the end"
        ),
        min_chars=3,
        counts=counts,
    )
    assert [d.text for d in kept] == ["Hello there", long]
    assert counts == {"documents_read": 8, "documents_filtered": 3, "documents_duplicate": 3}


@pytest.mark.parametrize(("changes", "left"), [(8, 1), (56, 2)])  # Jaccard 0.92 and 0.56
def test_near_duplicates_are_those_above_the_threshold(changes, left):
    """Each changed word spoils five of 996 shingles: J = (996 - 5 n) / (996 + 5 n)."""
    words = [f"w{i}" for i in range(1000)]
    for first in range(5, 25):
        places = {first + 17 * i for i in range(changes)}
        other = [f"x{i}" if i in places else word for i, word in enumerate(words)]
        assert len(list(clean(documents(" ".join(words), " ".join(other))))) == left


def test_different_documents_all_stay(docs_texts):
    assert len(list(clean(documents(*docs_texts)))) == len(set(docs_texts)) == len(docs_texts) - 1


def test_text_hash_is_stable():
    assert text_hash("Hello  World\n") == text_hash("hello world") == HELLO
    assert text_hash("hello worlds") != HELLO


@given(st.lists(st.text(max_size=8)), st.floats(0, 1))
def test_split_is_disjoint_and_complete(texts, fraction):
    docs = documents(*texts)
    train, heldout = split(docs, fraction)
    assert Counter(train) + Counter(heldout) == Counter(docs)
    assert not {text_hash(d.text) for d in train} & {text_hash(d.text) for d in heldout}
    if docs and fraction > 1e-9:
        assert heldout
    if fraction == 0:
        assert not heldout


def test_split_does_not_depend_on_the_other_documents():
    docs = documents(*(f"text number {i}" for i in range(2000)))
    heldout = split(docs, 0.1)[1]
    assert 150 < len(heldout) < 250
    assert split(docs[:1000], 0.1)[1] == [d for d in heldout if d in docs[:1000]]


def test_at_least_one_is_held_out():
    assert heldout_threshold([500, 400, 2**63], 1e-6) > 400
    assert heldout_threshold([500], 0.0) == 0


def test_a_sign_is_a_difference_where_there_are_few_words():
    rows = ["3 < 5", "3 > 5", "x += 1", "x -= 1", "C++", "C#", "...", "..!"]
    assert [d.text for d in clean(documents(*rows, "3 <  5"))] == rows
