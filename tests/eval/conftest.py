"""A model of a few thousand weights that knows nothing, ready to answer."""

import pytest

from baleen.data.tokenizer_training import train_tokenizer
from baleen.infer.engine import Engine
from baleen.model.transformer import Transformer
from baleen.recipe import load_recipe

TEXT = "the whale sings a song to the sea and the sea sings back to the whale\n"


@pytest.fixture(scope="module")
def engine():
    tokenizer = train_tokenizer([TEXT * 4], 300)
    sizes = [
        "hidden_size=32",
        "num_hidden_layers=2",
        "vocab_size=320",
        "num_attention_heads=2",
        "max_position_embeddings=64",
    ]
    model = Transformer(load_recipe("cpu-s", [f"model.{size}" for size in sizes] + ["train.seq_len=64"]).model).eval()
    model.init_weights(0)
    return Engine(model, tokenizer)
