"""The model of a plan by name: a recipe, a config.json, or the architecture of a published run."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

from baleen.config import ModelConfig, UserError, model_config_from_hf, read_json
from baleen.cost.architecture import Architecture, from_dims, from_model_config
from baleen.cost.cases import NODE_LIMITS, USUAL_BATCH_TOKENS, shipped_cases
from baleen.recipe import load_recipe, recipe_names

USUAL_SEQ_LEN = 4096


class PlannedModel(NamedTuple):
    """What a plan needs to know of a model; `tokens` is the recipe's own, None elsewhere. Batch in sequences."""

    name: str
    arch: Architecture
    seq_len: int
    batch: int
    tokens: float | None
    node_limit: int | None  # most nodes a token's experts lie on
    micro_batch: int | None = None  # sequences a forward, as the recipe says


def load_model(name: str) -> PlannedModel:
    """By recipe name or .toml path, run or model directory, config.json, or name in cost_cases.csv (llama3-405b).

    Raises UserError naming what is known.
    """
    path = Path(name)
    if name in recipe_names() or path.suffix == ".toml":
        recipe = load_recipe(name)
        train = recipe.train
        return PlannedModel(
            recipe.name,
            from_model_config(recipe.model),
            train.seq_len,
            train.batch_tokens // train.seq_len,
            float(train.tokens),
            _node_limit(recipe.model),
            train.micro_batch_size or train.batch_tokens // train.seq_len,
        )
    for file in (path, path / "config.json", path / "model" / "config.json"):
        if file.is_file():
            return _from_config(name, file)
    published = _published()
    if name in published:
        return _usual(name, published[name], NODE_LIMITS.get(name))
    raise UserError(
        f"unknown model {name!r}: give a recipe ({', '.join(recipe_names())}), a published architecture "
        f"({', '.join(sorted(published))}), a directory with config.json, or a JSON file of dims"
    )


def usual_batch(seq_len: int) -> int:
    """About 4M tokens, as a power of two of sequences: it divides over the usual numbers of devices."""
    return 2 ** round(math.log2(max(1, USUAL_BATCH_TOKENS / seq_len)))


def _from_config(name: str, file: Path) -> PlannedModel:
    """A deepseek_v3 config.json, or `dims` as in cost_cases.csv."""
    raw = read_json(file)
    if "model_type" in raw:
        config = model_config_from_hf(raw)
        return _usual(name, from_model_config(config), _node_limit(config))
    return _usual(name, from_dims(raw), None)


def _usual(name: str, arch: Architecture, node_limit: int | None) -> PlannedModel:
    return PlannedModel(name, arch, USUAL_SEQ_LEN, usual_batch(USUAL_SEQ_LEN), None, node_limit)


def _node_limit(config: ModelConfig) -> int | None:
    """Expert groups lie on a node each (V3 §2.1.2), so a token visits as many nodes as it may choose groups."""
    return config.topk_group if config.topk_group < config.n_group else None


@cache
def _published() -> dict[str, Architecture]:
    return {
        case.text["arch"]: from_dims(json.loads(case.text["dims"])) for case in shipped_cases() if case.text["dims"]
    }
