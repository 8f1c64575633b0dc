"""Fast paths against their slow twins, exact to rounding in float64; and what is counted in bytes."""

import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from baleen.config import ModelConfig
from baleen.model import cache as cache_module
from baleen.model import moe as moe_module
from baleen.model.attention import LatentAttention
from baleen.model.cache import Batch, LatentPages
from baleen.model.linear import grouped_linear, grouped_linear_loop
from baleen.model.moe import DeepseekMoE, Gate, Routing, sequence_balance_loss
from baleen.model.native.training import serves
from baleen.model.rope import RotaryEmbedding, rotate, softmax_scale, yarn_mscale
from baleen.model.transformer import Transformer
from baleen.parallel.stage import Stage

F64 = {"rtol": 1e-9, "atol": 1e-11}


def ids(batch, length, seed=1):
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("chunk", [1, 7])
def test_cached_equals_full(tiny_model, monkeypatch, absorb, chunk):
    model = tiny_model(dtype=torch.float64)
    tokens = ids(2, 29)
    full = model(tokens).hidden_BTd
    monkeypatch.setattr(LatentAttention, "prefers_absorbed", lambda *_: absorb)
    pages = LatentPages(model.config, 12, page_size=5, dtype=torch.float64)
    parts = []
    for start in range(0, 29, chunk):
        part = tokens[:, start : start + chunk]
        T = part.shape[1]
        batch = Batch(part.flatten().tolist(), [start] * 2, [T] * 2, [[0, 1, 2, 3, 4, 5], [11, 6, 8, 10, 7, 9]])
        parts.append(model(part.reshape(1, -1), cache=pages.view(batch)).hidden_BTd.view(2, T, -1))
    torch.testing.assert_close(torch.cat(parts, 1), full, **F64)


