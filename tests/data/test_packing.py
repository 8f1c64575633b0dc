import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baleen.config import UserError
from baleen.data.packing import PackedTokens, TokenisedDocument, pack, pack_to


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), max_size=20), st.integers(1, 12))
def test_every_transition_is_in_exactly_one_row(documents, seq_len):
    stream = [token for document in documents for token in document]
    owners = [number for number, document in enumerate(documents) for _ in document]
    if len(stream) <= seq_len:
        with pytest.raises(UserError, match="fewer than one sequence"):
            pack(documents, seq_len)
        return
    packed = pack(documents, seq_len)
    assert packed.tokens.shape == packed.document_ids.shape == (len(packed), seq_len + 1)
    assert packed.tokens.dtype == packed.document_ids.dtype == np.int32
    transitions = [pair for row in packed.tokens.tolist() for pair in zip(row, row[1:], strict=False)]
    kept = len(packed) * seq_len
    assert len(stream) - 1 - kept < seq_len  # only the tail is dropped
    assert transitions == list(zip(stream, stream[1:], strict=False))[:kept]
    assert packed.document_ids[:, :-1].ravel().tolist() == owners[:kept]
    assert packed.loss_mask is None


def test_files_hold_what_memory_holds(tmp_path):
    rng = np.random.default_rng(0)
    documents = []
    for length in rng.integers(1, 50, 40):
        documents.append(TokenisedDocument(rng.integers(0, 9, length), rng.integers(0, 2, length)))
    memory, files = pack(documents, 16), pack_to(tmp_path, documents, 16)
    again = PackedTokens.open(tmp_path, 16)
    for packed in (files, again):
        assert isinstance(packed.flat_tokens, np.memmap)
        for name in ("tokens", "document_ids", "loss_mask"):
            ours, theirs = getattr(memory, name), getattr(packed, name)
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["document_ids.npy", "loss_mask.npy", "tokens.npy"]


def test_too_little_text_for_a_row(tmp_path):
    with pytest.raises(UserError, match="0 tokens, fewer than one sequence of train.seq_len 4"):
        pack_to(tmp_path, [], 4)
    with pytest.raises(UserError, match="4 tokens, fewer"):
        pack_to(tmp_path, [TokenisedDocument([1, 2, 3, 4])], 4)
    assert len(pack_to(tmp_path, [TokenisedDocument([1, 2, 3, 4, 5])], 4)) == 1


def test_the_fingerprint_is_of_every_token():
    tokens = np.arange(3 * 2**20, dtype=np.int32)
    packed = pack([tokens], 16)
    assert packed.fingerprint == pack([tokens[: 2**20], tokens[2**20 :]], 16).fingerprint
    tokens[2**20 + 1] += 1
    assert packed.fingerprint != pack([tokens], 16).fingerprint
