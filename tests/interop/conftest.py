"""Shared by the tests of checkpoints."""

import pytest
import torch

from baleen.model.transformer import Transformer


@pytest.fixture
def same():
    """Whether two models have one config and equal tensors, bit for bit."""

    def compare(one: Transformer, other: Transformer) -> bool:
        a, b = one.state_dict(), other.state_dict()
        return one.config == other.config and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    return compare