def test_one_long_sequence_does_not_make_the_others_as_long():
    lengths = [16] * 100 + [32_768] + [16] * 155
    tables = [list(range(-(-n // 16))) for n in lengths]
    batch = Batch([1] * 256, [n - 1 for n in lengths], [1] * 256, tables)
    segments = cache_module._segments(batch, torch.tensor(batch.positions()), 16)
    assert [segment.shape for segment in segments] == [(100, 1), (2, 1), (154, 1)]  # its neighbour doubles what is read
    assert [segment.tokens for segment in segments] == [slice(0, 100), slice(100, 102), slice(102, 256)]
    assert [segment.visible for segment in segments] == [16, 32_768, 16]


@pytest.mark.parametrize("small", [cache_module.SMALL, 0])
@pytest.mark.parametrize("absorb", [False, True])
def test_ragged_equals_each_alone(tiny_model, monkeypatch, absorb, small):
    """Sequences of any length and any number of new tokens in one forward, with pages strewn about."""
    model = tiny_model(dtype=torch.float64)
    monkeypatch.setattr(cache_module, "SMALL", small)
    monkeypatch.setattr(LatentAttention, "prefers_absorbed", lambda *_: absorb)
    pages = LatentPages(model.config, 20, page_size=4, dtype=torch.float64)
    tables = torch.randperm(20, generator=torch.Generator().manual_seed(2)).view(4, 5).tolist()
    texts = ids(4, 17).tolist()
    done = [0, 0, 0, 0]
    for counts in ((3, 3, 9, 9), (1, 1, 1, 8), (1, 2, 2, 0), (12, 11, 5, 0)):
        who = [b for b in range(4) if counts[b]]
        new = [texts[b][done[b] : done[b] + counts[b]] for b in who]
        batch = Batch(sum(new, []), [done[b] for b in who], [counts[b] for b in who], [tables[b] for b in who])
        hidden = model(torch.tensor([batch.tokens]), cache=pages.view(batch)).hidden_BTd[0].split(list(batch.counts))
        for b, rows in zip(who, hidden, strict=True):
            done[b] += counts[b]
            alone = model(torch.tensor([texts[b][: done[b]]])).hidden_BTd[0, -counts[b] :]
            torch.testing.assert_close(rows, alone, **F64)
    assert done == [17, 17, 17, 17]


def test_absorbed_is_chosen_by_its_cost():
    v3 = LatentAttention.__new__(LatentAttention)
    torch.nn.Module.__init__(v3)
    v3.config = ModelConfig()
    assert v3.prefers_absorbed(1, 4096) and v3.prefers_absorbed(64, 4096)
    assert not v3.prefers_absorbed(4096, 4096)


def test_rows_at_different_positions(tiny_model):
    """A batch whose sequences have different lengths, one of them shortened after a rejected draft."""
    model = tiny_model(dtype=torch.float64)
    tokens = ids(2, 12)
    pages, tables = LatentPages(model.config, 6, page_size=4, dtype=torch.float64), [[0, 1, 2], [3, 4, 5]]
    first = Batch(tokens[:, :8].flatten().tolist(), [0, 0], [8, 8], tables)
    model(torch.tensor([first.tokens]), cache=pages.view(first))
    second = Batch([int(tokens[0, 8]), int(tokens[1, 9])], [8, 3], [1, 1], tables)  # one goes back to position 3
    step = model(torch.tensor([second.tokens]), cache=pages.view(second)).hidden_BTd[0]
    long = model(tokens[:1, :9]).hidden_BTd[:, -1]
    short = model(torch.cat((tokens[1:, :3], tokens[1:, 9:10]), 1)).hidden_BTd[:, -1]
    torch.testing.assert_close(step, torch.cat((long, short)), **F64)


def test_cache_bytes(tiny_config):
    config = tiny_config()
    for mtp, layers in ((False, 3), (True, 4)):
        pages = LatentPages(config, 5, page_size=4, mtp=mtp)
        assert pages.bytes_per_token == layers * (16 + 8) * 4
        assert pages.latents.nbytes == pages.bytes_per_token * 5 * 4 and not pages.latents.any()
    v3 = LatentPages(ModelConfig(), 1, dtype=torch.bfloat16, device="meta")
    assert v3.bytes_per_token == 70_272


def test_v3_has_the_published_parameters():
    with torch.device("meta"):
        v3 = Transformer(ModelConfig())
    mtp = sum(p.numel() for layer in v3.mtp_layers for p in layer.parameters())
    total = sum(p.numel() for p in v3.parameters())
    assert total - mtp == 671_026_404_352
    assert sum(gate.e_score_correction_bias.numel() for gate in v3.gates[:-1]) == 14_848
    assert round(mtp / 1e9, 3) == 11.610
    assert round((total + 2 * v3.lm_head.weight.numel()) / 1e9, 2) == 684.49


def test_grouped_linear_is_a_loop():
    generator = torch.Generator().manual_seed(0)
    counts = [3, 0, 5, 1]
    x = torch.randn(9, 6, dtype=torch.float64, generator=generator)
    w = torch.randn(4, 7, 6, dtype=torch.float64, generator=generator)
    g = torch.randn(9, 7, dtype=torch.float64, generator=generator)
    results = []
    for function in (grouped_linear, grouped_linear_loop):
        x_, w_ = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = function(x_, w_, counts)
        y.backward(g)
        results.append((y, x_.grad, w_.grad))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, **F64)


def test_grouped_mm_of_accelerators_is_the_same():
    counts, results = [3, 0, 5, 1], []
    for linear, sizes in ((grouped_linear, torch.tensor(counts)), (grouped_linear_loop, counts)):
        generator = torch.Generator().manual_seed(0)
        x, w, g = (torch.randn(*shape, generator=generator) for shape in ((9, 8), (4, 16, 8), (9, 16)))
        y = linear(x.requires_grad_(), w.requires_grad_(), sizes)
        results.append((y, *torch.autograd.grad(y, (x, w), g)))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow)


class Operations(TorchDispatchMode):
    """Counts PyTorch's operators but for views, which launch nothing."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_only_the_experts_matmuls_grow_in_number_with_the_experts(tiny_model):
    for dtype in (torch.float32, torch.float64):
        counted = []
        for experts in (8, 32):
            model = tiny_model(n_routed_experts=experts, dtype=dtype)
            moe, x = model.model.layers[1].mlp, torch.randn(1, 256, 32, dtype=dtype, requires_grad=True)
            with Operations() as operations:
                moe(x)[0].square().mean().backward()
            counted.append(operations.counts)
        few, many = counted
        native = serves(x)  # then all experts are one call
        assert many["mm"] - few["mm"] == (0 if native else 6 * (32 - 8))  # an expert: two forward, four backward
        assert many - Counter(mm=many["mm"]) == few - Counter(mm=few["mm"])
        assert sum(few.values()) - few["mm"] < 100


def test_moe_is_a_loop_over_tokens(tiny_model):
    """Eq. 12-16 token by token, group mask of -inf and negative biases included."""
    model = tiny_model(dtype=torch.float64)
    moe = model.model.layers[1].mlp
    assert isinstance(moe, DeepseekMoE) and moe.shared_experts is not None
    moe.gate.e_score_correction_bias -= 2.0  # a mask of 0.0 would now prefer the masked groups
    x = torch.randn(1, 20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y, routing = moe(x)
    for n in range(20):
        u = x[0, n]
        s = (moe.gate.weight @ u).sigmoid()
        choice = s + moe.gate.e_score_correction_bias
        groups = choice.view(4, 2).sum(1).topk(2).indices.tolist()
        allowed = [e for e in range(8) if e // 2 in groups]
        chosen = sorted(allowed, key=lambda e: -choice[e].item())[:3]
        assert sorted(routing.indices_NK[n].tolist()) == sorted(chosen)
        expected = moe.shared_experts(u)
        for e in chosen:
            gate, up = (moe.experts.gate_up_proj[e] @ u).chunk(2)
            value = moe.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up)
            expected = expected + s[e] / s[chosen].sum() * 2.5 * value
        torch.testing.assert_close(y[0, n], expected, **F64)


def test_rows_that_round_an_experts_batch_count_for_nothing(tiny_model, monkeypatch):
    """As BF16 has them on CPUs, here in float64: output and every gradient stay."""
    moe = tiny_model(dtype=torch.float64).model.layers[1].mlp
    x = torch.randn(1, 20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    results = []
    for alignment in (1, 8):
        monkeypatch.setattr(moe_module, "row_alignment", lambda _, alignment=alignment: alignment)
        y, _ = moe(x)
        wanted = (x, moe.experts.gate_up_proj, moe.experts.down_proj, moe.gate.weight)
        results.append((y, *torch.autograd.grad(y.square().sum(), wanted)))
    for rounded, exact in zip(*results, strict=True):
        torch.testing.assert_close(rounded, exact, **F64)


def test_experts_that_no_token_has_come_to(tiny_model):
    """As on a rank of expert parallelism whose experts nobody chose: nothing in, nothing out, and gradients of zero."""
    experts = next(m for m in tiny_model().modules() if isinstance(m, moe_module.Experts))
    x_Nd, none = torch.zeros(0, 32, requires_grad=True), torch.zeros(0, 1, dtype=torch.long)
    y_Nd = moe_module.apply_experts(x_Nd, none, torch.ones(0, 1), torch.zeros(8, dtype=torch.long), experts)
    y_Nd.sum().backward()
    assert y_Nd.shape == x_Nd.grad.shape == (0, 32)
    assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())


def test_a_stage_turns_by_angles_of_the_weights_precision(tiny_model):
    """Not of the activations', which are bf16 behind a norm under autocast."""
    model = tiny_model()
    stage = Stage(model, range(3), first=True, last=True, lends_embedding=False)
    context = stage._context(torch.zeros(1, 5, 32, dtype=torch.bfloat16), None)
    assert context.cos.dtype == torch.float32


def test_no_token_is_dropped(tiny_model):
    _, routings = tiny_model()(ids(3, 17))
    for routing in routings:
        assert routing.load().sum() == 3 * 17 * 3


def test_bias_moves_against_the_load(tiny_config):
    gate = Gate(tiny_config())
    gate.update_bias(torch.tensor([10, 0, 4, 4, 4, 4, 4, 2]), speed=0.5)
    assert gate.e_score_correction_bias.tolist() == [-0.5, 0.5, 0, 0, 0, 0, 0, 0.5]
    assert not gate.e_score_correction_bias.requires_grad


def test_bias_stays_float32_in_a_bfloat16_model(tiny_model):
    gate = tiny_model().to(torch.bfloat16).gates[0]
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert gate(torch.randn(4, 32, dtype=torch.bfloat16)).weights_NK.dtype == torch.float32


def test_sequence_balance_loss_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.2], [0.8, 0.3, 0.1, 0.6]], dtype=torch.float64)
    routing = Routing(torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2), scores)
    share = scores / scores.sum(-1, keepdim=True)
    one_sequence = sum(f * p for f, p in zip([2, 0, 1, 1], share.mean(0).tolist(), strict=True))
    assert sequence_balance_loss(routing, 1, 2).item() == pytest.approx(one_sequence)
    two = [
        sum(2 * share[0, [0, 2]].tolist()[i] for i in range(2)),
        sum(2 * share[1, [0, 3]].tolist()[i] for i in range(2)),
    ]
    assert sequence_balance_loss(routing, 2, 2).item() == pytest.approx(sum(two) / 2)


