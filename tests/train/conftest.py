"""A corpus and a recipe so small that a whole run takes a second."""

import random

import pytest

from baleen.recipe import Recipe

MODEL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.05,
}
TRAIN = {"tokens": 640, "batch_tokens": 64, "seq_len": 16, "lr": 3e-3, "sample_every_seconds": 0, "precision": "fp32"}
WORDS = ["whale", "krill", "baleen", "ocean", "sieve", "drift", "song", "deep", "blue", "cold", "feeds", "sings"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of 40 text files of a hundred words."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for number in range(40):
        text = " ".join(rng.choice(WORDS) + rng.choice([".", ",", "", ""]) for _ in range(100))
        (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture
def tiny_recipe(corpus):
    """Makes a recipe of ten steps on the corpus; `train`, `model`, `data` and `schedule` change keys of it."""

    def make(*, train=None, model=None, data=None, schedule=None) -> Recipe:
        return Recipe.model_validate(
            {
                "name": "tiny",
                "model": {**MODEL, **(model or {})},
                "train": {**TRAIN, **(train or {})},
                "data": {"sources": (str(corpus),), "heldout_fraction": 0.1, **(data or {})},
                "schedule": schedule or {},
            }
        )

    return make
