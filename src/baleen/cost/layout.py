"""How a run is cut over devices: parallel degrees, schedule, sharding, recomputation; and the free text of papers."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import ValidationError, model_validator

from baleen.config import Count, Positive, Strict, UserError

Schedule = Literal["1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"]
# none: keep all activations; selective: recompute attention's core (arXiv 2205.05198), as FlashAttention does anyway;
# operators: elementwise operators and every second matmul (torchtitan's SAC); full: keep only the layers' inputs;
# deepseek: recompute norms, MLA up-projections and SwiGLU, keep linear inputs in FP8 (2412.19437 §3.2.3, §3.3.3);
# modules: recompute the same over PyTorch's operators, as `parallel.recompute` does: nothing in FP8, and what the
# experts made is kept, to weigh it.
Recompute = Literal["none", "selective", "operators", "full", "deepseek", "modules"]


class Layout(Strict):
    """Parallel degrees of a run over `devices`. Data parallelism is what remains.

    Experts are spread over the ranks of one pipeline stage. `zero` 1 shards optimizer state, 2 gradients too,
    3 weights too (FSDP), over `shard` data-parallel ranks (0: all of them; less: HSDP).
    """

    devices: Positive
    tensor: Positive = 1
    pipeline: Positive = 1
    context: Positive = 1
    expert: Positive = 1
    virtual_stages: Positive = 1  # model chunks a pipeline rank holds
    schedule: Schedule = "1f1b"
    zero: Literal[0, 1, 2, 3] = 1
    shard: Count = 0
    sequence_parallel: bool = True
    recompute: Recompute = "selective"
    micro_batch: Positive = 1  # sequences

    @model_validator(mode="after")
    def _divides(self) -> Layout:
        cut = self.tensor * self.pipeline * self.context
        if self.devices % cut:
            near = max(cut, round(self.devices / cut) * cut)
            raise ValueError(
                f"{self.devices} devices do not divide into TP{self.tensor} x PP{self.pipeline} x CP{self.context} "
                f"= {cut}; the nearest number that does is {near}"
            )
        if self.stage_ranks % self.expert:
            raise ValueError(
                f"a pipeline stage has {self.stage_ranks} ranks, which do not divide into EP{self.expert}; "
                f"take an expert degree that divides {self.stage_ranks}"
            )
        if self.shard and self.data % self.shard:
            raise ValueError(f"{self.data} data-parallel ranks do not divide into shards of {self.shard}")
        return self

    @property
    def data(self) -> int:
        return self.devices // (self.tensor * self.pipeline * self.context)

    @property
    def stage_ranks(self) -> int:
        return self.devices // self.pipeline

    @property
    def shard_ranks(self) -> int:
        """Ranks over which ZeRO spreads what it shards; context-parallel ranks hold the same weights too."""
        return (self.shard or self.data) * self.context

    @property
    def chunks(self) -> int:
        """Parts the model is cut into along the pipeline. DualPipeV folds a pipeline of twice its ranks."""
        folded = self.schedule == "dualpipev" and self.pipeline > 1
        return self.pipeline * (2 if folded else self.virtual_stages)

    @property
    def overlaps(self) -> bool:
        """Whether the schedule runs a forward and a backward as one, each hiding the other's all-to-all."""
        return self.pipeline > 1 and self.schedule in ("dualpipe", "dualpipev")

    @property
    def copies(self) -> int:
        """How many times the weights are held along the pipeline: DualPipe's ranks hold a stage of each direction."""
        return 2 if self.pipeline > 1 and self.schedule == "dualpipe" else 1

    @property
    def expert_replicas(self) -> int:
        return self.stage_ranks // self.expert

    def micro_batches(self, global_batch: int) -> int:
        """Micro-batches a pipeline runs for `global_batch` sequences. Raises UserError if they do not divide."""
        step = self.data * self.micro_batch
        if global_batch % step:
            nearest = max(1, round(global_batch / step)) * step
            raise UserError(
                f"a batch of {global_batch} sequences does not divide over {self.data} data-parallel ranks with "
                f"micro-batches of {self.micro_batch}; the nearest that does is {nearest}"
            )
        return global_batch // step

    def __str__(self) -> str:
        degrees = {"TP": self.tensor, "PP": self.pipeline, "VP": self.virtual_stages, "CP": self.context}
        text = [
            f"{name}{value}" for name, value in {**degrees, "EP": self.expert, "DP": self.data}.items() if value > 1
        ]
        text.append({0: "DDP", 1: "ZeRO1", 2: "ZeRO2", 3: "FSDP"}[self.zero])
        return " ".join([*text, *([self.schedule] if self.pipeline > 1 else []), f"recompute-{self.recompute}"])


