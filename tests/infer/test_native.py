"""The native step against its twin, the model: same hidden states, same routes, whatever the batch and the threads."""

import pytest
import torch
from needs import needs_native
from test_speculative import margin

from baleen.config import UserError
from baleen.infer.engine import Engine, Request
from baleen.infer.native.library import native_library
from baleen.infer.native.runner import NativeRunner, fastest_runner
from baleen.infer.native.weights import FORMATS, rounded
from baleen.infer.runner import TorchRunner
from baleen.infer.sampler import SamplingParams
from baleen.model.cache import Batch, LatentPages

LIBRARY = native_library()
pytestmark = needs_native

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
SHAPES = {
    "as it is": {},
    "plain queries": {"q_lora_rank": None},
    "halves, not pairs": {"rope_interleave": False},
    "yarn": {"rope_scaling": YARN},
    "biases": {"attention_bias": True},
    "no groups": {"n_group": 1, "topk_group": 1},
    "gates not normalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "no shared expert": {"n_shared_experts": 0},
    "two shared experts": {"n_shared_experts": 2},
    "dense": {"first_k_dense_replace": 4},
    "tied": {"tie_word_embeddings": True},
    "odd sizes": {"hidden_size": 37, "intermediate_size": 50, "moe_intermediate_size": 19, "q_lora_rank": 21,
                  "kv_lora_rank": 33, "qk_nope_head_dim": 11, "qk_rope_head_dim": 6, "v_head_dim": 9,
                  "vocab_size": 101},
    "many heads": {"num_attention_heads": 20},
}  # fmt: skip


