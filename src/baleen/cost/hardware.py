"""The table of devices: peaks, achieved matrix products, memory, links, power and prices, each cell with its source.

GPUs and CPUs are entries alike; `baleen cost calibrate` writes one for the machine it runs on.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from baleen.config import NotNegative, Positive, Strict, UserError

PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
# Share of a dense peak that large matrix products reach where nobody has published a figure (0.78-0.87 elsewhere).
USUAL_ACHIEVED_SHARE = 0.8
PRECISION_FIELDS = {"fp32": "peak_fp32", "bf16": "peak_bf16", "fp8": "peak_fp8"}


class Hardware(Strict):
    """One device. TFLOPS dense; GB = 1e9 bytes; nvlink both directions together, network one direction, per device."""

    name: str
    title: str
    generation: str
    aliases: tuple[str, ...] = ()
    peak_bf16: PositiveFloat | None = None
    peak_fp8: PositiveFloat | None = None
    peak_fp32: PositiveFloat | None = None
    achieved_bf16: PositiveFloat | None = None
    achieved_fp8: PositiveFloat | None = None
    achieved_fp32: PositiveFloat | None = None
    memory_gb: PositiveFloat
    memory_tb_s: PositiveFloat
    watts: PositiveFloat | None = None
    nvlink_gb_s: PositiveFloat | None = None
    network_gb_s: PositiveFloat | None = None
    domain: Positive = 1  # devices that share the fast link
    # What kernels and collectives make of those figures. The defaults hold where nobody published or measured better.
    # A product of size n in one dimension reaches n / (n + half_size) of the achieved rate: tiles and waves not filled,
    # start and end of the pipeline inside a kernel. At A100's 312 TFLOPS cuBLAS at 4096^3 reaches about 92 % of its
    # best; the size grows with the root of the peak (H100 about 75 % at 4096^3, as published curves). Experts' grouped
    # products have so many times that size, for every group leaves its own tiles and waves unfilled.
    half_size: PositiveFloat = 110
    grouped_half_size: PositiveFloat = 2.0
    streaming_share: Share = 0.85  # of the memory's rate that kernels reach: BabelStream 0.85-0.93 on A100, H100
    link_share: Share = 0.8  # of a link's rate that collectives reach: 160 of 200, 40 of 50 GB/s (2505.09343 §4)
    overlapped_compute_share: Share = 112 / 132  # of the SMs, beside 20 that communicate (2412.19437 §3.2.2)
    # Attention's core inside training, share of the dense peak; None: the table of `baleen.cost.kernels`.
    attention_forward_share: Share | None = None
    attention_backward_share: Share | None = None
    # Serving, attention over a cache: shares of the peaks of products and of memory that FlashMLA reaches on H800, 660
    # of 989 TFLOPS and 3,000 of 3,350 GB/s (github.com/deepseek-ai/FlashMLA, April 2025); weights stream so too.
    cached_attention_share: Share = 0.67
    cached_bandwidth_share: Share = 0.9
    fillable_share: Share = 0.95  # of the memory that a training may plan to fill: the rest is for the context
    allocated_over_used: PositiveFloat = 1.05  # memory a caching allocator holds over what tensors need: its peaks
    # What `baleen cost calibrate` measures of a machine; a product takes FLOPs / achieved + bytes / rate + a call.
    threads: Positive | None = None
    product_tb_s_fp32: PositiveFloat | None = None  # at which a product's operands come; None: never what it waits for
    product_tb_s_bf16: PositiveFloat | None = None
    product_call_us_fp32: NotNegative | None = None
    product_call_us_bf16: NotNegative | None = None
    attention_forward_tflops: PositiveFloat | None = None
    attention_backward_tflops: PositiveFloat | None = None
    streaming_tb_s: PositiveFloat | None = None  # of elementwise operators on activations, part of them in caches
    layer_overhead_us: NotNegative = 0.0  # per layer and micro-batch, whatever its size
    copy_overhead_ns: NotNegative = 0.0  # per copy of a token that goes to an expert and back, whatever its width
    update_tb_s: PositiveFloat | None = None  # of gradient clipping and the optimizer
    process_gb: NotNegative = 0.0  # of libraries and their kernels, beside all tensors
    purchase_usd: tuple[PositiveFloat, PositiveFloat] | None = None
    rental_usd_per_hour: tuple[PositiveFloat, PositiveFloat, str] | None = None
    sources: dict[str, str] = {}  # field -> "title (date)"

    @property
    def is_cpu(self) -> bool:
        return self.generation == "cpu"

    @property
    def fillable_bytes(self) -> float:
        return self.memory_gb * 1e9 * self.fillable_share

    @property
    def fastest_precision(self) -> str:
        """What is trained in where nobody asks for another: that with the highest peak; on CPUs never FP8."""
        known = [name for name, field in PRECISION_FIELDS.items() if getattr(self, field)]
        return max(known, key=lambda name: (self.peak_flops(name), name == "fp32"))

    def peak_flops(self, precision: str) -> float:
        """Dense peak in FLOP/s at 'fp32', 'bf16' or 'fp8'. Raises UserError where the device has no such format."""
        if precision not in PRECISION_FIELDS:
            raise UserError(f"unknown precision {precision!r}: known are {', '.join(PRECISION_FIELDS)}")
        peak = getattr(self, PRECISION_FIELDS[precision])
        if peak is None:
            have = [p for p, field in PRECISION_FIELDS.items() if getattr(self, field)]
            raise UserError(f"{self.title} has no {precision} peak in the table; it has {', '.join(have)}")
        return peak * 1e12

    def achieved_share(self, precision: str) -> float:
        """Share of the peak that large matrix products reach on this device; unknown, that of its other formats."""
        others = (name for name in PRECISION_FIELDS if name != precision)
        for known in (precision, *others):
            achieved, peak = (getattr(self, f"{of}_{known}", None) for of in ("achieved", "peak"))
            if achieved and peak:
                return achieved / peak
        return USUAL_ACHIEVED_SHARE


def parse_hardware(raw: dict[str, Any], where: str) -> dict[str, Hardware]:
    """Tables of hardware.toml -> devices by name. Raises UserError naming file, device and field."""
    for name, cells in raw.items():
        if not isinstance(cells, dict):
            raise UserError(f"{where}: {name} stands alone: every entry must be a table of a device's cells, [{name}]")
    known_sources = raw.get("sources", {})
    for source, entry in known_sources.items():
        if not (isinstance(entry, dict) and {"title", "date"} <= entry.keys()):
            raise UserError(f'{where}: sources.{source} must be {{ title = "...", date = "..." }}')
    devices = {}
    for name, cells in raw.items():
        if name == "sources":
            continue
        fields: dict[str, Any] = {"name": name, "sources": {}}
        for field, cell in cells.items():
            if field in ("title", "generation", "aliases"):
                fields[field] = cell
                continue
            if not (isinstance(cell, list) and len(cell) == 2 and isinstance(cell[1], str)):
                raise UserError(f"{where}: {name}.{field} must be [value, source]")
            value, source = cell
            entry = known_sources.get(source)
            if entry is None:
                raise UserError(f"{where}: {name}.{field} names source {source!r}, which is not under [sources]")
            fields[field] = value
            fields["sources"][field] = f"{entry['title']} ({entry['date']})"
        try:
            devices[name] = Hardware.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{where}: {name}.{field}: {first['msg']}") from None
    return devices


@cache
def shipped_hardware() -> dict[str, Hardware]:
    text = resources.files("baleen.cost").joinpath("data/hardware.toml").read_text(encoding="utf-8")
    return parse_hardware(tomllib.loads(text), "hardware.toml")


def read_hardware(path: Path) -> dict[str, Hardware]:
    """Devices of a file the user wrote (or `baleen cost calibrate`), in the format of hardware.toml."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: give a TOML file with one table a device") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a TOML file with one table a device") from None
    except ValueError as error:  # of the syntax, of UTF-8, or a number of too many digits
        raise UserError(f"{path} is not valid TOML: {error}") from None
    return parse_hardware(raw, str(path))


def find_hardware(name: str, *files: Path) -> Hardware:
    """A device by name or alias, from the user's files first. Raises UserError listing what is known."""
    devices = dict(shipped_hardware())
    for path in files:
        devices.update(read_hardware(path))
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    for device in reversed(devices.values()):
        if wanted == device.name.lower() or wanted in device.aliases:
            return device
    raise UserError(
        f"unknown hardware {name!r}: known are {', '.join(sorted(devices))}; "
        "add one with --hardware FILE.toml (a table in the format of baleen/cost/data/hardware.toml; "
        "`baleen cost calibrate` writes one for this machine)"
    )
