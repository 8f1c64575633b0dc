"""Acceptance of MTP drafts: by hand-made models, and by the slow twin that runs every prefix on its own."""

import pytest
import torch

from baleen.config import UserError
from baleen.eval.acceptance import mtp_acceptance, mtp_acceptance_forced


def by_prefixes(model, ids):
    """(agreements, positions) of one text, by a full forward over each prefix."""
    agreed = 0
    for n in range(2, len(ids) + 1):
        prefix = torch.tensor([ids[:n]])
        hidden = model(prefix).hidden_BTd
        ahead = model.predict_ahead(0, hidden[:, :-1], prefix[:, 1:]).hidden_BTd
        agreed += int(model.logits(ahead[0, -1]).argmax() == model.logits(hidden[0, -1]).argmax())
    return agreed, len(ids) - 1


@pytest.fixture
def model(tiny_model):
    """Few tokens, so that random networks agree now and then."""
    return tiny_model(dtype=torch.float64, vocab_size=4, num_hidden_layers=2, initializer_range=0.4)


@torch.no_grad()
def test_forced_equals_prefixes(model):
    tokens = torch.randint(0, 4, (5, 14), generator=torch.Generator().manual_seed(3))
    agreed = sum(by_prefixes(model, row)[0] for row in tokens.tolist())
    assert 0 < agreed < 5 * 13
    assert mtp_acceptance_forced(model, tokens, batch_size=2) == agreed / (5 * 13)


@torch.no_grad()
def test_greedy_counts_every_draft_once(tiny_model):
    """A draft is made at each kept place that a step starts from: replayed here on the finished text."""
    shape = {"vocab_size": 4, "num_hidden_layers": 2, "initializer_range": 0.4, "eos_token_id": 3}
    model = tiny_model(dtype=torch.float64, seed=3, **shape)
    drafted = accepted = 0
    prompts = [[0], [1, 2], [2, 2, 0], [1, 0, 1, 0]]
    for prompt in prompts:
        ids = list(prompt)

        def extend(ids=ids):
            ids.append(int(model.logits(model(torch.tensor([ids])).hidden_BTd[0, -1]).argmax()))

        extend()
        new = ids[-1:]
        while len(ids) - len(prompt) < 20 and 3 not in new:
            hidden = model(torch.tensor([ids])).hidden_BTd
            draft = len(ids) - len(prompt) < 19 and int(
                model.logits(model.predict_ahead(0, hidden[:, :-1], torch.tensor([ids[1:]])).hidden_BTd[0, -1]).argmax()
            )
            start = len(ids)
            extend()
            drafted += draft is not False  # nothing is drafted for where an answer must end
            if ids[-1] == draft and draft is not False:
                accepted += 1
                extend()
            new = ids[start:]
    assert 0 < accepted < drafted
    assert mtp_acceptance(model, prompts, max_tokens=20) == accepted / drafted


def test_without_mtp(tiny_model):
    model = tiny_model(num_nextn_predict_layers=0)
    for measure in (
        lambda: mtp_acceptance(model, [[1]], 4),
        lambda: mtp_acceptance_forced(model, torch.ones(1, 4, dtype=torch.long)),
    ):
        with pytest.raises(UserError, match="no MTP layer"):
            measure()


def test_prompts_that_cannot_be_measured(model):
    with pytest.raises(UserError, match="1 to 246 tokens .* the longest has 247"):
        mtp_acceptance(model, [[1] * 247], 10)
    with pytest.raises(UserError, match="empty"):
        mtp_acceptance(model, [[1], []], 10)
    with pytest.raises(UserError, match="nothing was drafted"):
        mtp_acceptance(model, [[1]], 1)
