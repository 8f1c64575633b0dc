"""Recomputation changes what is kept and no number."""

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from baleen.data.loader import Loader
from baleen.data.packing import PackedTokens
from baleen.model.attention import RMSNorm
from baleen.model.moe import SwiGLU
from baleen.parallel.recompute import recompute
from baleen.recipe import Recipe
from baleen.train.fp8 import use_fp8
from baleen.train.loss import Objective
from baleen.train.trainer import Trainer

V3 = ("norm", "up_projection", "swiglu")


def passed(model, precision, tokens, documents=None):
    loss = Objective(0.3, 1e-2, precision).of_model(model, tokens, documents, None).total
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize(
    ("precision", "kinds"),
    [("fp64", V3), ("bf16", V3), ("fp8", V3), *(("fp32", kinds) for kinds in (V3, *((kind,) for kind in V3)))],
)
def test_loss_and_gradients_are_the_same_bits(tiny_model, precision, kinds):
    tokens, documents = torch.randint(97, (2, 13)), torch.arange(13).expand(2, 13) // 5
    for ids in (None, documents):
        models = [tiny_model(dtype=torch.float64 if precision == "fp64" else torch.float32) for _ in range(2)]
        for model in models if precision == "fp8" else ():
            use_fp8(model)
        recompute(models[1], kinds)
        told = [passed(model, "fp32" if precision == "fp64" else precision, tokens, ids) for model in models]
        assert all(a.equal(b) for a, b in zip(*told, strict=True))


def still_kept(model):
    """Names of the chosen modules' outputs that live between forward and backward."""
    outputs = []
    for name, module in model.named_modules():
        inside = ".layers." in name and not name.endswith(("enorm", "hnorm", "shared_head.norm"))  # not in its forward
        if inside and (isinstance(module, RMSNorm | SwiGLU) or name.endswith(("q_b_proj", "kv_b_proj"))):
            module.register_forward_hook(
                lambda m, x, out, name=name: outputs.append((name, StorageWeakRef(out.untyped_storage())))
            )
    loss = Objective(0.3, 1e-2, "fp32").of_model(model, torch.randint(97, (2, 13)), None, None).total
    alive = {name for name, storage in outputs if not storage.expired()}
    loss.backward()
    return len(outputs), alive


def test_a_trainer_lets_go_what_its_recipe_names(tiny_model):
    model = tiny_model()
    count, alive = still_kept(model)
    assert count == 4 * 6 + 1 + 2 * 3  # 4 norms and 2 projections a layer; SwiGLU once in an MLP, twice in an MoE
    assert len(alive) == count - 4  # what kv_a_layernorm gives is copied into the latents

    train = {"tokens": 256, "batch_tokens": 64, "seq_len": 16, "lr": 1e-3}
    recipe = {"model": model.config.model_dump(), "train": train, "parallel": {"recompute": V3}}
    loader = Loader(PackedTokens(16, np.zeros(65, dtype=np.int32), np.zeros(65, dtype=np.int32)), seed=0)
    Trainer(Recipe.model_validate(recipe), model, loader)
    assert still_kept(model) == (count, set())


def test_what_is_kept_is_counted(tiny_model, tiny_config):
    B, T, cfg = 2, 16, tiny_config(num_nextn_predict_layers=0)

    def noted(kinds):
        model, sizes = tiny_model(num_nextn_predict_layers=0), {}
        recompute(model, kinds, lambda x: sizes.__setitem__(x.untyped_storage()._cdata, x.untyped_storage().nbytes()))
        Objective(0.0, 0.0, "fp32").of_model(model, torch.randint(97, (B, T + 1)), None, None).total.backward()
        return sum(sizes.values())

    heads = cfg.num_attention_heads
    ups = heads * cfg.qk_head_dim + heads * (cfg.qk_nope_head_dim + cfg.v_head_dim)
    ups += heads * cfg.qk_rope_head_dim  # the queries' part that is rotated
    assert noted(()) - noted(("up_projection",)) == 4 * B * T * cfg.num_hidden_layers * ups
