"""Training on from weights that exist: MTP layers behind a frozen trunk, constants kept, copies parted, resumable."""

import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from baleen.config import UserError
from baleen.data.packing import PackedTokens, TokenisedDocument
from baleen.data.prepare import prepare
from baleen.data.tokenizer_training import train_tokenizer
from baleen.interop import smollm2
from baleen.interop.huggingface import load_model, save_model
from baleen.interop.load import load
from baleen.interop.upcycle import upcycle
from baleen.parallel.worker import MicroBatch
from baleen.recipe import DataConfig, read_recipe
from baleen.train import checkpoint
from baleen.train import own_text as own_words
from baleen.train.checkpoint import NotSaved
from baleen.train.continued import drawn_otherwise, train_on
from baleen.train.continued_recipe import ContextConfig, ContinuedRecipe, OwnTextConfig
from baleen.train.draft import Drafting, distilled, draft_loss, freeze_trunk
from baleen.train.loss import Objective
from baleen.train.own_text import WithOwnText, beginnings, own_text
from baleen.train.rundir import Metrics, read_metrics
from baleen.train.upcycled import closest_experts, jitter_routers, keep_constants, part_experts


@pytest.fixture
def base(tmp_path, tiny_model, corpus):
    """Makes tmp_path/base of a random model with a tokenizer of the corpus; returns it."""

    def make(**changes):
        model = tiny_model(vocab_size=290, **changes)
        texts = [file.read_text() for file in sorted(corpus.iterdir())]
        generation = {"do_sample": False}
        save_model(model, tmp_path / "base", tokenizer=train_tokenizer(texts, 290), generation=generation)
        return model

    return make


@pytest.fixture
def recipe(tmp_path, corpus):
    """Makes a recipe of eight steps on tmp_path/base; `train` changes keys of its section."""

    def make(own=0, **train) -> ContinuedRecipe:
        return ContinuedRecipe.model_validate(
            {
                "base": str(tmp_path / "base"),
                "data": {"sources": (str(corpus),), "heldout_fraction": 0.1},
                "own_text": {"prompts": own, "prompt_tokens": 8, "max_tokens": 8},
                "train": {"tokens": 512, "batch_tokens": 64, "seq_len": 16, "lr": 1e-2, "precision": "fp32"} | train,
            }
        )

    return make


def test_only_the_mtp_layers_change(tmp_path, base, recipe):
    before = base()
    summary = train_on(recipe(own=6), tmp_path / "run", only="mtp")
    after = load_model(tmp_path / "run/model")
    changed = {name for name, a in before.state_dict().items() if not torch.equal(a, after.state_dict()[name])}
    assert changed and all(name.startswith("model.layers.3.") for name in changed)
    assert '"do_sample": false' in (tmp_path / "run/model/generation_config.json").read_text()  # as the base says
    assert summary["status"] == "done" and summary["step"] == 8 and 0 <= summary["agreement"] <= 1
    (folder,) = (tmp_path / "run/data/own-text").iterdir()
    own = PackedTokens.open(folder, 16)
    starts = np.flatnonzero(np.diff(own.flat_document_ids, prepend=-1))
    assert own.flat_loss_mask is not None
    for start, stop in zip(starts, [*starts[1:], len(own.flat_tokens)], strict=True):  # prompt, then what is learnt
        length = stop - start
        assert own.flat_loss_mask[start:stop].tolist() == ([0] * 8 + [1] * length)[:length]


def test_smollm2_drafts_once_its_mtp_layer_has_been_trained(tmp_path, base, recipe, monkeypatch):
    base()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(tmp_path / "base", smollm2.cached_directory())
    fresh = load("smollm2").path
    train_on(recipe().model_copy(update={"base": "smollm2"}), tmp_path / "run", only="mtp")
    trained = load("smollm2")
    assert trained.path == smollm2.drafting_directory() != fresh == load("smollm2", to_train=True).path
    expected = load_model(tmp_path / "run/model").state_dict()
    assert all(torch.equal(a, expected[name]) for name, a in trained.model.state_dict().items())


