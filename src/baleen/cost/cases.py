"""Published training runs in the format of cost_cases.csv, and the workload each of them was."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from baleen.config import UserError
from baleen.cost.architecture import Architecture, from_dims
from baleen.cost.calibration import Calibration
from baleen.cost.candidates import candidate_layouts
from baleen.cost.flops import parameters, training_flops
from baleen.cost.hardware import Hardware, find_hardware
from baleen.cost.kernels import Attention
from baleen.cost.layout import StatedLayout, parse_layout
from baleen.cost.memory import RankMemory
from baleen.cost.ranking import rank
from baleen.cost.workload import Workload

COLUMNS = (
    "id", "type", "arch", "metric", "tier", "split", "tokens", "seq", "gpu", "n_gpus", "precision", "parallelism",
    "global_batch_seqs", "gpu_hours", "tok_s_gpu", "step_s", "tflops_gpu_pub", "mfu_pub", "mem_gib", "dims", "source",
    "note",
)  # fmt: skip
NUMBERS = (
    "tokens",
    "seq",
    "n_gpus",
    "global_batch_seqs",
    "gpu_hours",
    "tok_s_gpu",
    "step_s",
    "tflops_gpu_pub",
    "mfu_pub",
    "mem_gib",
)
WHOLE_NUMBERS = ("tokens", "seq", "n_gpus", "global_batch_seqs")
PRECISIONS = {
    "fp16": "bf16",
    "bf16": "bf16",
    "fp32": "fp32",
    "fp8": "fp8",
    "mxfp8": "fp8",
    "fp8+bf16": "fp8",
    "fp8?": "fp8",
}
USUAL_BATCH_TOKENS = 4_000_000
USUAL_DAYS, USUAL_MFU = 30, 0.35  # for how many devices a run has where that is not published
TUNED_FROM_PARAMETERS = 100e9
LEAST_TOKENS_PER_DEVICE = 2048  # in a step
LEAST_TOKENS_PER_DEVICE_AND_BATCH = 1024  # large runs take larger batches: 405B on 16,384 devices 16M tokens
# GPT-style networks (two FFN matrices or FP16) reported before mid-2023 come from Megatron-LM and GPT-NeoX, whose
# shipped configurations recompute every layer (Pythia's do), and which got FlashAttention in early 2023.
FULL_RECOMPUTATION_UNTIL, UNFUSED_ATTENTION_UNTIL = 2305, 2303
NATIVE_ATTENTION_SINCE = 2408  # FlashAttention-3 (arXiv 2407.08608) and cuDNN 9 replaced FA-2 on Hopper after that
# Runs whose published TFLOPS count recomputation, a second forward: 4 passes of the forward instead of 3.
COUNTS_RECOMPUTATION = re.compile(r"recompute", re.I)
# Hours that were computed from the speed of a step: they hold no restarts, evaluations or waiting.
RATE_DERIVED = re.compile(r"iteration time|rate-derived|tok/s/GPU", re.I)
NODE_LIMITS = {"dsv3": 4, "dsv2": 3}  # most nodes a token is sent to (2412.19437 §2.1.2; V2: 3 devices)


class Case(NamedTuple):
    """A row: its text by column, and its numbers (None where the cell is empty)."""

    text: dict[str, str]
    numbers: dict[str, float | None]

    @property
    def id(self) -> str:
        return self.text["id"]

    @property
    def source(self) -> str:
        """What counts as one source: an arXiv paper, or a publisher's page whatever its table or version."""
        arxiv = re.search(r"\d{4}\.\d{5}", self.text["source"])
        if arxiv:
            return arxiv[0]
        words = self.text["source"].split()
        return words[0] if words and "/" in words[0] else " ".join(words[:2])

    @property
    def kind(self) -> str | None:
        """step, run or energy; None for rows that state nothing which is predicted."""
        return {"step": "step", "bench": "step", "run": "run", "energy": "energy"}.get(self.text["metric"])


class Prepared(NamedTuple):
    """A case as a workload, with its targets: tokens/s/GPU, GPU-hours and GiB where the row states them."""

    case: Case
    work: Workload
    memory: RankMemory
    stated: StatedLayout
    tokens: float | None
    rate: float | None
    hours: float | None
    mwh: float | None
    gib: float | None
    untuned: bool  # nothing of the layout is published, and the model is not so large that somebody surely tuned it

    @property
    def goodput_counts(self) -> bool:
        """Whether the row's hours are a log of a run, rather than a rate times its tokens."""
        note = self.case.text["note"]
        return self.case.kind in ("run", "energy") and (not RATE_DERIVED.search(note) or "incl restarts" in note)


