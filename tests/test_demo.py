"""The demo from end to end, on a tiny recipe and made-up conversations."""

import io
import json
import random

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from baleen import demo
from baleen.interop.load import load
from baleen.recipe import load_recipe

KEYS = {
    "tokens_trained", "train_seconds", "heldout_bpb", "xz_bpb", "ngram_bpb", "next_turn_accuracy",
    "next_turn_accuracy_likelihood", "mtp_acceptance",
    "mtp_acceptance_forced", "distinct_2", "max_violation", "max_violation_pooled", "samples", "cost_headline_usd",
    "cost_full_usd", "device_hours",
}  # fmt: skip

RECIPE = """
[model]
vocab_size = 310
hidden_size = 32
num_hidden_layers = 2
first_k_dense_replace = 1
num_attention_heads = 2
q_lora_rank = 16
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
intermediate_size = 64
moe_intermediate_size = 16
n_routed_experts = 8
num_experts_per_tok = 2
n_group = 2
topk_group = 1
max_position_embeddings = 256
initializer_range = 0.05

[data]
sources = ["SOURCE"]
format = "chat"
heldout_fraction = 0.2

[train]
tokens = 30720
batch_tokens = 512
seq_len = 128
lr = 3e-3
precision = "fp32"
"""


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    rng = random.Random(0)
    words = ["i", "you", "we", "like", "see", "the", "a", "cat", "dog", "tree", "song", "walk", "now", "very", "good"]
    with (folder / "chats.jsonl").open("w") as file:
        for _ in range(150):
            turns = [" ".join(rng.choices(words, k=rng.randrange(3, 9))) for _ in range(rng.randrange(4, 9))]
            messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
            file.write(json.dumps({"messages": messages}) + "\n")
    (folder / "tiny.toml").write_text(RECIPE.replace("SOURCE", str(folder / "chats.jsonl")))
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "RECIPE", str(folder / "tiny.toml"))
        patch.setattr(demo, "CONTEXTS", 20)
        summary = demo.run_demo(folder / "runs" / "demo", 8.0, Console(file=out, width=120))
    return folder / "runs" / "demo", summary, out.getvalue()


def test_summary(demo_run):
    run_dir, summary, words = demo_run
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert summary.keys() >= KEYS
    assert summary["tokens_trained"] == 30720
    assert 0 < summary["heldout_bpb"] < 4  # at chance 8.3 bits a token, of not much more than a byte each
    assert all(0 <= summary[k] <= 1 for k in KEYS if k.startswith(("mtp_", "next_", "distinct")))
    assert 0 < summary["cost_headline_usd"] < summary["cost_full_usd"]
    assert len(summary["samples"]) == 3
    assert [turn["role"] for turn in summary["samples"][0]] == ["user", "assistant", "user", "assistant"]
    assert (run_dir / "report.html").is_file()
    for phrase in ("bits per byte", "baleen chat", "--data FOLDER", "headline", "people"):
        assert phrase in words


def test_transformers_loads_the_model(demo_run):
    run_dir, _, _ = demo_run
    theirs, info = AutoModelForCausalLM.from_pretrained(run_dir / "model", output_loading_info=True)
    ours, tokenizer, _ = load(run_dir)
    layers = ours.config.num_hidden_layers
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(int(name.split(".")[2]) >= layers for name in info["unexpected_keys"])
    ids = torch.tensor([tokenizer.encode("we like the cat and the dog")])
    theirs_ids = AutoTokenizer.from_pretrained(run_dir / "model")(
        "we like the cat and the dog", add_special_tokens=False
    )
    assert theirs_ids["input_ids"] == ids[0].tolist()
    with torch.inference_mode():
        a, b = ours.logits(ours(ids).hidden_BTd), theirs(ids).logits
    assert (a - b).abs().max() / b.abs().max() <= 2e-5


def test_time_and_tokens_grow_together():
    eight, two = demo.demo_recipe(8.0), demo.demo_recipe(2.0)
    assert eight.train.tokens == load_recipe("chitchat").train.tokens == 4 * two.train.tokens
    assert (eight.train.minutes, two.train.minutes) == (8.0, 2.0)


def test_distinct_2():
    assert demo.distinct_2(["a b a b", "c"]) == pytest.approx(2 / 3)
    assert demo.distinct_2([""]) == 0


def test_a_stopped_demo_tells_what_its_command_can_do(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(demo, "train", lambda *_, **options: asked.update(options) or {"status": "stopped"})
    for resume in (False, True):
        assert demo.run_demo(tmp_path, 8.0, Console(quiet=True)) == {"status": "stopped"}
        assert asked == {"resume": resume, "go_on": "the same command goes on"}
        (tmp_path / "recipe.toml").touch()