def test_a_trial_of_a_few_steps_leaves_smollm2_as_it_was(tmp_path, base, recipe, monkeypatch):
    base()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(tmp_path / "base", smollm2.cached_directory())
    train_on(recipe().model_copy(update={"base": "smollm2"}), tmp_path / "run", only="mtp", max_steps=2)
    assert load("smollm2").path == smollm2.cached_directory()


@pytest.mark.parametrize("only", ["mtp", "all"])
def test_micro_batches_make_the_same_step(tmp_path, base, recipe, only):
    """Rows of the model's own text have fewer learnt targets: a micro-batch counts by those, of each depth."""
    base(num_nextn_predict_layers=2)
    losses = []
    for size in (0, 1):
        train_on(recipe(own=6, tokens=64, micro_batch_size=size), tmp_path / f"run{size}", only=only)
        losses.append(read_metrics(tmp_path / f"run{size}")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_drafts_of_each_depth_count_by_their_own_targets(base):
    model = base(num_nextn_predict_layers=2)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(290, (2, 12), generator=generator)
    mask = torch.zeros(2, 12, dtype=torch.int64)
    mask[0, 5:8], mask[1, 2] = 1, 1  # the second row has a target of the first depth alone
    documents = torch.zeros_like(tokens)
    gradients = []
    for rows in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        model.zero_grad()
        batches = []
        for r in rows:
            shares = [mask[r, 1 + k :].sum() / mask[:, 1 + k :].sum() for k in (1, 2)]
            batches.append(MicroBatch(tokens[r], documents[r], mask[r], torch.tensor([0.0, 0.0, *shares])))
        Drafting(model).accumulate(batches, Objective(1.0, 0.0, "fp32"))
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert gradients[0]
    torch.testing.assert_close(*gradients)


def test_a_gradient_that_is_not_finite_is_left_out_counted_and_told(tmp_path, base, recipe, monkeypatch, capsys):
    base()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    train_on(recipe(tokens=128), tmp_path / "run", only="mtp")
    assert [row["skipped"] for row in read_metrics(tmp_path / "run")] == [1, 2]
    assert "step 2: the gradient is not finite; the update is left out" in capsys.readouterr().err
    one, other = (load_model(tmp_path / name).state_dict() for name in ("base", "run/model"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_full_disk_is_told_when_it_stops(tmp_path, base, recipe, monkeypatch, capsys):
    base()

    def full(*_, **__):
        raise NotSaved("no space left")

    monkeypatch.setattr(checkpoint, "save", full)
    monkeypatch.setattr(Metrics, "write", lambda self, row: row["step"] == 2 and os.kill(os.getpid(), signal.SIGTERM))
    train_on(recipe(), tmp_path / "run", only="mtp")
    assert "stopped at step 2 and NOT saved; step 0 is the last that is" in capsys.readouterr().err


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_a_share_of_the_rows_are_own_words_however_small_the_batch(share):
    def packed(first):
        return PackedTokens(4, np.arange(first, first + 41, dtype=np.int32), np.zeros(41, dtype=np.int32))

    loader = WithOwnText(packed(0), packed(1000), share, seed=0)
    given = [loader.next_batch(1).tokens[0, 0] for _ in range(20)]
    assert sum(int(token) >= 1000 for token in given) == 20 * share
    again = WithOwnText(packed(0), packed(1000), share, seed=0)
    again.load_state_dict(loader.state_dict())
    assert all(torch.equal(again.next_batch(3).tokens, loader.next_batch(3).tokens) for _ in range(4))


def test_jitter_leaves_the_frozen_trunk_alone(base):
    model = base()
    jitter_routers(Drafting(model).gates.values(), 0.9)
    jittered = [bool(gate._forward_pre_hooks) for gate in model.gates]
    assert jittered == [False, False, True]


def test_own_words_are_those_of_this_text_and_this_model(tmp_path, base, recipe):
    prepared = PackedTokens(16, np.arange(3, 275, dtype=np.int32), np.arange(272, dtype=np.int32) // 16)
    model, config = base(), OwnTextConfig(prompts=4, prompt_tokens=4, max_tokens=4)
    tokenizer = load(tmp_path / "base").tokenizer

    def made(seed=0):
        own_text(model, tokenizer, prepared, config, tmp_path / "own", seed=seed, progress=lambda _: None)
        return len(list((tmp_path / "own").iterdir()))

    assert (made(), made(), made(seed=1)) == (1, 1, 2)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert made() == 3


def test_own_words_too_short_for_a_row_are_told_as_such(tmp_path, base, recipe, monkeypatch):
    prepared = PackedTokens(64, np.arange(3, 275, dtype=np.int32), np.arange(272, dtype=np.int32) // 16)
    model, config = base(), OwnTextConfig(prompts=4, prompt_tokens=4, max_tokens=32)
    tokenizer = load(tmp_path / "base").tokenizer
    monkeypatch.setattr(own_words, "_answered", lambda *given: iter([TokenisedDocument([5] * 8, [1] * 8)]))
    with pytest.raises(UserError, match="answers were too short to fill a row of 64: raise own_text.prompts"):
        own_text(model, tokenizer, prepared, config, tmp_path / "own", seed=0, progress=lambda _: None)
    assert list((tmp_path / "own").iterdir()) == []


def test_an_mtp_layer_learns_what_the_trunk_will_say(base):
    model = base()
    freeze_trunk(model)
    tokens = torch.randint(290, (8, 24), generator=torch.Generator().manual_seed(0))
    documents = torch.zeros_like(tokens)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    first = draft_loss(model, tokens, documents)
    for _ in range(60):
        optimizer.zero_grad()
        loss = draft_loss(model, tokens, documents)
        loss.depths[0].backward()
        optimizer.step()
    with torch.no_grad():
        hidden = model(tokens, document_ids_BT=documents).hidden_BTd
        ahead = model.predict_ahead(0, hidden[:, :-1], tokens[:, 1:], document_ids_BT=documents[:, :-1]).hidden_BTd
        equal = (model.logits(ahead).argmax(-1) == model.logits(hidden[:, 1:]).argmax(-1)).double().mean()
    assert first.agreement < 0.1 and equal > 0.3 and abs(loss.agreement - equal) < 0.1
    assert all(p.grad is None for name, p in model.named_parameters() if "layers.3" not in name)


def test_only_masked_in_tokens_are_learnt_to_draft(base):
    """Two depths: layer k's draft of t_{i+k+1} counts where the mask says so, the one beyond the input included."""
    model = base(num_nextn_predict_layers=2)
    freeze_trunk(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(290, (3, 12), generator=generator)
    mask = torch.randint(2, (3, 13), generator=generator)
    documents = torch.tensor([[0] * 12, [0] * 5 + [1] * 7, [0] * 2 + [1] * 6 + [2] * 4])
    loss = draft_loss(model, tokens, documents, mask)
    with torch.no_grad():
        trunk = hidden = model(tokens, document_ids_BT=documents).hidden_BTd
        losses = []
        for k in (1, 2):
            hidden = model.predict_ahead(
                k - 1, hidden[:, :-1], tokens[:, k:], document_ids_BT=documents[:, :-k]
            ).hidden_BTd
            said, words = (model.logits(h).log_softmax(-1) for h in (hidden, trunk[:, k:]))
            places = [(b, i) for b in range(3) for i in range(12 - k) if mask[b, i + k + 1]]
            losses.append(sum(-(words[p].exp() * said[p]).sum() for p in places) / len(places))
    torch.testing.assert_close([depth.detach() for depth in loss.depths], losses)
    nothing = draft_loss(model, tokens, documents, torch.zeros_like(mask))
    sum(nothing.depths).backward()
    assert nothing.depths == [0, 0] and nothing.agreement == 0


def test_distillation_equals_its_twin():
    generator = torch.Generator().manual_seed(0)
    student, teacher, weight = (torch.randn(n, 8, generator=generator).double() for n in (700, 700, 30))
    student.requires_grad_(True)
    loss, agreement = distilled(student, teacher, weight)
    loss.backward()
    twin_of = student.detach().clone().requires_grad_(True)
    twin = F.cross_entropy(twin_of @ weight.t(), (teacher @ weight.t()).softmax(-1))
    twin.backward()
    torch.testing.assert_close(loss, twin)
    torch.testing.assert_close(student.grad, twin_of.grad)
    assert agreement == ((student @ weight.t()).argmax(-1) == (teacher @ weight.t()).argmax(-1)).double().mean()


@pytest.mark.parametrize("only", ["mtp", "all"])
def test_stopped_by_sigterm_and_resumed_equals_straight(tmp_path, base, recipe, only, monkeypatch):
    base()
    whole = recipe(own=6, checkpoint_every=3, router_jitter=0.2)
    train_on(whole, tmp_path / "straight", only=only)
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", lambda self, row: row["step"] == 4 and os.kill(os.getpid(), signal.SIGTERM))
        stopped = train_on(whole, tmp_path / "resumed", only=only)
    assert (stopped["status"], stopped["step"]) == ("stopped", 4)
    train_on(whole, tmp_path / "resumed", only=only, resume=True)
    one, other = (load_model(tmp_path / name / "model").state_dict() for name in ("straight", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(UserError, match="--only"):
        train_on(whole, tmp_path / "resumed", only="all" if only == "mtp" else "mtp", resume=True)


def test_a_longer_context_is_resumed_from_its_own_recipe(tmp_path, base, recipe):
    """Where 0 stands for the rope scaling that neither the base nor the recipe has."""
    base()
    longer = recipe().model_copy(update={"context": ContextConfig(max_position_embeddings=512)})
    stopped = train_on(longer, tmp_path / "run", only="all", max_steps=2)
    assert (stopped["status"], stopped["step"]) == ("stopped", 2) and (tmp_path / "run/model").is_dir()
    written = read_recipe(ContinuedRecipe, tmp_path / "run/recipe.toml")
    assert train_on(written, tmp_path / "run", only="all", resume=True)["status"] == "done"
    assert load_model(tmp_path / "run/model").config.max_position_embeddings == 512


def test_bad_input(tmp_path, base, recipe):
    base(num_nextn_predict_layers=0)
    for options, words in [({"only": "mtp"}, "no MTP layer"), ({"only": "head"}, "mtp")]:
        with pytest.raises(UserError, match=words):
            train_on(recipe(), tmp_path / "run", **options)
    with pytest.raises(UserError, match="longer than the context"):
        train_on(recipe(seq_len=512, batch_tokens=512), tmp_path / "run", only="all")
    with pytest.raises(ValueError, match="multiple"):
        recipe(batch_tokens=65)


def test_constants_stay_and_all_else_learns(base):
    model = base(attention_bias=True)
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        attention.kv_a_layernorm.weight[-2:] = 0
        attention.kv_a_proj_with_mqa.bias[14:16] = torch.tensor([5.0, 13.0])
    keep_constants(model)
    model(torch.arange(20)[None]).hidden_BTd.square().sum().backward()
    norm, bias = attention.kv_a_layernorm.weight.grad, attention.kv_a_proj_with_mqa.bias.grad
    assert torch.equal(norm == 0, torch.arange(16) >= 14) and (bias[14:16] == 0).all() and (bias[:14] != 0).all()
    assert (bias[16:] != 0).all()


def test_jitter_moves_routes_in_training_only(tiny_model):
    model, ids = tiny_model(), torch.arange(60)[None]
    jitter_routers(model.gates, 0.5)

    def routes():
        return torch.cat([routing.indices_NK.sort(-1).values for routing in model(ids).routings])

    assert torch.equal(model.eval() and routes(), routes())
    assert not torch.equal(model.train() and routes(), routes())


def test_closest_experts(tiny_model):
    model = tiny_model()
    assert closest_experts(model.trunk_layers) < 0.5
    experts = model.model.layers[2].mlp.experts
    with torch.no_grad():
        experts.gate_up_proj[3] = experts.gate_up_proj[5]
        experts.down_proj[3] = experts.down_proj[5]
    assert closest_experts(model.trunk_layers) == pytest.approx(1.0)
    assert closest_experts(model.mtp_layers) < 0.5 and closest_experts(()) is None


def test_noise_parts_copies_by_a_known_cosine(tiny_model):
    model = tiny_model(hidden_size=128, moe_intermediate_size=96)
    layers = model.trunk_layers
    experts = layers[2].mlp.experts
    with torch.no_grad():
        for stack in experts.parameters():
            stack[1:] = stack[:1]
    before = experts.down_proj.clone()
    part_experts(layers, 0.0, seed=0)
    assert torch.equal(experts.down_proj, before) and closest_experts(layers) == pytest.approx(1.0)
    part_experts(layers, 0.2, seed=0)
    assert closest_experts(layers) == pytest.approx(1 / 1.04, abs=0.003)


def test_prompts_end_where_the_assistant_begins(tmp_path):
    turns = '[{{"role": "user", "content": "whale {i}"}}, {{"role": "assistant", "content": "krill"}}]'
    lines = ['{"messages": ' + turns.format(i=i // 2) + "}" for i in range(60)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    tokenizer = train_tokenizer(["whale krill 0123456789 " * 30], 284)
    data = DataConfig(sources=(str(tmp_path / "chats.jsonl"),), format="chat")
    prepared = prepare(data, vocab_size=290, seq_len=16, seed=0, cache_dir=tmp_path / "cache", tokenizer=tokenizer)
    prompts = beginnings(tokenizer, prepared.train, OwnTextConfig(prompts=5), seed=0)
    everything = beginnings(tokenizer, prepared.train, OwnTextConfig(prompts=100), seed=0)
    assert prompts == everything[:5] and 15 < len(everything) == len(set(map(tuple, everything))) <= 30
    assert len(prompts) == 5 and tokenizer.assistant_opening == [tokenizer.id_of("<|assistant|>")]
    for prompt in prompts:
        text = tokenizer.decode(prompt, skip_special=False)
        assert text.startswith("<|begin_of_sentence|><|user|>whale") and text.endswith("<|assistant|>")


@pytest.mark.slow
def test_upcycled_experts_part_and_text_gets_no_worse(tmp_path, corpus, recipe):
    """Held-out text, from a Llama that has learnt nothing; the MTP layer, which is not trained, does not count."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    source = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=290, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.1,
            bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    source.save_pretrained(tmp_path / "llama")
    texts = [file.read_text() for file in sorted(corpus.iterdir())]
    train_tokenizer(texts, 290).save(tmp_path / "llama")
    upcycle(tmp_path / "llama", tmp_path / "base", experts=2, slices=2, shared=1, mtp=1)
    start = load(tmp_path / "base")
    assert closest_experts(start.model.trunk_layers) == pytest.approx(1.0)

    whole = recipe(tokens=40_000, batch_tokens=256, lr=1e-2, router_jitter=0.1, mtp_loss_weight=0.0)
    summary = train_on(whole, tmp_path / "run", only="all")
    healed = load(tmp_path / "run")
    assert 0 < summary["heldout_bpb"] < summary["heldout_bpb_before"] < 10 and summary["closest_experts"] < 0.99
    assert summary["closest_experts"] == pytest.approx(closest_experts(healed.model.trunk_layers))
    assert closest_experts(healed.model.mtp_layers) == pytest.approx(1.0)
    constants = healed.model.model.layers[0].self_attn.kv_a_layernorm.weight == 0
    assert constants.any() and torch.equal(
        healed.model.model.layers[0].self_attn.kv_a_proj_with_mqa.bias[: len(constants)][constants],
        start.model.model.layers[0].self_attn.kv_a_proj_with_mqa.bias[: len(constants)][constants],
    )


@pytest.mark.parametrize(
    ("base", "otherwise"),
    [
        ({}, False),  # no run
        ({"data": {"format": "text", "sources": ["a.txt"]}, "train": {"seq_len": 16}}, False),
        ({"data": {"format": "text", "sources": ["a.txt", "c.txt"]}, "train": {"seq_len": 1024}}, True),
        ({"data": {"format": "chat", "sources": ["a.txt"]}, "train": {"seq_len": 16}}, True),
        ({"data": {"format": "text", "sources": ["c.txt"]}, "train": {"seq_len": 1024}}, False),
    ],
)
def test_text_that_the_base_has_split_otherwise(base, otherwise):
    recipe = SimpleNamespace(
        data=SimpleNamespace(format="text", sources=["a.txt", "b.txt"]), train=SimpleNamespace(seq_len=32)
    )
    assert drawn_otherwise(base, recipe) is otherwise
