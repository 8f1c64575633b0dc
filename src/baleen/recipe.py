"""The recipe of a run: what it trains, on what, how, on how many processes, and how it is read and overridden.

As `config`, this imports no torch.
"""

from __future__ import annotations

import tomllib
from collections.abc import Container, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from baleen.config import Count, Fraction, ModelConfig, Momentum, NotNegative, Positive, Strict, UserError, validated

T = TypeVar("T", bound=BaseModel)


def _with_shape(knot: Any) -> Any:
    return (*knot, "linear") if isinstance(knot, list | tuple) and len(knot) == 2 else knot


Knot = Annotated[tuple[NotNegative | str, NotNegative, Literal["linear", "cosine"]], BeforeValidator(_with_shape)]
LEVEL: tuple[Knot, ...] = ((0.0, 1.0, "linear"),)


class DataConfig(Strict):
    """Where the text comes from and how it becomes tokens."""

    sources: tuple[str, ...] = ()  # files, folders, or package:NAME
    format: Literal["text", "chat"] = "text"
    heldout_fraction: Fraction = 0.02  # of documents, chosen by hash
    min_chars: Count = 1
    fim_rate: Fraction = 0.0  # PSM, document level, before packing (V3 §4.1)
    pretoken_split_rate: Fraction = 0.0  # share of joined punctuation and line-break pretokens that is split (V3 §4.1)


class TrainConfig(Strict):
    """How the network is trained. `schedule` multiplies lr, batch_tokens, bias_update_speed and mtp_loss_weight.

    A resumed run repeats the straight one bit for bit, unless `minutes` lets the clock into the schedule.
    """

    tokens: Positive
    batch_tokens: Positive
    seq_len: Positive
    micro_batch_size: Count = 0  # sequences a forward; 0: the whole batch
    minutes: float = Field(0.0, ge=0.0)  # 0: no limit. Else the schedule ends by the clock if that comes first
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(gt=0.0)
    embedding_lr_scale: float = Field(1.0, gt=0.0)  # of lr; under muP it does not shrink with width (arXiv 2203.03466)
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0.0)
    weight_decay: float = Field(0.1, ge=0.0)
    clip_norm: float = Field(1.0, gt=0.0)
    mtp_loss_weight: float = Field(0.3, ge=0.0)  # lambda, Eq. 25
    bias_update_speed: float = Field(0.001, ge=0.0)  # gamma, §2.1.2
    balance_loss_weight: float = Field(1e-4, ge=0.0)  # alpha, Eq. 17
    document_mask: bool = False  # attend within a document only: V3 pretrains without, fine-tunes with (§4.1, §5.1)
    ema_decay: Fraction = 0.0  # 0: no moving average of the weights
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"  # fp8: matmuls as in V3 §3.3 (train/fp8.py)
    checkpoint_every: Count = 0  # steps; 0: only at the end
    keep_checkpoints: Positive = 2
    eval_every: Count = 0  # steps; 0: only at the end
    sample_every_seconds: float = Field(60.0, ge=0.0)


class ScheduleConfig(Strict):
    """Knots [when, factor, shape]: factor is reached from the knot before by 'linear' (default) or 'cosine'.

    `when` counts tokens, or is a share of train.tokens written as "60%". Two knots at one place make a jump.
    """

    lr: tuple[Knot, ...] = LEVEL
    batch_tokens: tuple[Knot, ...] = LEVEL
    bias_update_speed: tuple[Knot, ...] = LEVEL
    mtp_loss_weight: tuple[Knot, ...] = LEVEL

    @field_validator("*", mode="after")
    @classmethod
    def _knots(cls, knots: tuple[Knot, ...]) -> tuple[Knot, ...]:
        if not knots:
            raise ValueError("a schedule needs at least one knot, such as [0, 1.0]")
        for knot in knots:
            knot_position(knot[0], 1)
        return knots


