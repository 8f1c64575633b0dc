"""What test_dryrun.py starts with torchrun: one step of ranks that share experts, over gloo, its bytes counted.

    drive_traffic.py wide|fp8

Every expert gets as many tokens as any other. Rank 0 prints one JSON object: {"leaving": bytes that all ranks sent to
other ranks by all-to-all, "loss": the step's}.
"""

import json
import sys

import torch
import torch.distributed as dist

from baleen.config import ModelConfig
from baleen.model.moe import Routing
from baleen.model.transformer import Transformer
from baleen.parallel.dryrun import Traffic
from baleen.parallel.mesh import make_grid
from baleen.parallel.team import join
from baleen.parallel.worker import MicroBatch
from baleen.recipe import ParallelConfig
from baleen.train.loss import Objective

B, T = 8, 16  # tokens times experts of each, T or T - 1 in a sequence, divide by the experts
MODEL = {
    "vocab_size": 97, "hidden_size": 256, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "max_position_embeddings": 64, "initializer_range": 0.05,
}  # fmt: skip


def by_turns(gate, arguments, routing):
    """Experts one after the other, instead of the gate's choice."""
    indices = torch.arange(routing.indices_NK.numel()).view_as(routing.indices_NK) % gate.config.n_routed_experts
    return Routing(indices, routing.scores_NE.gather(-1, indices), routing.scores_NE)


def main(dispatch: str) -> None:
    dist.init_process_group("gloo")
    config, ranks = ModelConfig(**MODEL), dist.get_world_size()
    parallel = ParallelConfig(expert=ranks, dispatch=dispatch)
    model = Transformer(config)
    model.init_weights(0)
    team = join(model, parallel, make_grid(parallel, config, ranks))
    for gate in team.gates.values():
        gate.register_forward_hook(by_turns)
    tokens = torch.randint(97, (B, T + 1), generator=torch.Generator().manual_seed(dist.get_rank()))
    with Traffic() as traffic:
        totals = team.accumulate([MicroBatch(tokens, None, None, 1 / ranks)], Objective(0.3, 1e-4, "fp32"))
    leaving = torch.tensor(traffic.leaving["alltoall_base"], dtype=torch.float64)
    dist.all_reduce(leaving)
    if dist.get_rank() == 0:
        print(json.dumps({"leaving": leaving.item(), "loss": totals.main}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