def read_cases(path: Path) -> list[Case]:
    """Rows of a file in the format of cost_cases.csv. Raises UserError for a missing column or an impossible number."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = reader.fieldnames or []
    except FileNotFoundError:
        raise UserError(f"{path} is missing: give a CSV file in the format of cost_cases.csv") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a CSV file") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a CSV file: {error}") from None
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}: it needs those of cost_cases.csv")
    return [_case(row, f"{path}, row {number}") for number, row in enumerate(rows, start=2)]


def shipped_cases() -> list[Case]:
    """The published runs that ship with the package."""
    with resources.as_file(resources.files("baleen.cost").joinpath("data/cost_cases.csv")) as path:
        return read_cases(path)


def _case(row: dict[str, str | None], where: str) -> Case:
    text = {name: (value or "").strip() for name, value in row.items() if name}
    where = f"{where} ({text['id']})"
    numbers: dict[str, float | None] = {}
    for name in NUMBERS:
        try:
            numbers[name] = float(text[name]) if text[name] else None
        except ValueError:
            raise UserError(f"{where}: {name} is {text[name]!r}, not a number") from None
        value = numbers[name]
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"{where}: {name} is {value:g}; it must be positive")
        if value is not None and value < 1 and name in WHOLE_NUMBERS:
            raise UserError(f"{where}: {name} is {value:g}; it must be at least 1")
    return Case(text, numbers)


def prepare(case: Case, calibration: Calibration, find: Callable[[str], Hardware] = find_hardware) -> Prepared:
    """The workload of a case. Raises UserError where the row does not say enough, or its hardware is not known."""
    n = case.numbers
    arch = case_architecture(case)
    hardware = find(case.text["gpu"])
    precision = PRECISIONS.get(case.text["precision"].lower())
    if precision is None:
        raise UserError(f"precision {case.text['precision']!r} is not modelled: known are {', '.join(PRECISIONS)}")
    seq_len = int(n["seq"] or 4096)
    stated = stated_layout(case)
    counted = re.search(r"_mbc(\d+)", case.text["parallelism"])  # SimuMax: micro-batches of one sequence
    published = n["global_batch_seqs"]
    if counted and n["n_gpus"]:
        published = int(counted[1]) * n["n_gpus"] / ((stated.tensor or 1) * (stated.pipeline or 1))
    batch = published or USUAL_BATCH_TOKENS / seq_len
    devices = int(n["n_gpus"] or _usual_devices(arch, hardware, seq_len, n["tokens"], batch))
    if not published:
        only_data = stated.zero == 3 and not stated.tensor
        batch = max(batch, devices * LEAST_TOKENS_PER_DEVICE_AND_BATCH / seq_len, devices if only_data else 1)
    batch = max(1, round(batch))
    conditions = {
        "mtp": arch.num_nextn_predict_layers > 0,
        "attention": _attention(case, stated),
        "eager": (_is_pytorch(case, stated) and not stated.compiled) or _gpt_era(case, FULL_RECOMPUTATION_UNTIL),
        "balanced_routing": "balanced" in case.text["note"],
        "node_limit": NODE_LIMITS.get(case.text["arch"].split("+")[0]),
    }
    found = rank(
        (
            Workload(
                arch=arch, hardware=hardware, layout=layout, precision=precision, seq_len=seq_len, global_batch=batch,
                **conditions,
            )
            for layout in candidate_layouts(arch, hardware, devices, batch, stated)
        ),
        calibration,
    )  # fmt: skip
    choice = found.best[0] if found.best else found.leanest  # what does not fit by our count did run: as lean as can be
    if choice is None:
        raise UserError(f"no layout divides {devices} devices and a batch of {batch} sequences")
    work = choice.work
    return Prepared(
        case=case,
        work=work,
        memory=choice.memory,
        stated=stated,
        tokens=n["tokens"],
        rate=published_rate(case, work, published is not None) if case.kind == "step" else None,
        hours=n["gpu_hours"] if case.kind == "run" and n["tokens"] else None,
        mwh=published_mwh(case) if case.kind == "energy" and n["tokens"] else None,
        gib=n["mem_gib"],
        untuned=case.kind in ("run", "energy")
        and not stated.states_degrees
        and parameters(arch)["total"] < TUNED_FROM_PARAMETERS,
    )


def stated_layout(case: Case) -> StatedLayout:
    """The published layout, and what follows from it and its time.

    Whoever counts recomputation in the TFLOPS did recompute, and GPT's generation did. Its three-dimensional layouts
    (TP, PP and DP stated) ran on DeepSpeed, whose pipeline does not interleave.
    """
    stated = parse_layout(case.text["parallelism"])
    found: dict[str, object] = {}
    gpt_era = _gpt_era(case, FULL_RECOMPUTATION_UNTIL)
    if stated.recompute is None and (gpt_era or COUNTS_RECOMPUTATION.search(case.text["note"])):
        found["recompute"] = "full"
    if gpt_era and stated.pipeline and stated.data and not stated.virtual_stages:
        found["virtual_stages"] = 1
    return stated.model_copy(update=found)


def case_architecture(case: Case) -> Architecture:
    """From `dims`; where that is empty, a well-known network named in the id, cut to the layers that it states."""
    if case.text["dims"]:
        try:
            return from_dims(json.loads(case.text["dims"]))
        except json.JSONDecodeError as error:
            raise UserError(f"{case.id}: dims is not valid JSON: {error}") from None
    plain = _letters(case.id)
    named = [name for name in _known_architectures() if _letters(name) in plain]
    if not named:
        raise UserError(f"{case.id} gives no dims, so nothing can be counted")
    arch = _known_architectures()[max(named, key=len)]
    cut = re.search(r"_l(\d+)(?:_|$)", case.id)
    return arch.model_copy(update={"num_hidden_layers": int(cut[1])}) if cut else arch


@cache
def _known_architectures() -> dict[str, Architecture]:
    text = resources.files("baleen.cost").joinpath("data/architectures.json").read_text(encoding="utf-8")
    return {name: from_dims(dims) for name, dims in json.loads(text).items()}


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def published_rate(case: Case, work: Workload, batch_known: bool) -> float | None:
    """Tokens per second and GPU that a row states: directly, by its step time, or by TFLOPS or MFU.

    TFLOPS and MFU count causal attention, and a second forward where the row says that recomputation is in them.
    """
    n, devices = case.numbers, work.layout.devices
    if n["tok_s_gpu"]:
        return n["tok_s_gpu"]
    if n["step_s"]:
        return work.tokens / n["step_s"] / devices if batch_known else None
    peak = work.hardware.peak_flops("bf16")
    flops = n["tflops_gpu_pub"] * 1e12 if n["tflops_gpu_pub"] else n["mfu_pub"] * peak if n["mfu_pub"] else None
    if flops is None:
        return None
    passes = 4 / 3 if COUNTS_RECOMPUTATION.search(case.text["note"]) else 1
    return flops / passes / training_flops(work.arch, work.seq_len, mtp=work.mtp)


def published_mwh(case: Case) -> float | None:
    """Energy of the GPUs that a row's note states."""
    match = re.search(r"([\d.]+) (M|G)Wh", case.text["note"])
    return float(match[1]) * (1000 if match[2] == "G" else 1) if match else None


