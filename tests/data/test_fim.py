import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baleen.config import UserError
from baleen.data.fim import cut_for_fim, fim_tokens
from baleen.data.tokenizer import Tokenizer


@given(text=st.text(), seed=st.integers(0, 2**64 - 1))
def test_nothing_is_lost(tokenizer, text, seed):
    cut = cut_for_fim(text, 1.0, np.random.default_rng(seed))
    assert cut is not None and "".join(cut) == text
    assert cut == cut_for_fim(text, 1.0, np.random.default_rng(seed))
    prefix, middle, suffix = (tokenizer.encode(part) for part in cut)
    ids = fim_tokens(prefix, middle, suffix, tokenizer)
    assert tokenizer.decode(ids, skip_special=False) == (
        f"<|fim_begin|>{cut[0]}<|fim_hole|>{cut[2]}<|fim_end|>{cut[1]}"
    )


def test_the_rate_is_kept():
    rngs = [np.random.default_rng(seed) for seed in range(2000)]
    cuts = [cut_for_fim("some words", 0.1, rng) for rng in rngs]
    assert 160 <= sum(cut is not None for cut in cuts) <= 240
    assert cut_for_fim("some words", 0.0, rngs[0]) is None


def test_a_tokenizer_without_fim_tokens_is_refused(tokenizer):
    import tokenizers

    bare = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()), {}, None)
    with pytest.raises(UserError, match="no FIM tokens"):
        fim_tokens([], [], [], bare)
