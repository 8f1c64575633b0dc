"""Intervals, votes and log-probabilities, each beside what it is by hand."""

import pytest
import torch

from baleen.align.accuracy import vote_is_right, wilson
from baleen.align.logprobs import answer_logprobs, answer_tokens
from baleen.align.rollout import Answer, Group, Score
from baleen.align.tasks import Question


def test_intervals_and_votes_by_hand():
    assert wilson(5, 10) == pytest.approx((0.5, 0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.0, 0.2775), abs=1e-4)
    words = [f"<think>so</think><answer>{said}</answer>" for said in (8, 7, 7)]
    answers = tuple(Answer((1,), (5,), (0.0,), text, False) for text in words)
    scores = tuple(Score({}, right, right) for right in (0.0, 1.0, 1.0))
    group = Group(Question("3+4=", "7", "number", (), "7"), answers, scores)
    assert [vote_is_right(group, k) for k in (1, 2, 3)] == [False, False, True]  # of a tie the first


def test_what_is_learnt_from_is_at_the_rollouts_temperature(tiny_model):
    answers = [Answer((3, 5), (7, 9, 1), (0.0,) * 3, "", False), Answer((4,), (8,), (0.0,), "", False)]
    model = tiny_model()
    known = answer_logprobs(model, answer_tokens(answers, 1, torch.device("cpu")), 0.5)
    for row, answer in enumerate(answers):
        ids, length = torch.tensor([[*answer.prompt_ids, *answer.token_ids]]), len(answer.token_ids)
        logits = model.logits(model(ids).hidden_BTd)[0, len(answer.prompt_ids) - 1 : -1]
        for found, temperature in ((known.logprobs_NT, 0.5), (known.own_logprobs_NT, 1.0)):
            all_TZ = (logits / temperature).log_softmax(-1)
            expected = all_TZ.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(found[row, :length], expected, rtol=1e-4, atol=1e-5, check_dtype=False)
            assert not found[row, length:].any()
