"""The model of several ranks in Hugging Face's layout: each rank reads a part of the checkpoint's shards and writes it.

No rank gathers what the others hold: it has one tensor in memory at a time.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from baleen.config import ModelConfig, model_config_to_hf
from baleen.interop.huggingface import DTYPE_WORDS, SavesTokenizer, write_generation, write_json
from baleen.interop.names import EMBEDDING, Layout, Place
from baleen.interop.shards import INDEX, ShardWriter, Spec, put_in_place
from baleen.parallel.ranks import Ranks

SHARDING = "DCP_SHARDING_INFO"  # where torch.distributed.checkpoint says what a shard's pieces are pieces of


class Piece(NamedTuple):
    """Rows `start` to `stop` of a tensor, in a shard."""

    start: int
    stop: int
    file: Path


class StoredGroup:
    """One group (model or ema) of a checkpoint's shards, whose tensors are cut along their first axis, if at all."""

    def __init__(self, shards: Path, group: str):
        self._prefix = f"{group}/"
        self._pieces: dict[str, list[Piece]] = defaultdict(list)
        for file in sorted(shards.glob("*.safetensors")):
            with safe_open(file, framework="pt") as stream:
                sharding = json.loads(stream.metadata()[SHARDING])
                for key in stream.keys():  # noqa: SIM118 - not a dict
                    if key.startswith(self._prefix):
                        rows, (start, *rest) = stream.get_slice(key).get_shape()[0], sharding[key]["saved_offsets"]
                        assert not any(rest), f"{key} is cut along another axis than the first"
                        self._pieces[key[len(self._prefix) :]].append(Piece(start, start + rows, file))

    def read(self, place: Place) -> Tensor:
        """What `place.of` would give of the whole tensor."""
        wanted = None if place.expert is None else slice(place.expert, place.expert + 1)
        parts = []
        for start, stop, file in sorted(self._pieces[place.name]):
            if wanted is None or start <= wanted.start < stop:
                rows = slice(None) if wanted is None else slice(wanted.start - start, wanted.stop - start)
                with safe_open(file, framework="pt") as stream:
                    parts.append(stream.get_slice(self._prefix + place.name)[rows])
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return place._replace(expert=None if place.expert is None else 0).of(whole)


def export_shards(
    shards: Path,
    group: str,
    directory: Path,
    config: ModelConfig,
    ranks: Ranks,
    *,
    dtype: torch.dtype,
    tokenizer: SavesTokenizer,
    card: str,
) -> None:
    """As `save_model`, from a checkpoint's shards. Called by all ranks; what was in `directory` stays until then."""
    stored, layout = StoredGroup(shards, group), Layout(config)
    directory = directory.resolve()
    aside = directory.with_name(f".{directory.name}.partial")
    ranks.lead(lambda: _fresh(aside))
    specs = {name: Spec(dtype, layout.shape(name)) for name in layout.places}
    mine = _share(specs, ranks)
    if mine:
        part = aside / f"part-{ranks.rank:05d}"
        part.mkdir()
        with ShardWriter(part, {name: specs[name] for name in mine}) as writer:
            for name in mine:
                writer.write(name, stored.read(layout.places[name]))

    def join_parts() -> None:
        _number_files(aside)
        words = model_config_to_hf(config) | {"torch_dtype": DTYPE_WORDS[specs[EMBEDDING].dtype]}
        write_json(aside / "config.json", dict(sorted(words.items())))
        write_generation(aside, config, {})
        tokenizer.save(aside)
        (aside / "README.md").write_text(card, encoding="utf-8")
        put_in_place(aside, directory)

    ranks.largest([0.0])  # all have written
    ranks.lead(join_parts)


def _share(specs: dict[str, Spec], ranks: Ranks) -> list[str]:
    """This rank's tensors: those that begin in its share of all bytes."""
    total, position, mine = sum(spec.nbytes for spec in specs.values()), 0, []
    for name, spec in specs.items():
        if position * ranks.world // total == ranks.rank:
            mine.append(name)
        position += spec.nbytes
    return mine


def _number_files(directory: Path) -> None:
    """part-R/*.safetensors of all ranks become the numbered files of one model, with an index."""
    files = sorted(directory.glob("part-*/*.safetensors"))
    weight_map, size = {}, 0
    for number, file in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with safe_open(file, framework="pt") as stream:
            weight_map |= dict.fromkeys(stream.keys(), name)
            size += file.stat().st_size
        file.rename(directory / name)
    for part in directory.glob("part-*"):
        shutil.rmtree(part)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _fresh(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
