"""Servers on real sockets, in a thread, over a tiny random model or over a script."""

import contextlib

import pytest
import torch
from scripted_engine import ScriptedEngine
from served import CONFIG, TOKENS, WORDS, running

from baleen.data.tokenizer_training import train_tokenizer
from baleen.infer.engine import Engine
from baleen.model.transformer import Transformer


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([WORDS * 3], TOKENS)


@pytest.fixture(scope="session")
def make_engine(tokenizer):
    """The real engine over a tiny random network."""

    def make(**options):
        torch.manual_seed(0)
        model = Transformer(CONFIG).eval()
        model.init_weights(0)
        return Engine(model, tokenizer, **{"cache_tokens": 8192, "max_queue": 1024, "speculate": 1, **options})

    return make


@pytest.fixture(scope="session")
def tiny(make_engine):
    """The server over a tiny random model that most tests talk to."""
    engine = make_engine()
    with running({"tiny": engine, "other": make_engine()}) as server:
        yield server
        assert engine.pages.in_use == 0


@pytest.fixture
def scripted(tokenizer):
    """Makes a server whose model `script` says a text, or what a function of the prompt's text returns."""
    with contextlib.ExitStack() as stack:

        def make(answer, *, engine=ScriptedEngine, limits=None, pause=0.0, per_step=1, **options):
            def ids(prompt_ids):
                script = answer
                if callable(answer):
                    script = answer(tokenizer.decode(prompt_ids, skip_special=False))
                return tokenizer.encode_batch([script], allow_special=True)[0] if isinstance(script, str) else script

            made = engine(CONFIG, tokenizer, ids, pause=pause, per_step=per_step)
            server = stack.enter_context(running({"script": made}, limits=limits, **options))
            server.engine = made
            return server

        yield make
