"""Decoding on a GPU: the kernels of a step are captured once for each shape, then launched together (CUDA graphs).

A step of one token a sequence is some forty small kernels a layer, whose launches take longer than they do.

Not captured are prompts, drafts and steps that check drafts. Shapes: B sequences, rounded up to a power of two; P pages
of each, to such a power or three quarters of it; K experts of a token, d hidden.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from baleen.infer.runner import Result, TorchRunner
from baleen.model.cache import Batch, LatentPages, padded
from baleen.model.transformer import Transformer

MAX_BATCH = 256  # sequences beyond which launching is no longer what takes the time
WORTH_IT = 8  # steps of a shape that are launched one by one before it is captured, which takes as long as several
Step = Callable[[Tensor, Tensor], list[Tensor]]


class GraphRunner(TorchRunner):
    """As `TorchRunner`, but that a step of one token a sequence replays the graph of its shape.

    Surplus rows of a graph are the last sequence once more: they write what it writes, and nobody reads what they say.
    """

    def __init__(self, model: Transformer, pages: LatentPages):
        super().__init__(model, pages)
        self._graphs: dict[tuple[int, int], Step] = {}
        self._met: Counter[tuple[int, int]] = Counter()
        self._pool: Any = None  # of memory, for all graphs: one runs at a time

    def forward(self, batch: Batch) -> Result:
        if max(batch.counts) > 1 or len(batch.counts) > MAX_BATCH:
            return super().forward(batch)
        count, size = len(batch.counts), self.pages.page_size
        B = _power_of_two(count)
        P = _rounded(max(start // size + 1 for start in batch.starts))
        self._met[B, P] += 1
        if self._met[B, P] <= WORTH_IT:
            return super().forward(batch)
        surplus = [-1] * (B - count)
        rows = [*range(count), *surplus]
        numbers_3B = torch.tensor(
            [
                [batch.tokens[row] for row in rows],
                [batch.starts[row] for row in rows],
                [batch.tables[row][batch.starts[row] // size] * size + batch.starts[row] % size for row in rows],
            ]
        ).to(self.model.device)
        tables_BP = torch.tensor([padded(batch.tables[row], P) for row in rows]).to(self.model.device)
        if (B, P) not in self._graphs:
            self._graphs[B, P] = self.capture(self._step, numbers_3B, tables_BP)
        hidden_Bd, *experts = self._graphs[B, P](numbers_3B, tables_BP)
        return Result(hidden_Bd[:count], [of_layer[:count] for of_layer in experts])

    def _step(self, numbers_3B: Tensor, tables_BP: Tensor) -> list[Tensor]:
        tokens_B, positions_B, slots_B = numbers_3B
        output = self.model(tokens_B[None], cache=self.pages.decoding_view(positions_B, slots_B, tables_BP))
        return [output.hidden_BTd[0], *(routing.indices_NK for routing in output.routings)]

    def capture(self, step: Step, *like: Tensor) -> Step:
        """`step` as a graph for inputs of these shapes. What it returns is the caller's to keep."""
        inputs = [tensor.clone() for tensor in like]
        with torch.cuda.device(self.model.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # what is only done the first time may not be captured
                step(*inputs)
            torch.cuda.current_stream().wait_stream(side)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                outputs = step(*inputs)

        def replay(*new: Tensor) -> list[Tensor]:
            for kept, tensor in zip(inputs, new, strict=True):
                kept.copy_(tensor)
            graph.replay()
            return [output.clone() for output in outputs]

        return replay


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _rounded(n: int) -> int:
    """Up to a power of two, or three quarters of one."""
    power = _power_of_two(n)
    return power * 3 // 4 if n <= power * 3 // 4 else power