def test_documents_do_not_see_each_other(tiny_model):
    model = tiny_model(dtype=torch.float64)
    tokens = ids(1, 20)
    documents = torch.tensor([[0] * 8 + [1] * 12])
    apart = model(tokens, document_ids_BT=documents).hidden_BTd
    changed = torch.cat((tokens[:, :8].flip(1), tokens[:, 8:]), 1)
    torch.testing.assert_close(model(changed, document_ids_BT=documents).hidden_BTd[:, 8:], apart[:, 8:], **F64)
    alone = model(tokens[:, 8:]).hidden_BTd  # at other positions, whose angles are float32
    torch.testing.assert_close(apart[:, 8:], alone, rtol=1e-5, atol=1e-5)


def test_rotation_is_complex_multiplication(tiny_config):
    config = tiny_config()
    cos, sin = RotaryEmbedding(config)(torch.arange(6)[None], torch.float64)
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    torch.testing.assert_close(rotate(x, cos, sin, True), torch.cat((turned.real, turned.imag), -1))


def test_yarn_at_v3_scale(tiny_config):
    assert yarn_mscale(40, 1.0) == pytest.approx(1.36889, abs=5e-6)
    from baleen.config import RopeScaling

    yarn = RopeScaling(factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)
    scaled = softmax_scale(ModelConfig(rope_scaling=yarn)) * math.sqrt(192)
    assert scaled == pytest.approx(1.87385, abs=1e-5)


