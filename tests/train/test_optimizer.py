import pytest
import torch

from baleen.config import UserError
from baleen.recipe import TrainConfig
from baleen.train.muon import Muon
from baleen.train.optimizer import Optimizer

BASE = {"tokens": 100, "batch_tokens": 10, "seq_len": 10, "lr": 0.01}


def optimizer_of(model, **changes) -> Optimizer:
    return Optimizer(model, TrainConfig.model_validate({**BASE, **changes}))


def names_in(model, group):
    ids = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def train_steps(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step(0.01)


def test_adamw_takes_everything_and_decays_matrices_only(tiny_model):
    model = tiny_model()
    optimizer = optimizer_of(model, weight_decay=0.2, betas=[0.8, 0.9])
    (adamw,) = optimizer.parts
    decayed, plain = adamw.param_groups
    everything = {name for name, _ in model.named_parameters()}
    assert names_in(model, decayed) | names_in(model, plain) == everything
    assert names_in(model, plain) == {name for name in everything if name.endswith("norm.weight")}
    assert (decayed["weight_decay"], plain["weight_decay"], decayed["betas"]) == (0.2, 0.0, (0.8, 0.9))


def test_the_embedding_has_a_learning_rate_of_its_own(tiny_model):
    model = tiny_model()
    optimizer = optimizer_of(model, embedding_lr_scale=5.0, weight_decay=0.2)
    decayed, plain, embedding = optimizer.parts[0].param_groups
    assert names_in(model, embedding) == {"model.embed_tokens.weight"}
    optimizer.step(0.01)
    assert [group["lr"] for group in (decayed, plain, embedding)] == [0.01, 0.01, 0.05]
    assert [group["lr"] * group["weight_decay"] for group in (decayed, embedding)] == pytest.approx([0.002, 0.002])


def test_muon_takes_the_matrices_between_hidden_states(tiny_model):
    model = tiny_model()
    adamw, muon = optimizer_of(model, optimizer="muon").parts
    assert isinstance(muon, Muon)
    on_adamw = set().union(*(names_in(model, group) for group in adamw.param_groups))
    single, stacked = (names_in(model, group) for group in muon.param_groups)
    everything = {name for name, _ in model.named_parameters()}
    assert on_adamw == {
        name
        for name in everything
        if name.endswith(("norm.weight", "mlp.gate.weight", "embed_tokens.weight", "lm_head.weight"))
    }
    assert stacked == {name for name in everything if name.endswith("experts.gate_up_proj")}
    assert single == everything - on_adamw - stacked
    assert [group["matrices"] for group in muon.param_groups] == [1, 2]
    assert "model.layers.1.mlp.experts.down_proj" in single and "model.layers.3.eh_proj.weight" in single


def test_tied_embeddings_are_one_parameter(tiny_model):
    model = tiny_model(tie_word_embeddings=True)
    for kind in ("adamw", "muon"):
        parts = optimizer_of(model, optimizer=kind).parts
        ids = [id(p) for part in parts for group in part.param_groups for p in group["params"]]
        assert len(ids) == len(set(ids)) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_goes_round_by_name(tiny_model, kind):
    straight, broken = tiny_model(), tiny_model()
    one, two = (optimizer_of(model, optimizer=kind) for model in (straight, broken))
    assert one.state_tensors() == {}
    train_steps(straight, one, 3)
    train_steps(broken, two, 3)
    state = {name: tensor.clone() for name, tensor in two.state_tensors().items()}
    fresh = optimizer_of(broken, optimizer=kind)
    fresh.load_state_tensors(state)
    assert fresh.state_tensors().keys() == one.state_tensors().keys()
    assert state["model.norm.weight.step"] == 3
    train_steps(straight, one, 2, seed=1)
    train_steps(broken, fresh, 2, seed=1)
    for (name, a), (_, b) in zip(straight.named_parameters(), broken.named_parameters(), strict=True):
        assert a.equal(b), name
    for name, tensor in one.state_tensors().items():
        assert tensor.equal(fresh.state_tensors()[name]), name
    assert not state["model.norm.weight.exp_avg"].equal(one.state_tensors()["model.norm.weight.exp_avg"])


def test_room_for_its_state_is_where_its_parameters_are():
    """A fused AdamW counts its steps on the device, and would be handed a pointer to the host."""
    optimizer = optimizer_of(torch.nn.Linear(3, 2))
    optimizer._named = {name: parameter.to("meta") for name, parameter in optimizer._named.items()}
    names = [f"{name}.{state}" for name in ("weight", "bias") for state in ("step", "exp_avg", "exp_avg_sq")]
    room = optimizer.empty_state_tensors(names)
    assert room.keys() == set(names) and {tensor.device.type for tensor in room.values()} == {"meta"}
    assert room["weight.step"].shape == () and room["weight.step"].dtype == torch.float32


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("model.nothing.weight.exp_avg", torch.zeros(32)),
        ("model.norm.weight.exp_avg", torch.zeros(33)),
        ("model.norm.weight.momentum_buffer", torch.zeros(32)),
    ],
)
def test_a_foreign_state_is_a_users_mistake(tiny_model, name, tensor):
    optimizer = optimizer_of(tiny_model())
    with pytest.raises(UserError, match="of another model"):
        optimizer.load_state_tensors({name: tensor})
    assert optimizer.state_tensors() == {}


def test_the_state_of_the_other_optimizer_is_foreign(tiny_model):
    model = tiny_model()
    adamw = optimizer_of(model)
    train_steps(model, adamw, 1)
    with pytest.raises(UserError, match="of another model"):
        optimizer_of(model, optimizer="muon").load_state_tensors(adamw.state_tensors())


def test_step_sets_the_learning_rate_of_every_part(tiny_model):
    model = tiny_model()
    optimizer = optimizer_of(model, optimizer="muon", weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(0.0)
    assert all(p.equal(before[name]) for name, p in model.named_parameters())
    optimizer.step(0.01)
    assert not any(p.equal(before[name]) for name, p in model.named_parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
