"""Checkpoints in Hugging Face's layout for `deepseek_v3`, read and written as streams of tensors.

A stream is pairs (name, tensor) by the names of `Layout`, one tensor an expert, without the MTP layers' copies of the
embedding and the head: readers check these, writers make them.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from baleen.config import ModelConfig, UserError, model_config_from_hf, model_config_to_hf, read_json
from baleen.interop.names import CORRECTION_BIAS, EMBEDDING, HEAD, Layout
from baleen.interop.shards import (
    CRC,
    DTYPES,
    INDEX,
    SINGLE,
    ShardWriter,
    Spec,
    raw_bytes,
    replaced_when_complete,
)
from baleen.model.transformer import Transformer

TensorStream = Iterable[tuple[str, Tensor]]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What goes with the weights when a checkpoint is copied from folder to folder.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json", "tiktoken.model", "LICENSE",
)  # fmt: skip
DTYPE_WORDS = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class SavesTokenizer(Protocol):
    def save(self, directory: Path) -> None: ...


class Checkpoint:
    """A directory of safetensors whose files, names, shapes and dtypes agree with its config.json.

    Opening it reads headers only. Raises UserError, naming the file or the tensor, for a pickle, a damaged or missing
    file, a missing, unknown or misshapen tensor, another architecture or an unknown quantisation.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        raw = read_json(self.directory / "config.json")
        if not isinstance(raw, dict):
            raise UserError(f"{self.directory / 'config.json'} is not a JSON object")
        self.config: ModelConfig = model_config_from_hf(raw)
        if raw.get("quantization_config"):
            raise UserError(f"{self.directory} is quantised ({raw['quantization_config']}), which Baleen cannot read")
        self._headers: dict[str, tuple[Path, Spec]] = {}
        for file in _weight_files(self.directory):
            for name, spec in _read_header(file).items():
                if name in self._headers:
                    raise UserError(f"{file} repeats {name}, which {self._headers[name][0].name} holds")
                self._headers[name] = (file, spec)
        self._check_index()
        self._check_size()
        self.layout = Layout(self.config)
        self._check_names()
        self.dtype = self._headers[EMBEDDING][1].dtype

    def specs(self) -> dict[str, Spec]:
        """What `tensors` will yield, by name: copies left out, stacks taken apart."""
        out = {}
        for name, (_, spec) in self._headers.items():
            for part in self.layout.stacks.get(name, (name,)):
                if not self._is_copy(part):
                    out[part] = Spec(spec.dtype, self.layout.shape(part))
        return {name: out[name] for name in self.layout.originals()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor once, shard by shard; a tensor is valid until the next is asked for.

        Raises UserError for a value that is not finite, a checksum that fails, or a copy that differs from its
        original, before the last tensor has been yielded.
        """
        self._check_copies()
        for file in sorted({file for file, _ in self._headers.values()}):
            with _opened(file) as shard:
                checksums = shard.metadata() or {}
                for name in shard.keys():  # noqa: SIM118 - a reader, not a dict
                    if self._is_copy(name):
                        continue
                    tensor = shard.get_tensor(name)
                    _check_values(tensor, f"{name} in {file}", checksums.get(CRC + name))
                    if name not in self.layout.stacks:
                        yield name, tensor
                        continue
                    for part in self.layout.stacks[name]:
                        yield part, self.layout.places[part].of(tensor)

    def _is_copy(self, name: str) -> bool:
        place = self.layout.places.get(name)
        return name == HEAD if place is None else place.copy  # a head beside tied embeddings

    def _check_index(self) -> None:
        index = self.directory / INDEX
        if not index.exists():
            return
        for name, file in read_json(index)["weight_map"].items():
            if name not in self._headers or self._headers[name][0].name != file:
                raise UserError(f"{index} promises {name} in {file}, which does not hold it")

    def _check_size(self) -> None:
        """A config.json that lies must not make us count to a billion."""
        cfg = self.config
        held = sum(spec.nbytes for _, spec in self._headers.values())
        if cfg.num_layers_with_mtp > len(self._headers) or cfg.n_routed_experts > held:
            raise UserError(f"{self.directory}: config.json announces more layers or experts than the files can hold")

    def _check_names(self) -> None:
        cfg, expected, stacks = self.config, self.layout.places, self.layout.stacks
        present: set[str] = set()
        for name, (file, spec) in self._headers.items():
            if name not in expected and name not in stacks and not (name == HEAD and cfg.tie_word_embeddings):
                raise UserError(f"{file} holds {name}, which a model of this config.json does not have")
            parts = stacks.get(name, (name,))
            shape = self.layout.shape(EMBEDDING if name not in expected and name not in stacks else name)
            if spec.shape != shape:
                raise UserError(f"{name} in {file} has shape {list(spec.shape)}; config.json asks for {list(shape)}")
            if spec.dtype not in DTYPE_WORDS:
                raise UserError(f"{name} in {file} is {spec.dtype} without scales, which Baleen cannot read")
            if not present.isdisjoint(parts):
                raise UserError(f"{file} holds {name} stacked, and its experts one by one as well")
            present.update(parts)
        missing = [name for name in self.layout.originals() if name not in present]
        if not missing:
            return
        last = f"model.layers.{cfg.num_hidden_layers}."
        cure = ""
        if all(_layer(name) >= cfg.num_hidden_layers for name in missing) and not any(map(_is_of(last), present)):
            cure = ': to load it without MTP, set "num_nextn_predict_layers": 0 in config.json'
        raise UserError(f"{self.directory} lacks {missing[0]}{_and_more(missing)}{cure}")

    def _check_copies(self) -> None:
        for name, (file, _) in self._headers.items():
            if not self._is_copy(name):
                continue
            original = EMBEDDING if name.endswith("embed_tokens.weight") else self.layout.head
            with _opened(file) as one, _opened(self._headers[original][0]) as other:
                if not torch.equal(one.get_tensor(name), other.get_tensor(original)):
                    raise UserError(f"{name} in {file} differs from {original}; Baleen shares the two")


def load_model(
    directory: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """A model from per-expert or stacked tensors, in one file or in shards; `dtype` None: as on disk.

    Raises UserError as `Checkpoint` does.
    """
    checkpoint = Checkpoint(directory)
    return model_from_stream(checkpoint.config, checkpoint.tensors(), dtype or checkpoint.dtype, device)


def model_from_stream(
    config: ModelConfig, tensors: TensorStream, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Transformer:
    """Fill a new model; every tensor must come once (copies left out)."""
    with torch.device("meta"):
        model = Transformer(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary.reset_parameters()
    state, layout = model.state_dict(), Layout(config)
    awaited = set(layout.originals())
    for name, tensor in tensors:
        awaited.remove(name)
        place = layout.places[name]
        place.of(state[place.name]).copy_(tensor)
    assert not awaited, f"the stream ended without {sorted(awaited)[:3]}"
    return model


def model_stream(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model by their names on disk, as views."""
    state, layout = model.state_dict(), Layout(model.config)
    for name in layout.originals():
        place = layout.places[name]
        yield name, place.of(state[place.name])


def save_model(
    model: Transformer,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: SavesTokenizer | None = None,
    generation: Mapping[str, Any] | None = None,
    card: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write config.json, *.safetensors, generation_config.json and what else is given; a model there is replaced.

    dtype: of the weights on disk, None: as in memory; the correction bias stays float32. generation: further keys for
    generation_config.json, such as {"temperature": 0.6}. card: text of README.md. Written aside, then renamed: after an
    error (a full disk) the directory is as it was.
    """
    kind = dtype or model.model.norm.weight.dtype
    specs = {name: Spec(kind, tuple(tensor.shape)) for name, tensor in model_stream(model)}
    with replaced_when_complete(Path(directory)) as aside:
        write_weights(aside, model.config, model_stream(model), specs, max_shard_bytes)
        write_json(aside / "generation_config.json", _generation(model.config, generation or {}))
        if tokenizer is not None:
            tokenizer.save(aside)
        if card is not None:
            (aside / "README.md").write_text(card, encoding="utf-8")


def write_weights(
    directory: Path,
    config: ModelConfig,
    tensors: TensorStream,
    specs: Mapping[str, Spec],
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """config.json and *.safetensors from a stream, in the dtypes of `specs` (the correction bias in float32)."""
    specs = {name: _kept_wide(name, spec) for name, spec in specs.items()}
    layout = Layout(config)
    copies = {name: layout.copies(name) for name in (EMBEDDING, HEAD)}
    specs |= {copy: specs[name] for name, names in copies.items() for copy in names}
    words = model_config_to_hf(config) | {"torch_dtype": DTYPE_WORDS[specs[EMBEDDING].dtype]}
    write_json(directory / "config.json", dict(sorted(words.items())))
    with ShardWriter(directory, specs, max_shard_bytes) as writer:
        for name, tensor in tensors:
            for target in (name, *copies.get(name, ())):
                writer.write(target, tensor)


def copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, template, generation settings and licence of a checkpoint."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _generation(config: ModelConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    sampling = {"do_sample": True} if settings.keys() & {"temperature", "top_p", "top_k", "min_p"} else {}
    return {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id} | sampling | dict(settings)


def _kept_wide(name: str, spec: Spec) -> Spec:
    return Spec(torch.float32, spec.shape) if name.endswith(CORRECTION_BIAS) else spec


def _weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights. Raises UserError if there are none, or only pickles."""
    if (index := directory / INDEX).exists():
        weight_map = read_json(index).get("weight_map")
        names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) and weight_map else []
        if not names or not all(map(_is_shard_name, names)):
            raise UserError(f"{index} has no weight_map of tensor names to .safetensors files beside it")
        for name in names:
            if not (directory / name).is_file():
                raise UserError(f"{directory / name} is missing; {INDEX} names it")
        return [directory / name for name in names]
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


def _opened(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is damaged or not safetensors: {error}") from None


def _read_header(file: Path) -> dict[str, Spec]:
    specs = {}
    with _opened(file) as shard:
        for name in shard.keys():  # noqa: SIM118
            view = shard.get_slice(name)
            if view.get_dtype() not in DTYPES:
                raise UserError(f"{name} in {file} is {view.get_dtype()}, a quantisation that Baleen cannot read")
            specs[name] = Spec(DTYPES[view.get_dtype()], tuple(view.get_shape()))
    return specs


def _check_values(tensor: Tensor, where: str, checksum: str | None) -> None:
    if checksum is not None and f"{zlib.crc32(raw_bytes(tensor)):08x}" != checksum:
        raise UserError(f"{where} is damaged: its checksum does not match")
    if not tensor.isfinite().all():
        raise UserError(f"{where} holds NaN or infinite values")


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else -1


def _is_of(prefix: str):
    return lambda name: name.startswith(prefix)


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