def test_weights_are_normal_and_repeatable(tiny_config):
    model, again = Transformer(tiny_config(hidden_size=256)), Transformer(tiny_config(hidden_size=256))
    model.init_weights(3)
    again.init_weights(3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    weight = model.model.embed_tokens.weight
    assert weight.std().item() == pytest.approx(0.1, rel=0.05) and abs(weight.mean().item()) < 0.01
    assert torch.equal(model.model.norm.weight, torch.ones(256))
    assert all(p.eq(1).all() for name, p in model.named_parameters() if name.endswith("norm.weight"))


def test_what_is_made_of_a_scaled_latent_is_as_large_as_of_the_hidden_state(tiny_config):
    shape = {"hidden_size": 256, "q_lora_rank": 64, "kv_lora_rank": 16, "qk_nope_head_dim": 64, "v_head_dim": 64}
    model = Transformer(tiny_config(mla_scale_lora=True, **shape))
    model.init_weights(0)
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(500, 256, generator=torch.Generator().manual_seed(0))
    queries = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(hidden)))
    latents = attention.kv_a_proj_with_mqa(hidden)[:, :16]
    keys_and_values = attention.kv_b_proj(attention.kv_a_layernorm(latents))
    for made in (queries, keys_and_values):
        assert made.std().item() == pytest.approx(0.1 * 256**0.5, rel=0.1)
    scaled = {name for name, p in model.named_parameters() if name.endswith("norm.weight") and not p.eq(1).all()}
    assert {name.split(".")[-2] for name in scaled} == {"q_a_layernorm", "kv_a_layernorm"} and len(scaled) == 2 * 4
