"""Several processes at once, by torchrun on this machine."""

import os
import random
import subprocess
import sys

import pytest

from baleen.recipe import Recipe

WORDS = ["whale", "krill", "baleen", "ocean", "sieve", "drift", "song", "deep", "blue", "cold", "feeds", "sings"]
MODEL = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 3,
    "num_attention_heads": 2, "q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "max_position_embeddings": 64, "initializer_range": 0.05,
}  # fmt: skip


@pytest.fixture(scope="session")
def torchrun():
    """torchrun(processes, *arguments) -> the finished process; arguments: a script or `-m baleen --` and its own."""

    def run(processes, *arguments, check=True, timeout=900, options=(), **environment):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        done = subprocess.run(
            [*command, *options, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        assert not check or done.returncode == 0, done.stderr[-6000:]
        return done

    return run


@pytest.fixture
def recipe_file(tmp_path):
    """Writes a recipe of 12 steps of 16 sequences; `train` and `parallel` change keys of it."""
    rng = random.Random(0)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(40):
        text = " ".join(rng.choice(WORDS) + rng.choice([".", ",", "", ""]) for _ in range(100))
        (corpus / f"{number}.txt").write_text(text)

    def write(name="tiny", train=None, parallel=None):
        keys = {"tokens": 256 * 12, "batch_tokens": 256, "seq_len": 16, "micro_batch_size": 1, "lr": 3e-3,
                "precision": "fp32", "checkpoint_every": 2, "ema_decay": 0.9, **(train or {})}  # fmt: skip
        data = {"sources": (str(corpus),), "heldout_fraction": 0.1}
        recipe = Recipe.model_validate(
            {"name": "tiny", "model": MODEL, "train": keys, "data": data, "parallel": parallel or {}}
        )
        file = tmp_path / f"{name}.toml"
        file.write_text(recipe.to_toml())
        return file

    return write
