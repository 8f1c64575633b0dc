"""The few factors by which real training is slower than its rooflines, each with a prior from the literature.

They are fitted in `baleen.cost.validate` on published runs marked `cal`, never on the run that is predicted, and kept
with their fit in data/calibration.toml; `--set NAME=VALUE` changes one.
"""

from __future__ import annotations

import math
import tomllib
from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import NamedTuple

import tomli_w

from baleen.config import UserError


class Constant(NamedTuple):
    """A factor's prior: its median, the standard deviation of its logarithm, what it is and where that comes from."""

    prior: float
    sigma: float
    meaning: str
    source: str


CONSTANTS = {
    "matmul_ampere": Constant(
        1.10, 0.10, "products inside training against isolated ones, A100", "FF table II: 220 of 253 TFLOPS on PCIe"
    ),
    "matmul_hopper": Constant(
        1.15, 0.10, "the same on H100 (at full power its clock drops)", "arXiv 2407.21783 §3.3; stas00/ml-engineering"
    ),
    "matmul_blackwell": Constant(1.15, 0.15, "the same on B200 and GB200", "as Hopper, newer libraries"),
    "matmul_fp8": Constant(1.00, 0.15, "FP8 products besides: scaling, promotion", "arXiv 2412.19437 §3.3.2"),
    "grouped": Constant(1.00, 0.20, "experts' grouped products against one product of the rows", "DeepGEMM's tables"),
    "attention": Constant(1.10, 0.20, "attention's core in training against its papers' figures", "arXiv 2407.08608"),
    "elementwise": Constant(1.40, 0.20, "streaming kernels against the memory's rate", "arXiv 2007.00072"),
    "eager": Constant(1.60, 0.30, "streaming kernels besides, without compiler or fused kernels", "arXiv 2410.06511"),
    "tensor_exposed": Constant(0.85, 0.25, "share of TP traffic that compute does not hide", "arXiv 2205.05198"),
    "expert_exposed": Constant(0.60, 0.40, "share of experts' all-to-all not hidden", "arXiv 2412.19437 §3.2.1: 1:1"),
    "data_exposed": Constant(0.15, 0.50, "share of gradient and FSDP traffic not hidden", "arXiv 2304.11277"),
    "routing_imbalance": Constant(
        1.10, 0.05, "busiest expert rank over the mean, where nobody forces balance", "V3 §4"
    ),
    "jitter": Constant(0.006, 0.50, "slower per doubling of devices beyond a node", "x 1.05 at 2,048 (2402.15627)"),
    "untuned": Constant(1.10, 0.15, "a layout nobody published against the best that fits", "arXiv 2205.05198: tuning"),
    "vendor": Constant(
        0.92, 0.08, "the maker's own benchmarks: the best of many configurations", "MLPerf's closed rules"
    ),
    "goodput": Constant(0.90, 0.06, "share of a run's hours that trains", "arXiv 2407.21783: >0.90; Olmo 3: 0.91"),
    "untuned_hopper": Constant(1.20, 0.15, "untuned besides on H100: compute outgrew all else", "arXiv 2605.01158"),
}


class Calibration(dict[str, float]):
    """Value of every constant by name."""

    def __init__(self, values: dict[str, float] | None = None):
        super().__init__({name: constant.prior for name, constant in CONSTANTS.items()})
        for name, value in (values or {}).items():
            if name not in CONSTANTS:
                near = get_close_matches(name, CONSTANTS, n=1, cutoff=0.0)[0]
                raise UserError(f"unknown calibration constant {name!r}; did you mean {near!r}?")
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"calibration constant {name} = {value} must be a positive number")
            self[name] = float(value)

    def with_(self, **values: float) -> Calibration:
        return Calibration({**self, **values})


class Fitted(NamedTuple):
    """A fit: constants on all rows, for each source those without it, the fitted rows' ids and the errors it made."""

    constants: Calibration
    without_source: dict[str, Calibration]
    rows: tuple[str, ...]
    errors: dict[str, dict[str, float]]


@cache
def shipped_fit() -> Fitted:
    """What data/calibration.toml holds."""
    path = resources.files("baleen.cost").joinpath("data/calibration.toml")
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    names = raw["without_source"]["names"]
    left_out = {
        source: Calibration(dict(zip(names, values, strict=True)))
        for source, values in raw["without_source"].items()
        if source != "names"
    }
    constants = Calibration({name: entry["value"] for name, entry in raw["constants"].items()})
    return Fitted(constants, left_out, tuple(raw["fit"]["rows"]), raw["fit"]["errors"])


def shipped_calibration() -> Calibration:
    """The constants as fitted on the published runs marked `cal`."""
    return shipped_fit().constants


def fit_to_toml(fitted: Fitted, date: str) -> str:
    """The text of calibration.toml: every constant beside its prior and how far the fit moved it."""
    constants = {}
    for name, value in fitted.constants.items():
        prior, sigma, meaning, source = CONSTANTS[name]
        constants[name] = {
            "value": round(value, 4),
            "prior": prior,
            "sigma": sigma,
            "moved_by_sigmas": round(math.log(value / prior) / sigma, 2),
            "meaning": meaning,
            "source": source,
        }
    raw = {
        "fit": {"date": date, "errors": fitted.errors, "rows": list(fitted.rows)},
        "constants": constants,
        "without_source": {
            "names": list(CONSTANTS),
            **{s: [round(c[name], 4) for name in CONSTANTS] for s, c in fitted.without_source.items()},
        },
    }
    head = (
        "# Written by baleen.cost.validate.write_fit: constants fitted on the rows of cost_cases.csv marked `cal`.\n\n"
    )
    return head + tomli_w.dumps(raw)
