"""Bytes of a rank: against the measured bytes of a real training step, and V3's own limits."""

import pytest
import torch
from needs import needs_native

from baleen.config import ModelConfig, UserError
from baleen.cost import flops
from baleen.cost.architecture import from_dims, from_model_config
from baleen.cost.layout import Layout, make_layout
from baleen.cost.memory import GIB, in_flight_layers, layer_activation_bytes, rank_memory
from baleen.cost.schedule import interleaved_1f1b, schedule
from baleen.cost.simulator import Durations, execute

V3 = from_model_config(ModelConfig())
V3_LAYOUT = Layout(devices=2048, pipeline=16, expert=64, zero=1, schedule="dualpipe", recompute="deepseek")
LLAMA_8B = from_dims(dict(L=32, d=4096, H=32, KV=8, hd=128, ff=14336, nm=3, V=128256))
TINY = ModelConfig(
    vocab_size=256, hidden_size=64, intermediate_size=160, moe_intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, q_lora_rank=32, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1,
    num_nextn_predict_layers=1, max_position_embeddings=256,
)  # fmt: skip


def test_v3_fits_its_devices():
    memory = rank_memory(V3, V3_LAYOUT, seq_len=4096, micro_batches=120, precision="fp8")
    assert memory.total < 80e9
    # By hand: a rank holds two chunks (3.8125 layers and a head or embedding each, 1/16 of MTP) of 4 experts a layer.
    experts = 2 * (58 / 16 + 1 / 16) * 4 * 3 * 7168 * 2048
    assert memory.weights > 3 * experts
    assert memory.gradients == pytest.approx(memory.weights * 4 / 3)


def test_dualpipe_doubles_weights_and_keeps_one_more_micro_batch():
    plain = V3_LAYOUT.model_copy(update={"schedule": "1f1b"})
    one, two = (rank_memory(V3, lay, seq_len=4096, micro_batches=120, precision="fp8") for lay in (plain, V3_LAYOUT))
    assert two.weights == pytest.approx(2 * one.weights)
    assert two.activations / one.activations == pytest.approx(17 / 16)


def test_dualpipev_holds_each_weight_once_and_halves_of_stages():
    folded = V3_LAYOUT.model_copy(update={"schedule": "dualpipev"})
    plain = V3_LAYOUT.model_copy(update={"schedule": "1f1b"})
    one, two = (rank_memory(V3, lay, seq_len=4096, micro_batches=120, precision="fp8") for lay in (plain, folded))
    assert two.weights == one.weights
    assert two.activations / one.activations == pytest.approx(33 / 32)


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"])
def test_activations_in_flight_are_those_of_the_executed_schedule(name):
    virtual = 3 if name == "interleaved" else 1
    layout = Layout(devices=8, pipeline=8, schedule=name, virtual_stages=virtual)
    order = interleaved_1f1b(8, 32, virtual) if name == "interleaved" else schedule(name, 8, 32)
    executed = execute(order, Durations(1.0, 2.0, 1.0))
    stages = 1 + max(op.stage for rank in order for action in rank for op in action)
    assert layout.chunks == (stages if name != "dualpipe" else 8)
    assert in_flight_layers(layout, 48, 32) == pytest.approx(max(executed.peak_activations) * 48 / stages)


def test_sharding_divides_what_it_says():
    whole = rank_memory(LLAMA_8B, Layout(devices=8, zero=0), seq_len=512, micro_batches=1)
    state = rank_memory(LLAMA_8B, Layout(devices=8, zero=1), seq_len=512, micro_batches=1)
    gradients = rank_memory(LLAMA_8B, Layout(devices=8, zero=2), seq_len=512, micro_batches=1)
    assert whole.optimizer == pytest.approx(12 * flops.parameters(LLAMA_8B)["total"])
    assert state.optimizer == pytest.approx(whole.optimizer / 8)
    assert state.gradients == whole.gradients
    assert gradients.gradients == pytest.approx(whole.gradients / 8)


def test_less_is_kept_the_more_is_recomputed():
    kept = [
        rank_memory(LLAMA_8B, Layout(devices=8, recompute=policy), seq_len=4096, micro_batches=1).activations
        for policy in ("none", "operators", "full")
    ]
    assert kept[0] > kept[1] > kept[2]