def implied_mfu(rate: float, work: Workload) -> float:
    """MFU of a rate: causal attention, no MTP, no recomputation, of the dense BF16 peak."""
    return rate * training_flops(work.arch, work.seq_len) / work.hardware.peak_flops("bf16")


def _usual_devices(arch: Architecture, hardware: Hardware, seq_len: int, tokens: float | None, batch: float) -> int:
    """A power of two that trains in about a month, if no number is published, and has enough to do in each step."""
    seconds = training_flops(arch, seq_len) * (tokens or 1e12) / (hardware.peak_flops("bf16") * USUAL_MFU)
    most = batch * seq_len / LEAST_TOKENS_PER_DEVICE
    return 2 ** round(math.log2(min(most, max(8, seconds / 86400 / USUAL_DAYS))))


def _attention(case: Case, stated: StatedLayout) -> Attention:
    """Kernels of attention's core by date and framework: PyTorch's SDPA runs FlashAttention-2."""
    if _gpt_era(case, UNFUSED_ATTENTION_UNTIL):
        return "unfused"
    before = (_published(case) or NATIVE_ATTENTION_SINCE) < NATIVE_ATTENTION_SINCE
    return "flash2" if before or _is_pytorch(case, stated) else "native"


def _is_pytorch(case: Case, stated: StatedLayout) -> bool:
    """Whether plain PyTorch trains: FSDP says so, unless it is Megatron's."""
    return stated.zero == 3 and "megatron" not in case.text["source"].lower()


def _gpt_era(case: Case, until: int) -> bool:
    date = _published(case)
    style = case.text["precision"] == "fp16" or '"nm":2' in case.text["dims"].replace(" ", "")
    return date is not None and date <= until and style


def _published(case: Case) -> int | None:
    """Year and month, as arXiv numbers them."""
    arxiv = re.search(r"(\d{4})\.\d{5}", case.text["source"])
    return int(arxiv[1]) if arxiv else None