Recomputed = Literal["norm", "up_projection", "swiglu"]


class ParallelConfig(Strict):
    """How a run is spread over the processes that torchrun starts. It may change when a run is resumed.

    Data parallelism is what pipeline leaves: world / pipeline ranks with sequences of their own. Experts are spread
    over `expert` of them. `zero` 0 keeps whole replicas, 1 shards optimizer state, 2 gradients too, 3 weights too,
    over `shard` data-parallel ranks (0: all of them; less: HSDP).
    """

    world: Count = 0  # processes this recipe is made for; 0: any number
    pipeline: Positive = 1
    expert: Positive = 1
    shard: Count = 0
    zero: Literal[0, 1, 2, 3] = 1
    schedule: Literal["1f1b", "zbv", "dualpipev"] = "dualpipev"
    recompute: tuple[Recomputed, ...] = ()  # outputs that the backward makes again; V3 takes all three (§3.2.3)
    dispatch: Literal["wide", "fp8"] = "wide"  # what tokens travel in: as computed, or E4M3 and back in BF16 (V3 §3.3)
    timeout_seconds: Positive = 600  # after which a silent rank is taken for hanging


class CostConfig(Strict):
    """What the ledger writes beside the hours. usd_per_device_hour 0: the rate of the hardware table."""

    project: str = "default"
    purpose: Literal["research", "ablation", "failed", "final"] = "research"
    usd_per_device_hour: Annotated[float, Field(ge=0.0)] = 0.0


class Recipe(Strict):
    """A whole run: [model], [data], [train], [schedule], [parallel], [cost]."""

    name: str = "recipe"
    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    cost: CostConfig = CostConfig()

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if self.train.seq_len > self.model.max_position_embeddings:
            raise ValueError(
                f"train.seq_len ({self.train.seq_len}) is longer than model.max_position_embeddings "
                f"({self.model.max_position_embeddings})"
            )
        if self.train.seq_len < 2 + self.model.num_nextn_predict_layers:
            raise ValueError(
                f"train.seq_len is {self.train.seq_len}: with {self.model.num_nextn_predict_layers} MTP layers a "
                f"sequence needs at least {2 + self.model.num_nextn_predict_layers} tokens"
            )
        if self.train.batch_tokens % self.train.seq_len:
            raise ValueError(
                f"train.batch_tokens ({self.train.batch_tokens}) is not a multiple of train.seq_len "
                f"({self.train.seq_len}): take {-(-self.train.batch_tokens // self.train.seq_len) * self.train.seq_len}"
            )
        return self


def knot_position(when: float | str, total_tokens: int) -> float:
    """Tokens at which a knot stands: a count as it is, "60%" as that share of `total_tokens`."""
    if not isinstance(when, str):
        return float(when)
    try:
        share = float(when.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not when.endswith("%") or not 0 <= share <= 1:
        raise ValueError(f"a knot stands at {when!r}: write a number of tokens, or a share such as '60%'")
    return share * total_tokens


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(
        f.name.removesuffix(".toml") for f in resources.files("baleen.recipes").iterdir() if f.name.endswith(".toml")
    )


def recipe_lines() -> dict[str, str]:
    """Of each recipe that ships what the comment in its first line says."""
    return {name: _shipped(name).decode().partition("\n")[0].strip("# .:") for name in recipe_names()}


def _shipped(name: str) -> bytes:
    return resources.files("baleen.recipes").joinpath(f"{name}.toml").read_bytes()


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = (), sources: Sequence[str] = ()) -> Recipe:
    """A recipe by path, or by the name of one that ships with the package; `overrides` are `section.key=value`.

    `sources` take the place of data.sources and are read as plain text, unless the recipe names the same ones or an
    override says data.format=chat.

    Raises UserError on an unknown name or key (naming the nearest known one), a wrong type or an impossible shape.
    """
    return read_recipe(Recipe, name_or_path, overrides, sources)


