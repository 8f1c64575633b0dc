"""What test_dryrun.py starts with torchrun: one step of ranks that share experts, over gloo, its bytes counted.

    drive_traffic.py wide|fp8
    drive_traffic.py 1f1b|dualpipev

Every expert gets as many tokens as any other. Rank 0 prints one JSON object: {"leaving": bytes that all ranks sent to
other ranks by all-to-all, "loss": the step's}. With a schedule, which pairs of the ranks run as a pipeline, it is
{"ranks": [{"whole", "held", "buffers", "sent": {collective: bytes}} of each]}: bytes of its stages' weights before and
after they are sharded, of the buffers that its stages receive into, and of a step of MICRO_BATCHES.
"""

import json
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from baleen.config import ModelConfig
from baleen.model.moe import Routing
from baleen.model.transformer import Transformer
from baleen.parallel.dryrun import Traffic
from baleen.parallel.mesh import make_grid
from baleen.parallel.team import Team, join
from baleen.parallel.worker import MicroBatch
from baleen.recipe import ParallelConfig
from baleen.train.loss import Objective

B, T = 8, 16  # tokens times experts of each, T or T - 1 in a sequence, divide by the experts
MICRO_BATCHES = 4
MODEL = {
    "vocab_size": 97, "hidden_size": 256, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "max_position_embeddings": 64, "initializer_range": 0.05,
}  # fmt: skip
OBJECTIVE = Objective(0.3, 1e-4, "fp32")


def by_turns(gate, arguments, routing):
    """Experts one after the other, instead of the gate's choice."""
    indices = torch.arange(routing.indices_NK.numel()).view_as(routing.indices_NK) % gate.config.n_routed_experts
    return Routing(indices, routing.scores_NE.gather(-1, indices), routing.scores_NE)


def team_of(parallel: ParallelConfig) -> Team:
    config = ModelConfig(**MODEL)
    model = Transformer(config)
    model.init_weights(0)
    return join(model, parallel, make_grid(parallel, config, dist.get_world_size()))


def tokens_of(rank: int) -> Tensor:
    return torch.randint(97, (B, T + 1), generator=torch.Generator().manual_seed(rank))


def pipeline(schedule: str) -> None:
    team = team_of(ParallelConfig(pipeline=2, zero=1, schedule=schedule))
    shares = torch.full((2 + team.config.num_nextn_predict_layers,), 1 / MICRO_BATCHES / team.data_ranks)
    step = [MicroBatch(rows, None, None, shares) for rows in tokens_of(team.data_rank).chunk(MICRO_BATCHES)]
    for _ in range(2):  # the first step makes connections; of the second it counts
        with Traffic() as traffic:
            team.accumulate(step, OBJECTIVE)
    _, made = team._made
    stages = getattr(made, "_stages", None) or [made._stage]
    received = [*(s.args_recv_info for s in stages), *(s.grad_recv_info for s in stages)]
    buffers = [info.buffer for of_stage in received for infos in of_stage.values() for info in infos]
    told = {
        "whole": 4 * sum(p.numel() for p in team._whole.values()),
        "held": 4 * sum(p.numel() for p in team.parameters.values()),
        "buffers": sum(4 * buffer.numel() for buffer in buffers if buffer is not None),
        "sent": dict(traffic.bytes),
    }
    every = [{}] * dist.get_world_size()
    dist.all_gather_object(every, told)
    if dist.get_rank() == 0:
        print(json.dumps({"ranks": every}), flush=True)


def experts(dispatch: str) -> None:
    ranks = dist.get_world_size()
    team = team_of(ParallelConfig(expert=ranks, dispatch=dispatch))
    for gate in team.gates.values():
        gate.register_forward_hook(by_turns)
    tokens = tokens_of(dist.get_rank())
    with Traffic() as traffic:
        shares = torch.full((2 + team.config.num_nextn_predict_layers,), 1 / ranks)
        totals = team.accumulate([MicroBatch(tokens, None, None, shares)], OBJECTIVE)
    leaving = torch.tensor(traffic.leaving["alltoall_base"], dtype=torch.float64)
    dist.all_reduce(leaving)
    if dist.get_rank() == 0:
        print(json.dumps({"leaving": leaving.item(), "loss": totals.main}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    (experts if sys.argv[1] in ("wide", "fp8") else pipeline)(sys.argv[1])
    dist.destroy_process_group()
