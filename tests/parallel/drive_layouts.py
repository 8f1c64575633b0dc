"""What test_layouts.py starts: trains one small model in many layouts, and continues each in the others.

    drive_layouts.py FOLDER fp64|fp32|bf16 LAYOUT...

A layout is a [parallel] section as JSON whose `world` says how many processes it takes. Prints one JSON object:
{layout: [what each rank tells]}, where a rank tells {"rows": rows, "biases": {gate: numbers}, "restored": {source:
distance}, "continued": {source: rows}}. A row is [loss, MTP loss, balance loss, norm of the gradient]. A distance is
that of what a source's checkpoint brings back to this rank from what the first layout's does.

The processes of a layout are forked from this one, which has imported all they need, and end with it: each process
group of gloo has threads that wake a hundred times a second.
"""

import json
import os
import socket
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from baleen.data.loader import Loader
from baleen.data.packing import PackedTokens
from baleen.model.transformer import Transformer
from baleen.parallel.mesh import make_grid
from baleen.parallel.ranks import Ranks, joined
from baleen.parallel.team import join
from baleen.parallel.worker import Alone
from baleen.recipe import Recipe
from baleen.train import checkpoint
from baleen.train.saver import Saver, TeamSaver
from baleen.train.trainer import Trainer

STEPS, SAVED_AT, CONTINUED = 20, 3, 2
SEQUENCES = 16  # in a batch
MODEL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 4,
    "num_attention_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
TRAIN = {
    "tokens": 100 * SEQUENCES * 16, "batch_tokens": SEQUENCES * 16, "seq_len": 16, "lr": 1e-3, "clip_norm": 0.5,
    "balance_loss_weight": 1e-2, "bias_update_speed": 0.01, "ema_decay": 0.9, "document_mask": True,
}  # fmt: skip


def trainer(layout: str, precision: str) -> Trainer:
    parallel = json.loads(layout)
    # pipelines fill with micro-batches; elsewhere two show what is done once a step
    micro_batch = 2 if "pipeline" in parallel else SEQUENCES // parallel["world"] // 2
    train = {**TRAIN, "micro_batch_size": micro_batch, "precision": "bf16" if precision == "bf16" else "fp32"}
    recipe = Recipe.model_validate({"model": MODEL, "train": train, "parallel": parallel})
    world = recipe.parallel.world
    with torch.device("meta" if world > 1 else "cpu"):
        model = Transformer(recipe.model).to(torch.float64 if precision == "fp64" else torch.float32)
    grid = make_grid(recipe.parallel, recipe.model, world)
    worker = Alone(model) if world == 1 else join(model, recipe.parallel, grid, torch.device("cpu"))
    worker.init_weights(0)
    rank, ranks = worker.data_rank, worker.data_ranks
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 97, 16 * 400 + 1, dtype=np.int32)
    documents = np.cumsum(rng.random(len(tokens)) < 0.1, dtype=np.int32)  # of ten tokens each, the mean
    loader = Loader(PackedTokens(16, tokens, documents), seed=0, rank=rank, world_size=ranks)
    return Trainer(recipe, worker, loader)


def step(it: Trainer) -> list[float]:
    told = it.step()
    return [told.loss, told.mtp_loss, told.balance_loss, told.grad_norm]


def train(ranks: Ranks, folder: Path, layout: str, precision: str) -> dict:
    it, rows, keys = trainer(layout, precision), [], {"keep": 1, "warn": print}
    of_team = {"ranks": ranks, "timeout_seconds": 60.0}
    saver = TeamSaver(folder / layout, **keys, **of_team) if ranks.world > 1 else Saver(folder / layout, **keys)
    for number in range(1, STEPS + 1):
        rows.append(step(it))
        if number == SAVED_AT:
            saver.save(it.checkpoint())  # by several processes, written while the next steps change the weights
    saver.settle(wait=True)
    gates = it.worker.gates.items()
    return {"rows": rows, "biases": {place: gate.e_score_correction_bias.tolist() for place, gate in gates}}


def continue_all(ranks: Ranks, folder: Path, layout: str, precision: str, sources: list[str]) -> dict:
    """Restores each of `sources` into one trainer, and goes on from the first, and from one other, for some steps.

    That other lies as far from the first as this layout from the last: all get their turn.
    """
    it, told = trainer(layout, precision), {"restored": {}, "continued": {}}
    turn, first = sources[-1 - sources.index(layout)], {}
    for source in sources:
        it.restore(checkpoint.load_newest(folder / source, print))
        held = state(it)
        first = first or held
        assert held.keys() == first.keys()
        told["restored"][source] = max(distance(held[name], first[name]) for name in held)
        if source in (sources[0], turn):
            told["continued"][source] = [step(it) for _ in range(CONTINUED)]
    return told


def state(it: Trainer) -> dict[str, Tensor]:
    """Copies of what a checkpoint brings back, as far as it lies here."""
    groups = {"model": it.worker.tensors(), "optimizer": it.optimizer.state_tensors(), "ema": it.ema}
    named = {f"{group}/{name}": t.clone() for group, tensors in groups.items() for name, t in tensors.items()}
    counts = it.counters.step, it.counters.tokens, it.counters.skipped, it.loader.state_dict()["position"]
    return named | {"counts": torch.tensor(counts, dtype=torch.float64)}


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest number of b."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() if b.numel() else 0.0


def on_ranks(task, folder: Path, layout: str, *arguments) -> list[dict]:
    """What `task` tells on each rank, run by all of the layout's processes together."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    world = json.loads(layout)["world"]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world))
    start_processes(_rank, (task, folder, layout, *arguments), nprocs=world, start_method="fork")
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(world)]


def _rank(rank: int, task, folder: Path, *arguments) -> None:
    os.environ["RANK"] = str(rank)
    with joined(120.0) as ranks:
        (folder / f"told-{rank}.json").write_text(json.dumps(task(ranks, folder, *arguments)))


def main(folder: Path, precision: str, layouts: list[str]) -> None:
    told = {layout: on_ranks(train, folder, layout, precision) for layout in layouts}
    for layout in layouts if precision == "fp64" else []:
        for rank, more in zip(told[layout], on_ranks(continue_all, folder, layout, precision, layouts), strict=True):
            rank |= more
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
