"""What test_layouts.py starts with torchrun: trains one small model in many layouts, and continues each in the others.

    drive_layouts.py FOLDER LAYOUT...     a layout is a [parallel] section as JSON

Rank 0 prints one JSON object: {"reference": rows, "layouts": {layout: {"rows": ..., "bias_equal": ..., "continued":
{source: rows}}}}. A row is [loss, MTP loss, balance loss, norm of the gradient].
"""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from baleen.data.loader import Loader
from baleen.data.packing import PackedTokens
from baleen.model.transformer import Transformer
from baleen.parallel import team
from baleen.parallel.mesh import make_grid
from baleen.parallel.ranks import joined
from baleen.parallel.team import join
from baleen.recipe import Recipe
from baleen.train import checkpoint
from baleen.train.saver import TeamSaver
from baleen.train.trainer import Trainer

# A layout's process groups are made once: each has threads of its own, and none ends before the process.
team.Mesh = functools.cache(team.Mesh)

STEPS, SAVED_AT, CONTINUED = 20, 3, 2
MODEL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 5,
    "num_attention_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
TRAIN = {
    "tokens": 16 * 16 * 100, "batch_tokens": 16 * 16, "seq_len": 16, "micro_batch_size": 2, "lr": 1e-3,
    "clip_norm": 0.5, "balance_loss_weight": 1e-2, "bias_update_speed": 0.01, "ema_decay": 0.9, "precision": "fp32",
}  # fmt: skip


def trainer(parallel: dict | None, world: int, dtype: torch.dtype) -> Trainer:
    recipe = Recipe.model_validate({"model": MODEL, "train": TRAIN, "parallel": parallel or {}})
    model = Transformer(recipe.model).to(dtype)
    model.init_weights(0)
    worker = (
        model if parallel is None else join(model, recipe.parallel, make_grid(recipe.parallel, recipe.model, world))
    )
    tokens = np.random.default_rng(0).integers(0, 97, 16 * 400 + 1, dtype=np.int32)
    rank, ranks = (0, 1) if parallel is None else (worker.data_rank, worker.data_ranks)
    loader = Loader(PackedTokens(16, tokens, np.zeros_like(tokens)), seed=0, rank=rank, world_size=ranks)
    return Trainer(recipe, worker, loader)


def step(it: Trainer) -> list[float]:
    told = it.step()
    return [told.loss, told.mtp_loss, told.balance_loss, told.grad_norm]


def main(folder: Path, layouts: list[str], dtype: torch.dtype) -> None:
    with joined(120.0) as ranks:
        alone = trainer(None, 1, dtype)
        reference = [step(alone) for _ in range(STEPS)]
        biases = {place: gate.e_score_correction_bias for place, gate in alone.worker.gates.items()}
        out = {}
        for layout in layouts:
            it, rows = trainer(json.loads(layout), ranks.world, dtype), []
            saver = TeamSaver(folder / layout, keep=1, warn=print, ranks=ranks)
            for number in range(1, STEPS + 1):
                rows.append(step(it))
                if number == SAVED_AT:
                    saver.save(it.checkpoint())  # written while the next steps change the weights
            saver.settle(wait=True)
            equal = all(gate.e_score_correction_bias.equal(biases[p]) for p, gate in it.worker.gates.items())
            differ = ranks.largest([float(not equal)])[0]
            out[layout] = {"rows": rows, "bias_equal": not differ, "continued": {}}
        for layout in layouts if dtype == torch.float64 else []:
            it = trainer(json.loads(layout), ranks.world, dtype)
            for source in sorted(path.name for path in folder.iterdir()):
                it.restore(checkpoint.load_newest(folder / source, print))
                out[layout]["continued"][source] = [step(it) for _ in range(CONTINUED)]
        if ranks.rank == 0:
            print(json.dumps({"reference": reference, "layouts": out}), flush=True)
        dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[3:], {"fp32": torch.float32, "fp64": torch.float64}[sys.argv[2]])
