"""What test_schedules.py starts with torchrun: PyTorch's schedules as Team runs them, over stages that only sleep.

    drive_schedules.py MICRO_BATCHES

Rank 0 prints one JSON object: {"seconds": SECONDS, "ranks": {schedule: [{"ops": [[kind, stage, micro_batch, start,
end], ...], "peak": n}, of each rank]}}. The clock is the machine's one monotonic one; `peak` counts the micro-batches
of which autograd held something at once.
"""

import json
import sys
import time
import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from baleen.parallel.mesh import STAGES_PER_RANK
from baleen.parallel.team import TORCH_SCHEDULES

SECONDS = {"F": 0.4, "B": 0.8, "I": 0.4, "W": 0.4}


class Live:
    """Counts of what the backward waits for."""

    now = peak = 0

    def add(self, number: int) -> None:
        self.now += number
        self.peak = max(self.peak, self.now)


class Part(nn.Module):
    """One tensor that autograd keeps for the backward, counted from its making to its end."""

    def __init__(self, live: Live):
        super().__init__()
        self.live, self.linear, self.scale = live, nn.Linear(2, 2), nn.Parameter(torch.ones(2))

    def forward(self, x):
        kept = x * self.scale
        self.live.add(1)
        weakref.finalize(kept, self.live.add, -1)
        return self.linear(kept)


class SleepingStage(PipelineStage):
    """Notes when each operation ran, and takes as long as SECONDS says."""

    ops: list
    slowness = 1.0

    def _note(self, kind, micro_batch, run, *args, **kwargs):
        start = time.monotonic()
        out = run(*args, **kwargs)
        time.sleep(max(0.0, start + self.slowness * SECONDS[kind] - time.monotonic()))
        self.ops.append([kind, self.stage_index, micro_batch, start, time.monotonic()])
        return out

    def forward_one_chunk(self, m, *args, **kwargs):
        return self._note("F", m, super().forward_one_chunk, m, *args, **kwargs)

    def backward_one_chunk(self, m, loss=None, full_backward=True, **kwargs):
        kind = "B" if full_backward else "I"
        return self._note(kind, m, super().backward_one_chunk, m, loss, full_backward, **kwargs)

    def backward_weight_one_chunk(self, m, **kwargs):
        return self._note("W", m, super().backward_weight_one_chunk, m, **kwargs)


def step_of(name: str, micro_batches: int) -> list:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    count = ranks * STAGES_PER_RANK[name]
    here = [rank, count - 1 - rank] if count > ranks else [rank]
    live, x = Live(), torch.ones(1, 2, requires_grad=True)
    stages = [SleepingStage(Part(live), s, count, torch.device("cpu"), input_args=x, output_args=x) for s in here]
    kind = get_schedule_class(TORCH_SCHEDULES[name])
    schedule = kind(
        stages if issubclass(kind, PipelineScheduleMulti) else stages[0],
        n_microbatches=micro_batches,
        loss_fn=lambda out, target: out.sum(),
        scale_grads=False,
    )
    ops: list = []
    for slowness in (0.0, 1.0):  # the first time connections are made
        live.peak, ops = live.now, []
        for stage in stages:
            stage.ops, stage.slowness = ops, slowness
        dist.barrier()
        target = torch.zeros(micro_batches, 2) if count - 1 in here else None
        arguments = [torch.ones(micro_batches, 2)] if rank == 0 else []
        schedule.step(*arguments, target=target, return_outputs=False)
    every = [None] * ranks
    dist.all_gather_object(every, {"ops": ops, "peak": live.peak})
    return every


def main() -> None:
    dist.init_process_group("gloo")
    told = {name: step_of(name, int(sys.argv[1])) for name in TORCH_SCHEDULES}
    if dist.get_rank() == 0:
        print(json.dumps({"seconds": SECONDS, "ranks": told}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
