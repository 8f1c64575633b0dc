"""What a layer computes again in its backward instead of keeping it, as time."""

from __future__ import annotations

from baleen.cost.kernels import Kernels, Seconds
from baleen.cost.workload import Workload

# Share of the forward that is computed again in the backward: matmul, grouped, attention, elementwise.
_RECOMPUTED = {
    "none": (0.0, 0.0, 0.0, 0.0),
    "selective": (0.0, 0.0, 1.0, 0.0),
    "operators": (0.4, 0.5, 0.0, 1.0),
    "full": (1.0, 1.0, 1.0, 1.0),
    "deepseek": (0.0, 0.0, 0.0, 0.8),  # norms and SwiGLU; MLA's up-projections besides
    "modules": (0.0, 0.0, 0.0, 0.8),
}
MLA_UP_PROJECTIONS = 0.25  # of the dense products of a V3 layer


def with_recomputation(k: Kernels, work: Workload) -> Kernels:
    matmul, grouped, attention, elementwise = _RECOMPUTED[work.layout.recompute]
    if work.layout.recompute == "selective" and work.attention != "unfused":
        attention = 0.0  # the fused kernel's backward does it already
    if work.layout.recompute in ("deepseek", "modules") and work.arch.is_latent:
        matmul = MLA_UP_PROJECTIONS
    again = [
        Seconds(0.0, share * part.forward)
        for share, part in zip(
            (matmul, grouped, attention, elementwise), (k.matmul, k.grouped, k.attention, k.elementwise), strict=True
        )
    ]
    return k + Kernels(*again, weight_gradient=0.0, grouped_weight_gradient=0.0)
