"""One training step to be costed: which network, on what, cut how, over how many tokens."""

from __future__ import annotations

from pydantic import Field

from baleen.config import Positive, Strict
from baleen.cost.architecture import Architecture
from baleen.cost.hardware import Hardware
from baleen.cost.kernels import Attention
from baleen.cost.layout import Layout


class Workload(Strict):
    """One training step of a network on devices. `global_batch` in sequences."""

    arch: Architecture
    hardware: Hardware
    layout: Layout
    precision: str = "bf16"
    seq_len: Positive
    global_batch: Positive
    mtp: bool = False  # whether the MTP modules train along
    attention: Attention = "native"
    eager: bool = False  # operator by operator: neither compiled nor with a framework's fused kernels
    balanced_routing: bool = False  # experts forced to equal load, as in benchmarks
    node_limit: int | None = Field(None, ge=1)  # most nodes a token is sent to (V3: 4)

    @property
    def tokens(self) -> int:
        return self.global_batch * self.seq_len

    @property
    def storage(self) -> str:
        """How weights and activations are kept: PyTorch on a CPU multiplies in BF16 over FP32 weights (autocast)."""
        return "autocast" if self.hardware.is_cpu and self.precision == "bf16" else self.precision

    @property
    def micro_batches(self) -> float:
        """Micro-batches of one pipeline; a fraction where a published batch does not divide."""
        return max(1.0, self.global_batch / (self.layout.data * self.layout.micro_batch))
