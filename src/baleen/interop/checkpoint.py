"""A released checkpoint on disk, checked before it is believed, and read as a stream of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baleen.config import ModelConfig, UserError, model_config_from_hf, read_json
from baleen.interop.names import EMBEDDING, HEAD, Layout, weights_in
from baleen.interop.shards import INDEX, SINGLE, Shard, Spec, pieces
from baleen.model.fp8 import E4M3, dequantize_blocks, scale_shape

# Pairs (name, tensor) by the names of `Layout`: one tensor an expert, no copies of embedding and head for MTP layers.
TensorStream = Iterable[tuple[str, Tensor]]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PLAIN_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
SCALE = "_scale_inv"  # weight_scale_inv beside weight: what to multiply FP8 numbers with


class Checkpoint:
    """A directory of safetensors whose files, names, shapes and dtypes agree with its config.json.

    Experts may be stacked or one by one; weights may be FP8 in blocks with float32 or UE8M0 scales. Opening it reads
    headers only. Raises UserError, naming the file or the tensor, for a pickle, a damaged or missing file, a missing,
    unknown or misshapen tensor, another architecture or an unknown quantisation.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        raw = read_json(self.directory / "config.json")
        if not isinstance(raw, dict):
            raise UserError(f"{self.directory / 'config.json'} is not a JSON object")
        self.config: ModelConfig = model_config_from_hf(raw)
        self.end_tokens: object = raw.get("eos_token_id")  # one, or a list of which the configuration keeps the first
        self.block = _fp8_block(raw, self.directory)
        self._headers: dict[str, tuple[Path, Spec]] = {}
        for file in weight_files(self.directory):
            with Shard(file) as shard:
                specs = shard.specs
            for name, spec in specs.items():
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # some old exporters stored what config.json says already
                if name in self._headers:
                    raise UserError(f"{file} repeats {name}, which {self._headers[name][0].name} holds")
                self._headers[name] = (file, spec)
        self._check_index()
        self._check_size()
        self.layout = Layout(self.config)
        self._check_names()
        self._check_scales()
        self.dtype = self._headers[EMBEDDING][1].dtype

    def specs(self) -> dict[str, Spec]:
        """What `tensors` will yield, by name: copies left out, stacks taken apart, FP8 as wide as the embedding."""
        out = {}
        for name, (_, spec) in self._weights():
            dtype = self.dtype if spec.dtype == E4M3 else spec.dtype
            for part in self.layout.stacks.get(name, (name,)):
                out[part] = Spec(dtype, self.layout.shape(part))
        return {name: out[name] for name in self.layout.originals()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor once, shard by shard, FP8 as float32.

        Raises UserError for a value that is not finite, a checksum that fails, or a copy that differs from its
        original, before the last tensor has been yielded.
        """
        self._check_copies()
        for file in sorted({file for _, (file, _) in self._weights()}):
            with Shard(file) as shard:
                for name in [name for name, (held_by, _) in self._weights() if held_by == file]:
                    if name not in self.layout.stacks:
                        yield name, self._checked(name, shard.read(name), None, shard)
                        continue
                    for expert, parts in self._experts(name):
                        tensor = self._checked(name, shard.read_slice(name, expert), expert, shard)
                        for part, half in parts:
                            yield part, tensor if half is None else tensor.chunk(2)[half]

    def _experts(self, stack: str) -> Iterator[tuple[int, list[tuple[str, int | None]]]]:
        """(expert, [(name of its tensor, half of the rows)]) of a stack."""
        parts: dict[int, list[tuple[str, int | None]]] = {}
        for name in self.layout.stacks[stack]:
            place = self.layout.places[name]
            parts.setdefault(place.expert or 0, []).append((name, place.half))
        yield from parts.items()

    def _checked(self, name: str, tensor: Tensor, expert: int | None, shard: Shard) -> Tensor:
        """The tensor dequantised, if it is finite. shard: where it came from, and most often its scales too."""
        if name + SCALE in self._headers:
            file, _ = self._headers[name + SCALE]
            with nullcontext(shard) if file == shard.file else Shard(file) as holder:
                scale = holder.read(name + SCALE)
            tensor = dequantize_blocks(tensor, scale if expert is None else scale[expert], self.block or (0, 0))
        if not all(piece.isfinite().all() for piece in pieces(tensor)):
            raise UserError(f"{name} in {self._headers[name][0]} holds NaN or infinite values")
        return tensor

    def _weights(self) -> list[tuple[str, tuple[Path, Spec]]]:
        """Headers without scales and copies."""
        known = {name for name in self.layout.originals()} | self.layout.stacks.keys()
        return [(name, header) for name, header in self._headers.items() if name in known]

    def _is_copy(self, name: str) -> bool:
        place = self.layout.places.get(name)
        return name == HEAD if place is None else place.copy  # a head beside tied embeddings

    def _check_index(self) -> None:
        index = self.directory / INDEX
        if not index.exists():
            return
        for name, file in read_json(index)["weight_map"].items():
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if name not in self._headers or self._headers[name][0].name != file:
                raise UserError(f"{index} promises {name} in {file}, which does not hold it")

    def _check_size(self) -> None:
        """A config.json that lies must not make us count to a billion."""
        cfg = self.config
        held = sum(spec.nbytes for _, spec in self._headers.values())
        if cfg.num_layers_with_mtp > len(self._headers) or weights_in(cfg) > 2 * held:  # less is told by name
            raise UserError(f"{self.directory}: config.json announces more layers or weights than the files can hold")

    def _check_names(self) -> None:
        cfg, expected, stacks = self.config, self.layout.places, self.layout.stacks
        present: set[str] = set()
        for name, (file, spec) in self._headers.items():
            if name.endswith(SCALE):
                continue
            known = name in expected or name in stacks
            if not known and not (name == HEAD and cfg.tie_word_embeddings):
                raise UserError(f"{file} holds {name}, which a model of this config.json does not have")
            shape = self.layout.shape(name if known else EMBEDDING)
            if spec.shape != shape:
                raise UserError(f"{name} in {file} has shape {list(spec.shape)}; config.json asks for {list(shape)}")
            parts = stacks.get(name, [name])
            if not present.isdisjoint(parts):
                raise UserError(f"{file} holds {name} stacked, and its experts one by one as well")
            present.update(parts)
        missing = [name for name in self.layout.originals() if name not in present]
        if not missing:
            return
        cure = ""
        if all(_layer(name) >= cfg.num_hidden_layers > 0 for name in missing) and not any(
            _layer(name) >= cfg.num_hidden_layers for name in present
        ):
            cure = ': to load it without MTP, set "num_nextn_predict_layers": 0 in config.json'
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise UserError(f"{self.directory} lacks {missing[0]}{more}{cure}")

    def _check_scales(self) -> None:
        for name, (file, spec) in self._headers.items():
            if name.endswith(SCALE):
                weight = self._headers.get(name.removesuffix(SCALE))
                if weight is None or weight[1].dtype != E4M3 or len(weight[1].shape) < 2 or self.block is None:
                    raise UserError(f"{file} holds {name}, but no FP8 weight to which it belongs")
                shape = scale_shape(weight[1].shape, self.block)
                if spec.shape != shape or spec.dtype not in (torch.float32, torch.float8_e8m0fnu):
                    found = f"{spec.dtype} {list(spec.shape)}"
                    raise UserError(f"{name} in {file} is {found}; its weight needs float32 or UE8M0 {list(shape)}")
            elif spec.dtype == E4M3 and name + SCALE not in self._headers:
                raise UserError(f"{name} in {file} is FP8 without its {name.rpartition('.')[2]}{SCALE}")
            elif spec.dtype not in PLAIN_DTYPES and (spec.dtype != E4M3 or self._is_copy(name) or name == EMBEDDING):
                raise UserError(f"{name} in {file} is {spec.dtype}, which Baleen does not read there")

    def _check_copies(self) -> None:
        for name, (file, _) in self._headers.items():
            if name.endswith(SCALE) or not self._is_copy(name):
                continue
            original = EMBEDDING if name.endswith("embed_tokens.weight") else self.layout.head
            with Shard(file) as one, Shard(self._headers[original][0]) as other:
                if not torch.equal(one.read(name), other.read(original)):
                    raise UserError(f"{name} in {file} differs from {original}; Baleen shares the two")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors of a model directory. Raises UserError if there are none, or only pickles."""
    if (index := directory / INDEX).exists():
        raw = read_json(index)
        weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
        if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_shard_name, weight_map.values())):
            raise UserError(f"{index} has no weight_map of tensor names to .safetensors files beside it")
        files = [directory / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} is missing; {INDEX} names it")
        return files
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if list(directory.glob("*.safetensors")):
        raise UserError(f"{directory} has safetensors but neither {SINGLE} nor {INDEX}")
    for file in sorted(directory.iterdir()):
        if file.suffix in PICKLES:
            raise UserError(
                f"{file} is a pickle, which can run code when opened: convert it to safetensors where you trust it"
            )
    raise UserError(f"{directory} holds no *.safetensors")


def _is_shard_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _fp8_block(raw: Mapping[str, Any], directory: Path) -> tuple[int, int] | None:
    """The block of `quantization_config`, None without one. Raises UserError for another quantisation."""
    quantisation = raw.get("quantization_config")
    if not quantisation:
        return None
    match quantisation:
        case {"quant_method": "fp8", "weight_block_size": [int(rows), int(columns)]} if rows > 0 and columns > 0:
            if quantisation.get("fmt", "e4m3") == "e4m3":
                return rows, columns
    known = "quant_method 'fp8' of fmt 'e4m3' with a weight_block_size"
    raise UserError(f"{directory} is quantised as {quantisation}: Baleen reads {known}")


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else -1