def make_layout(devices: int, **fields: object) -> Layout:
    """A layout from a user's numbers: as Layout(...), but a fault is a UserError."""
    try:
        return Layout(devices=devices, **fields)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"layout: {where}: {message}" if where else f"layout: {message}") from None


class StatedLayout(Strict):
    """What a publication says of its layout; None where it is silent."""

    tensor: Positive | None = None
    pipeline: Positive | None = None
    context: Positive | None = None
    data: Positive | None = None
    expert: Positive | None = None
    virtual_stages: Positive | None = None
    schedule: Schedule | None = None
    zero: Literal[0, 1, 2, 3] | None = None
    shard: Positive | None = None
    recompute: Recompute | None = None
    sequence_parallel: bool | None = None
    micro_batch: Positive | None = None
    compiled: bool | None = None

    @property
    def states_degrees(self) -> bool:
        return any(v is not None for v in (self.tensor, self.pipeline, self.data, self.expert, self.zero))


_DEGREES = {
    "tensor": r"TP|T",
    "pipeline": r"PP",
    "context": r"CP",
    "data": r"DP",
    "expert": r"EP",
    "virtual_stages": r"VP",
}
_RECOMPUTE = {
    "full": r"full (?:recompute|recomputation|ckpt|AC|activation checkpointing)|(?<!no )\bckpt\b",
    "none": r"no (?:recompute|recomputation|ckpt|AC|activation checkpointing)",
    "operators": r"\bSAC\b",
    "selective": r"selective",
}


def parse_layout(text: str) -> StatedLayout:
    """The free text of a paper ('TP8 SP PP8 selective', 'FSDP32 TP8 full AC', 'PP16 EP64 ZeRO1 DualPipe').

    Words it does not know say nothing: unlike a recipe, the text was not written for us.
    """
    found: dict[str, object] = {}
    for field, name in _DEGREES.items():
        match = re.search(rf"(?<![a-z])(?:{name})[ =]?(\d+)", text, re.I)
        if match:
            found[field] = int(match[1])
    for recompute, pattern in _RECOMPUTE.items():
        if re.search(pattern, text, re.I):
            found["recompute"] = recompute
            break
    micro = re.search(r"(?<![a-z])MBS[ =]?(\d+)", text, re.I)
    if micro:
        found["micro_batch"] = int(micro[1])
    elif re.search(r"_mbc\d+", text):
        found["micro_batch"] = 1  # SimuMax's names count micro-batches, of one sequence where they say no more
    zero = re.search(r"ZeRO[- ]?(\d)", text, re.I)
    sharded = re.search(r"\b(?:FSDP|HSDP|FSDP2)[ =]?(\d*)\b", text)
    if zero:
        found["zero"] = int(zero[1])
    elif sharded:
        found["zero"] = 3
        if sharded[1]:
            found["shard"] = int(sharded[1])
        elif "HSDP" in text:
            found["shard"] = 8
    elif re.search(r"\bDDP\b", text):
        found["zero"] = 0
    for schedule in ("dualpipev", "dualpipe", "zb1p", "interleaved", "1f1b"):
        if schedule in text.lower():
            found["schedule"] = schedule
            break
    if found.get("schedule") in ("dualpipe", "dualpipev"):
        found.setdefault("recompute", "deepseek")  # the schedule is published with it (2412.19437 §3.2)
    if re.search(r"\bSP\b", text):
        found["sequence_parallel"] = True
    if "compile" in text:
        found["compiled"] = True
    return StatedLayout.model_validate(found)