def test_published_peak_memory_of_torchtitan():
    layout = Layout(devices=8, zero=3, recompute="operators", micro_batch=2)
    total = rank_memory(LLAMA_8B, layout, seq_len=8192, micro_batches=1).total / GIB
    assert total == pytest.approx(77.0, rel=0.1)


@pytest.mark.parametrize("config", [TINY, TINY.model_copy(update={"first_k_dense_replace": 5})], ids=["moe", "dense"])
def test_static_memory_equals_a_real_step(config):
    from baleen.model.transformer import Transformer

    model = Transformer(config)
    model.init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters())
    out = model(torch.randint(0, config.vocab_size, (1, 32)))
    ahead = model.predict_ahead(0, out.hidden_BTd, torch.randint(0, config.vocab_size, (1, 32)))
    (model.logits(out.hidden_BTd).sum() + model.logits(ahead.hidden_BTd).sum()).backward()
    for parameter in model.parameters():  # an expert no token came to has no gradient yet, but will
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    optimizer.step()
    moments = [t for s in optimizer.state.values() for k, t in s.items() if k != "step"]
    counted = rank_memory(
        from_model_config(config),
        Layout(devices=1, zero=0, recompute="none"),
        seq_len=32,
        micro_batches=1,
        precision="fp32",
    )
    # The count leaves out only norms of the ends: below one part in a hundred even at this size.
    assert counted.weights == pytest.approx(_bytes(model.parameters()), rel=0.01)
    assert counted.gradients == pytest.approx(_bytes(p.grad for p in model.parameters()), rel=0.01)
    assert counted.optimizer == pytest.approx(_bytes(moments), rel=0.01)


@needs_native  # PyTorch's own operators keep other tensors
@pytest.mark.parametrize(("storage", "off_by"), [("fp32", 0.01), ("autocast", 0.03)])
@pytest.mark.parametrize("layer_idx", [0, 1], ids=["dense", "moe"])
def test_a_layer_keeps_for_its_backward_what_is_counted(storage, off_by, layer_idx):
    """Every tensor that autograd saves, weights and their narrow copies apart; in BF16 experts' rows are rounded up."""
    from baleen.model.transformer import Transformer
    from baleen.train.precision import computing_in

    model, tokens = Transformer(TINY), 3000
    model.init_weights(0)
    context = model._context(torch.zeros(15, tokens // 15, dtype=torch.long), None, None)
    hidden = torch.randn(15, tokens // 15, TINY.hidden_size, requires_grad=True)
    weights = {shape for p in model.parameters() for shape in (tuple(p.shape), tuple(p.shape[::-1]))}
    kept = {}

    def keep(tensor):
        if tensor.shape not in weights and tensor.untyped_storage().nbytes() >= tokens and tensor.ndim > 1:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    precision = computing_in("bf16" if storage == "autocast" else "fp32", torch.device("cpu"))
    with precision, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.trunk_layers[layer_idx](hidden, context)
    shared = {context.cos.untyped_storage().data_ptr(), context.sin.untyped_storage().data_ptr()}
    measured = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in shared)
    layout = Layout(devices=1, zero=0, recompute="none")
    counted = layer_activation_bytes(from_model_config(TINY), layout, storage, moe=layer_idx > 0)
    assert measured / tokens == pytest.approx(counted, rel=off_by)


def _bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(tensor=3), "nearest number that does is 9"),
        (dict(expert=3), "do not divide into EP3"),
        (dict(zero=3, shard=3), "shards of 3"),
        (dict(tensor=0), "tensor"),
    ],
)
def test_layouts_that_do_not_divide_are_a_users_mistake(fields, message):
    with pytest.raises(UserError, match=message):
        make_layout(8, **fields)


def test_too_many_stages_and_unknown_precision():
    with pytest.raises(UserError, match="needs at least 64 layers"):
        rank_memory(LLAMA_8B, Layout(devices=64, pipeline=64), seq_len=1, micro_batches=1)
    with pytest.raises(UserError, match="unknown precision 'int8'"):
        rank_memory(LLAMA_8B, Layout(devices=8), seq_len=1, micro_batches=1, precision="int8")
