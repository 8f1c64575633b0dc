import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baleen.config import UserError
from baleen.data.loader import Loader
from baleen.data.packing import TokenisedDocument, pack

BATCHES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def packed(rows):
    """Rows of one transition each: row i is (i, i + 1)."""
    return pack([list(range(rows + 1))], 1)


def given_out(loader, batches):
    return [row for n in batches for row in loader.next_batch(n).tokens[:, 0].tolist()]


@settings(max_examples=400)
@given(rows=st.integers(1, 30), batches=BATCHES, seed=st.integers(0, 2**32))
def test_an_epoch_is_every_row_once(rows, batches, seed):
    loader = Loader(packed(rows), seed=seed)
    out = given_out(loader, batches)
    assert len(out) == sum(batches)
    for start in range(0, len(out) - rows + 1, rows):
        assert sorted(out[start : start + rows]) == list(range(rows))
    assert len(set(out[len(out) - len(out) % rows :])) == len(out) % rows
    assert loader.epoch == sum(batches) // rows


@settings(max_examples=300)
@given(rows=st.integers(1, 30), batches=BATCHES, seed=st.integers(0, 2**32), world_size=st.integers(1, 5))
def test_ranks_share_out_the_global_batch_in_order(rows, batches, seed, world_size):
    data = packed(rows)
    whole = Loader(data, seed=seed)
    ranks = [Loader(data, seed=seed, rank=rank, world_size=world_size) for rank in range(world_size)]
    for sequences in batches:
        expected = whole.next_batch(sequences)
        shares = [rank.next_batch(sequences) for rank in ranks]
        assert torch.equal(torch.cat([s.tokens for s in shares]), expected.tokens)
        assert torch.equal(torch.cat([s.document_ids for s in shares]), expected.document_ids)
        sizes = [len(s.tokens) for s in shares]
        assert max(sizes) - min(sizes) <= 1
    assert all(rank.state_dict() == whole.state_dict() for rank in ranks)


@settings(max_examples=300)
@given(
    rows=st.integers(1, 30),
    before=BATCHES,
    after=BATCHES,
    seed=st.integers(0, 2**32),
    ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_resumed_is_straight_at_any_point_and_on_any_number_of_ranks(rows, before, after, seed, ranks):
    data = packed(rows)
    straight = Loader(data, seed=seed)
    given_out(straight, before)
    first = Loader(data, seed=seed, world_size=ranks[0])
    given_out(first, before)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = [Loader(data, seed=seed, rank=rank, world_size=ranks[1]) for rank in range(ranks[1])]
    for loader in resumed:
        loader.load_state_dict(state)
    for sequences in after:
        shares = torch.cat([loader.next_batch(sequences).tokens for loader in resumed])
        assert torch.equal(shares, straight.next_batch(sequences).tokens)


def test_the_order_depends_on_seed_and_epoch():
    data = packed(50)
    loader = Loader(data, seed=1)
    first, second = given_out(loader, [50]), given_out(loader, [50])
    other = given_out(Loader(data, seed=2), [50])
    assert first != second != other != first and sorted(first) == sorted(second) == sorted(other)


def test_a_batch_is_what_the_model_takes():
    data = pack([TokenisedDocument([0, 5, 6, 1], [0, 0, 1, 1]), TokenisedDocument([0, 7, 1], [0, 1, 1])], 3)
    batch = Loader(data, seed=0).next_batch(2)
    rows = sorted(zip(batch.tokens.tolist(), batch.document_ids.tolist(), batch.loss_mask.tolist(), strict=True))
    assert rows == [([0, 5, 6, 1], [0, 0, 0, 0], [0, 0, 1, 1]), ([1, 0, 7, 1], [0, 1, 1, 1], [1, 0, 1, 1])]
    assert batch.tokens.dtype == batch.document_ids.dtype == batch.loss_mask.dtype == torch.int64
    assert Loader(data, seed=0).next_batch(1).tokens.shape == (1, 4)
    assert Loader(data, seed=0, rank=0, world_size=2).next_batch(1).tokens.shape == (0, 4)


def test_a_state_of_other_data_is_refused():
    state = Loader(packed(5), seed=0).state_dict()
    with pytest.raises(UserError, match="other text"):
        Loader(packed(6), seed=0).load_state_dict(state)
    with pytest.raises(UserError, match="other text"):
        Loader(pack([[0, 1, 2, 4, 4, 5]], 1), seed=0).load_state_dict(state)
    with pytest.raises(UserError, match="set train.seed"):
        Loader(packed(5), seed=1).load_state_dict(state)
