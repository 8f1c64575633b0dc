"""Packing for fine-tuning: no answer is parted from its question."""

from hypothesis import given
from hypothesis import strategies as st

from baleen.data.packing import TokenisedDocument, pack, whole_in_rows

PAD = 99


@given(st.lists(st.integers(2, 9), min_size=1, max_size=30), st.integers(8, 20))
def test_every_document_lies_whole_in_one_row(lengths, seq_len):
    documents = [TokenisedDocument([number % 90] * n, [0] + [1] * (n - 1)) for number, n in enumerate(lengths)]
    packed = pack(whole_in_rows(documents, seq_len, PAD), seq_len)
    learnt = 0
    for tokens, ids, mask in zip(packed.tokens, packed.document_ids, packed.loss_mask, strict=True):
        for document in set(ids[1:][mask[1:] == 1]):
            place = ids == document
            assert place.sum() >= lengths[tokens[place][0]]  # the row holds it from its first token on
            assert mask[place][0] == 0
        learnt += mask[1:].sum()
        assert not mask[tokens == PAD].any()
    assert learnt == sum(lengths) - len(lengths)  # every target once, none dropped with the tail


def test_a_document_longer_than_a_row_goes_on_in_the_next():
    documents = [TokenisedDocument(list(range(20)), [1] * 20)]
    packed = pack(whole_in_rows(documents, 8, PAD), 8)
    assert packed.flat_tokens[:20].tolist() == list(range(20))
    assert len(packed) == 3


def test_no_row_is_padding_alone():
    packed = pack(whole_in_rows([TokenisedDocument([1] * 8, [1] * 8)], 8, PAD), 8)
    assert packed.flat_tokens.tolist() == [1] * 8 + [PAD]