def read_recipe(
    kind: type[T], name_or_path: str | Path, overrides: Sequence[str] = (), sources: Sequence[str] = ()
) -> T:
    """As `load_recipe`, for a recipe of that kind: pretraining's, or post-training's with its stages."""
    path = Path(name_or_path)
    if path.suffix == ".toml" and path.is_file():
        raw, where = path.read_bytes(), str(path)
    elif str(name_or_path) in recipe_names():
        raw, where = _shipped(str(name_or_path)), f"recipe {name_or_path}"
    else:
        raise UserError(f"no recipe {str(name_or_path)!r}: give a .toml file or one of {', '.join(recipe_names())}")
    tables = _tables(raw, where)
    made_for = _made_for(tables)
    if made_for not in (None, _made_for(kind.model_fields)):
        raise UserError(f"{where} {made_for}")
    if sources:
        _replace_sources(tables, sources)
    for override in overrides:
        _apply_override(tables, override)
    tables.setdefault("name", path.stem)
    return validated(kind, tables, where)


def _made_for(sections: Container[str]) -> str | None:
    """Which command takes a recipe with these sections; None if they do not tell."""
    if "stages" in sections:
        return "is a recipe of stages: run it with `baleen sft`, `baleen rl` or `baleen distill`"
    if "train" not in sections:
        return None
    if "base" in sections:
        return "trains a model that exists: run it with `baleen train`, and --only mtp or --only all"
    return "is a recipe for `baleen train` without --only: it makes a new model, and has neither stages nor a base"


def run_of(path: Path) -> Path | None:
    """The run directory that `path` is, or whose model or model-ema it is; None for a model that is no run's."""
    if (path / "recipe.toml").is_file():
        return path
    path = path.absolute()
    is_runs = path.name in ("model", "model-ema") and (path.parent / "recipe.toml").is_file()
    return path.parent if is_runs else None


def recipe_sections(path: Path) -> dict[str, Any]:
    """The sections of the recipe, of whatever kind it is, of the run that `run_of` finds; none, if it finds none."""
    run = run_of(path)
    if run is None:
        return {}
    file = run / "recipe.toml"
    return _tables(file.read_bytes(), str(file))


def cost_of(run: Path) -> CostConfig:
    """How the ledger books what is done with a run."""
    return validated(CostConfig, recipe_sections(run).get("cost", {}), f"{run}: [cost]")


def _tables(raw: bytes, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(raw.decode())
    except ValueError as error:  # of the syntax, of UTF-8, or a number of too many digits
        raise UserError(f"{where} is not valid TOML: {error}") from None


def _replace_sources(raw: dict[str, Any], sources: Sequence[str]) -> None:
    data = raw.setdefault("data", {})
    if not set(sources) <= set(data.get("sources", ())):
        data["format"] = "text"
    data["sources"] = [
        s if not s or s.startswith("package:") else str(Path(s).expanduser().absolute()) for s in sources
    ]


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override!r}: write section.key=value, such as train.lr=1e-3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        value = text
    *sections, leaf = key.split(".")
    inner: Any = raw
    for section in sections:
        inner = _section_of(inner, section, override)
    if isinstance(inner, list):
        raise UserError(f"--set {override!r}: {leaf} is a section, not a value: name one of its keys")
    inner[leaf] = value


def _section_of(raw: Any, section: str, override: str) -> Any:
    """raw[section]: a table, or a list of tables, whose sections go by number: stages.0.train."""
    if isinstance(raw, list):
        if section not in map(str, range(len(raw))):
            raise UserError(f"--set {override!r}: {section} is none of the {len(raw)}, which count from 0")
        return raw[int(section)]
    inner = raw.setdefault(section, {})
    tables = inner if isinstance(inner, list) and inner else [inner]
    if not all(isinstance(table, dict) for table in tables):
        raise UserError(f"--set {override!r}: {section} is a value, not a section")
    return inner
