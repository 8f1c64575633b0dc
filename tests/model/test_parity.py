"""Held to the oracle: transformers' DeepseekV3ForCausalLM and its MtpModel on the same weights."""

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import MtpModel

from baleen.config import RopeScaling, model_config_to_hf
from baleen.train.loss import training_loss

YARN = {"factor": 8.0, "original_max_position_embeddings": 32}
V3_YARN = RopeScaling(**YARN, mscale=1.0, mscale_all_dim=1.0)
PLAIN_YARN = RopeScaling(**YARN)

CONFIGS = {
    "v3": {},
    "no q_lora": {"q_lora_rank": None},
    "one group": {"n_group": 1, "topk_group": 1},
    "two of two groups": {"n_group": 2, "topk_group": 2},
    "no shared experts": {"n_shared_experts": 0},
    "two shared experts": {"n_shared_experts": 2},
    "yarn, V3's form": {"rope_scaling": V3_YARN},
    "yarn without mscale_all_dim": {"rope_scaling": PLAIN_YARN},
    "halves instead of interleaved pairs": {"rope_interleave": False},
    "tied embeddings": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "no norm of the gate values": {"norm_topk_prob": False, "routed_scaling_factor": 1.7},
    "all dense": {"first_k_dense_replace": 3},
    "no dense, no q_lora, one group, yarn": {
        "first_k_dense_replace": 0,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "rope_scaling": V3_YARN,
    },
    "values wider than keys": {"v_head_dim": 28},
    "another epsilon": {"rms_norm_eps": 1e-3},
}


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def transformers_twin(model):
    """transformers' network with our weights, which it takes by name: only the MTP layers are left over."""
    raw = model_config_to_hf(model.config)
    twin = DeepseekV3ForCausalLM(DeepseekV3Config(**raw, experts_implementation="eager", attn_implementation="eager"))
    if model.config.n_shared_experts == 0:  # an empty matrix there, no module here
        assert all(p.numel() == 0 for n, p in twin.named_parameters() if "shared_experts" in n)
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert all("shared_experts" in name for name in missing)
    assert all(int(name.split(".")[2]) >= model.config.num_hidden_layers for name in unexpected)
    return twin.eval()


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_logits_and_gradients(tiny_model, changes):
    model = tiny_model(**changes)
    for gate in model.gates:  # now s + b is negative: a mask of 0 would bring experts of other groups back
        gate.e_score_correction_bias -= 0.8
    twin = transformers_twin(model)
    ids = torch.randint(0, 97, (2, 50), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(2, 50, 97, generator=torch.Generator().manual_seed(2))

    output = model(ids)
    for gate, routing in zip(model.gates, output.routings, strict=False):
        assert ((routing.scores_NE + gate.e_score_correction_bias).gather(1, routing.indices_NK) < 0).any()
    ours = model.logits(output.hidden_BTd)
    theirs = twin(ids).logits
    assert difference(ours, theirs) <= 2e-5

    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    theirs_by_name = dict(twin.named_parameters())
    trunk = {n: p for n, p in model.named_parameters() if n in theirs_by_name}
    assert len(trunk) == len([p for p in theirs_by_name.values() if p.numel()])
    for name, parameter in trunk.items():
        assert parameter.grad is not None, name
        assert difference(parameter.grad, theirs_by_name[name].grad) <= 2e-5, name


def mtp_twin(model, twin, depth):
    mtp = MtpModel(twin, depth)
    rename = {"shared_head.norm": "post_norm"}
    state = {}
    for name, tensor in model.state_dict().items():
        _, _, layer, rest = (*name.split(".", 3), "", "", "")[:4]
        k = int(layer) - model.config.num_hidden_layers if layer.isdigit() else -1
        if k < 0:
            continue
        block = not rest.startswith(("enorm", "hnorm", "eh_proj", "shared_head"))
        for ours, theirs in rename.items():
            rest = rest.replace(ours, theirs)
        state[f"layers.{k}.{'mtp_block.' if block else ''}{rest}"] = tensor
    missing, unexpected = mtp.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith(("embed_tokens", "shared_head")) for name in missing)
    return mtp.eval()


@pytest.mark.parametrize("depth", [1, 2])
def test_mtp_layers(tiny_model, depth):
    """Input t_{i+k} joined with the post-norm hidden state, enorm first, chained post-norm (the released weights)."""
    model = tiny_model(num_nextn_predict_layers=depth, first_k_dense_replace=0)  # MtpModel numbers its layers from 0
    twin = transformers_twin(model)
    oracle = mtp_twin(model, twin, depth)
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))

    ours = model(ids).hidden_BTd
    theirs = twin.model(ids).last_hidden_state
    for k in range(depth):
        inputs = ids[:, 1 + k :]
        positions = torch.arange(inputs.shape[1]).expand_as(inputs)
        ours = model.predict_ahead(k, ours[:, :-1], inputs).hidden_BTd
        theirs = oracle.forward_layer(k, theirs[:, :-1], positions, None, input_ids=inputs)
        assert difference(model.logits(ours), oracle._project_to_logits(theirs)) <= 2e-5


def test_mtp_learns_the_token_after_its_input(tiny_model):
    """Trap 1: the input is t_{i+1}, the target t_{i+2}. Where t_{i+2} is random, MTP must not get below chance."""
    model = tiny_model(num_hidden_layers=1, first_k_dense_replace=1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        tokens = torch.randint(0, 97, (8, 33), generator=generator)
        loss = training_loss(model, tokens, mtp_loss_weight=1.0, balance_loss_weight=0.0)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    tokens = torch.randint(0, 97, (64, 33), generator=generator)
    loss = training_loss(model, tokens, mtp_loss_weight=1.0, balance_loss_weight=0.0)
    assert loss.mtp > 4.5  # ln 97 = 4.57; a copier would be near 0


def test_transformers_without_groups_is_wrong():
    """transformers crashes on n_group null, which older configs have; we read null as one group."""
    from baleen.config import model_config_from_hf

    null = {"n_group": None, "topk_group": None}
    config = model_config_from_hf({"model_type": "deepseek_v3", **null, "n_shared_experts": None})
    assert (config.n_group, config.topk_group, config.n_shared_experts) == (1, 1, 0)

    def run(**groups):
        small = {"vocab_size": 97, "hidden_size": 8, "num_hidden_layers": 1, "first_k_dense_replace": 0}
        experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
        twin = DeepseekV3ForCausalLM(DeepseekV3Config(**small, **experts, **groups, experts_implementation="eager"))
        return twin(torch.zeros(1, 4, dtype=torch.long)).logits

    assert run(n_group=1, topk_group=1).shape == (1, 4, 97)
    with pytest.raises(TypeError, match="unsupported operand .* for //: 'int' and 'NoneType'"):
        run(**null)


def test_transformers_mask_is_ours():
    """The oracle's causal mask is the plain one that `is_causal` stands for."""
    config = DeepseekV3Config(num_hidden_layers=1, attn_implementation="eager")
    x = torch.zeros(1, 5, 8)
    mask = create_causal_mask(config, x, None, past_key_values=None, position_ids=torch.arange(5)[None])
    assert torch.equal(mask[0, 0] == 0, torch.ones(5, 5).tril().bool())