def batches(vocab, page_size=4):
    """A prompt each for three sequences, then a ragged step on top: 1, 3 and 2 tokens, pages in disorder."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab, (200,), generator=generator).tolist()
    order = torch.randperm(64, generator=generator).tolist()
    tables = [order[:16], order[16:32], list(range(64, 80))]
    yield Batch(ids[:60], [0, 0, 0], [13, 26, 21], tables)
    yield Batch(ids[60:66], [13, 26, 21], [1, 3, 2], tables)


def run(runner, model, depth=True):
    """Hidden states, logits and routes of both batches, and of the MTP layer after them."""
    out = []
    for batch in batches(model.config.vocab_size):
        result = runner.forward(batch)
        drafted = runner.draft(0, result.hidden_Nd, batch)
        out += [result.hidden_Nd, *result.experts, runner.logits(result.hidden_Nd), drafted, runner.logits(drafted[:2])]
    return out


def pages_for(model):
    return LatentPages(model.config, 80, page_size=4, mtp=True)


def assert_close(ours, theirs, tolerance=2e-5):
    for a, b in zip(ours, theirs, strict=True):
        if a.dtype == torch.long:
            assert torch.equal(a.sort(-1).values, b.sort(-1).values)
        else:
            assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_fp32_equals_the_model(tiny_model, shape):
    model = tiny_model(**SHAPES[shape])
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    native, torch_ = (NativeRunner(LIBRARY, model, pages_for(model)), TorchRunner(model, pages_for(model)))
    assert_close(run(native, model), run(torch_, model))
    assert_close([native.pages.latents], [torch_.pages.latents])


@torch.no_grad()
def as_packed(model, format):
    """The model with every matrix that is packed replaced by what its packed form stands for."""
    H, N = model.config.num_attention_heads, model.config.qk_nope_head_dim
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name.endswith(("embed_tokens.weight", "gate.weight")):
            continue
        if name.endswith("kv_b_proj.weight"):  # W^UK shares scales along its own inputs
            heads = parameter.unflatten(0, (H, -1))
            heads[:, :N] = rounded(heads[:, :N].transpose(1, 2), format).transpose(1, 2)
            heads[:, N:] = rounded(heads[:, N:], format)
        else:
            parameter.copy_(rounded(parameter, format))
    return model


@pytest.mark.parametrize("shape", ["as it is", "odd sizes"])
@pytest.mark.parametrize("format", FORMATS[1:])
@torch.inference_mode()
def test_other_formats_equal_the_model_with_their_weights(tiny_model, format, shape):
    model = tiny_model(**SHAPES[shape])
    native = NativeRunner(LIBRARY, model, pages_for(model), format)
    as_packed(model, format)
    # Integers meet activations rounded to 16 bits.
    assert_close(
        run(native, model), run(TorchRunner(model, pages_for(model)), model), 2e-5 if format == "bf16" else 5e-4
    )


@pytest.mark.parametrize(("format", "steps"), [("bf16", 2**-7), ("int8", 1 / 127), ("int4", 1 / 15)])
def test_rounding_moves_a_weight_by_at_most_half_a_step(format, steps):
    weight = torch.randn(7, 75, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    error = (rounded(weight, format) - weight).abs()
    spans = (weight.amax(-1) - weight.amin(-1)) if format == "int4" else weight.abs().amax(-1)
    assert (error <= 0.51 * 1.01 * steps * spans[:, None]).all()
    assert error[1:].max() > 0 and error[0].max() == 0


@pytest.mark.parametrize("format", FORMATS)
@torch.inference_mode()
def test_nothing_depends_on_the_batch_or_the_threads(tiny_model, format):
    """Bit for bit: a sequence alone, in chunks, on one thread, in pages that lie apart, equals the same in a ragged
    batch on three, in pages side by side."""
    model = tiny_model(max_position_embeddings=640)
    V, length = model.config.vocab_size, 530  # beyond one part of the keys
    ids = torch.randint(V, (3 * length,), generator=torch.Generator().manual_seed(1)).tolist()
    tables = [list(range(b * 140, (b + 1) * 140)) for b in range(3)]
    strewn = torch.randperm(3 * 140, generator=torch.Generator().manual_seed(2))
    pages = [LatentPages(model.config, 3 * 140, page_size=4, mtp=True) for _ in range(2)]
    runners = [NativeRunner(LIBRARY, model, p, format) for p in pages]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        runners[0].forward(Batch(ids, [0] * 3, [length] * 3, tables))
        together = runners[0].forward(Batch(ids[:6], [length] * 3, [1, 2, 3], tables)).hidden_Nd
        torch.set_num_threads(1)
        for b in range(3):
            for start in range(0, length, 53):
                chunk = ids[b * length + start : b * length + start + 53]
                runners[1].forward(Batch(chunk, [start], [len(chunk)], [strewn[tables[b]].tolist()]))
        alone = [
            runners[1].forward(Batch([ids[i]], [length + place], [1], [strewn[tables[b]].tolist()])).hidden_Nd
            for i, (b, place) in enumerate([(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)])
        ]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(pages[0].latents, pages[1].latents[:, strewn])
    assert torch.equal(together, torch.cat(alone))


def test_who_runs(tiny_model, monkeypatch):
    """The native runner where it can, PyTorch's where it can't, an error where it must and can't."""
    monkeypatch.delenv("BALEEN_NATIVE", raising=False)
    model = tiny_model()
    assert isinstance(fastest_runner(model, pages_for(model)), NativeRunner)
    halved = fastest_runner(model.bfloat16(), LatentPages(model.config, 80, dtype=torch.bfloat16))
    assert isinstance(halved, NativeRunner) and halved.pages.latents.dtype == torch.float32
    halved_again = fastest_runner(tiny_model().half(), LatentPages(model.config, 80, dtype=torch.float16))
    assert halved.packed_bytes < halved_again.packed_bytes  # whose bits bf16 could not hold: they are fp32 there
    double = tiny_model(torch.float64)
    pages = LatentPages(double.config, 4, dtype=torch.float64)
    assert isinstance(fastest_runner(double, pages), TorchRunner)
    with pytest.raises(UserError, match="float64"):
        fastest_runner(double, pages, "int8")
    monkeypatch.setenv("BALEEN_NATIVE", "require")
    with pytest.raises(UserError, match="float64"):
        fastest_runner(double, pages)
    with pytest.raises(UserError, match="int7"):
        fastest_runner(tiny_model(), pages_for(model), "int7")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_engine_says_the_same_on_either_runner(tiny_model, temperature):
    """Whole answers, drafts and prefix reuse included; greedy ones may part only where two logits nearly tie."""
    model = tiny_model()
    params = [SamplingParams(temperature=temperature, seed=i, max_tokens=40, ignore_eos=True) for i in range(5)]
    requests = [Request([3, 5, 7, 11, 13, 17, 19, i + 20] * 3, p) for i, p in enumerate(params)]
    answers = [
        [c.token_ids for c in Engine(model, None, runner=runner, page_size=4).complete(requests, speculate=speculate)]
        for runner in (fastest_runner, TorchRunner)
        for speculate in (0, 1)
    ]
    assert answers[0] == answers[1]  # bit-equal logits: drafts change nothing
    for request, ours, *theirs in zip(requests, answers[0], *answers[2:], strict=True):
        for other in theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, other, strict=True)) if a != b), None)
            if temperature == 0 and at is not None:
                assert margin(model, [*request.prompt_ids, *ours[:at]]) < 1e-4
    assert sum(ours == other for other in answers[2:] for ours, other in zip(answers[0], other, strict=True)) >= 9
