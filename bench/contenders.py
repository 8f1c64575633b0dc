"""One random network in Baleen, in transformers and in llama.cpp, behind one interface: for decode.py and prefill.py.

A contender reads prompts and then takes one token of each sequence a step, which it is told: so all compute the same.
It returns, each time, the logits of every sequence's last token.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from baleen.config import ModelConfig, model_config_to_hf
from baleen.data.tokenizer_training import train_tokenizer
from baleen.infer.native.runner import NativeRunner, fastest_runner
from baleen.infer.native.weights import Format
from baleen.interop.gguf_export import export_gguf
from baleen.interop.huggingface import save_model
from baleen.model.cache import Batch, LatentPages
from baleen.model.transformer import Transformer

PAGE = 16


def network(name: str, **changes: int) -> Transformer:
    """Config S, M or L, with some keys changed, and random weights, always the same."""
    configs = tomllib.loads((Path(__file__).parent / "configs.toml").read_text())
    model = Transformer(ModelConfig(**configs[name] | changes))
    model.init_weights(0)
    return model.eval()


def machine() -> dict[str, object]:
    """CPUs of one name may be of several generations, which family and model tell apart."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    cpu = f"{facts.get('model name', platform.processor())} ({torch.backends.cpu.get_cpu_capability()})"
    if "cpu family" in facts:
        cpu = f"{cpu}, family {facts['cpu family']}, model {facts.get('model')}"
    return {"cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__}


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    modules = {"transformers": "transformers", "llama-cpp-python": "llama_cpp"}
    return {name: metadata.version(name) for name, module in modules.items() if importlib.util.find_spec(module)}


class Contender(Protocol):
    name: str

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Forget everything, read the prompts, all of one length; logits [B, Z]."""
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """One more token of each sequence; logits [B, Z]."""
        ...


class Baleen:
    """The runner of the engine, as it chooses it; `path` says whether that was native."""

    def __init__(self, model: Transformer, format: Format | None, *, sequences: int, length: int):
        self.name = f"baleen {format or 'fp32'}"
        each = -(-length // PAGE)
        self._tables = [range(b * each, (b + 1) * each) for b in range(sequences)]
        self._runner = fastest_runner(model, LatentPages(model.config, sequences * each, page_size=PAGE), format)
        self.path = "native" if isinstance(self._runner, NativeRunner) else "pytorch"

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        B, self._length = len(prompts), len(prompts[0])
        batch = Batch([id for ids in prompts for id in ids], [0] * B, [self._length] * B, self._tables[:B])
        hidden_Nd = self._runner.forward(batch).hidden_Nd
        return self._runner.logits(hidden_Nd[self._length - 1 :: self._length])

    def step(self, tokens: Sequence[int]) -> Tensor:
        B = len(tokens)
        hidden_Nd = self._runner.forward(Batch(tokens, [self._length] * B, [1] * B, self._tables[:B])).hidden_Nd
        self._length += 1
        return self._runner.logits(hidden_Nd)


class Transformers:
    """DeepseekV3ForCausalLM on the same memory, with the cache that `generate` uses, its default paths."""

    def __init__(self, model: Transformer):
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

        self.name = "transformers"
        with torch.device("meta"):
            self._model = DeepseekV3ForCausalLM(DeepseekV3Config(**model_config_to_hf(model.config)))
        self._model.load_state_dict(model.state_dict(), assign=True)
        rotary = self._model.model.rotary_emb
        self._model.model.rotary_emb = type(rotary)(self._model.config)
        self._model.eval()

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)
        return self._forward(torch.tensor(prompts))

    def step(self, tokens: Sequence[int]) -> Tensor:
        return self._forward(torch.tensor(tokens)[:, None])

    def _forward(self, ids: Tensor) -> Tensor:
        out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]


class LlamaCpp:
    """llama.cpp on the exported file, cache in F32, as many threads as PyTorch has."""

    def __init__(self, path: Path, *, sequences: int, length: int):
        import llama_cpp

        self.name, self._c = f"llama.cpp {path.stem.split('-')[-1]}", llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        of_model = llama_cpp.llama_model_default_params()
        # Packed for AMX, its quantised weights abort on these networks (ggml-backend.cpp: no backend for a tensor).
        of_model.use_extra_bufts = not torch.cpu._is_amx_tile_supported()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), of_model)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * length, sequences
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.kv_unified = sequences > 1
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        assert self._context, "llama.cpp made no context"
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        self._length = 0
        logits = []
        for b, ids in enumerate(prompts):
            for first in range(0, len(ids), 512):
                part = ids[first : first + 512]
                rows = [(id, first + i, b, first + i == len(ids) - 1) for i, id in enumerate(part)]
                out = self._decode(rows)
            logits.append(out)
        self._length = len(prompts[0])
        return torch.cat(logits)

    def step(self, tokens: Sequence[int]) -> Tensor:
        out = self._decode([(id, self._length, b, True) for b, id in enumerate(tokens)])
        self._length += 1
        return out

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> Tensor:
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (id, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = id, position, 1, wanted
            batch.seq_id[i][0] = sequence
        assert self._c.llama_decode(self._context, batch) == 0
        wanted = [i for i, row in enumerate(rows) if row[3]]
        logits = [np.ctypeslib.as_array(self._c.llama_get_logits_ith(self._context, i), (self._vocab,)) for i in wanted]
        return torch.from_numpy(np.stack(logits)) if logits else torch.empty(0, self._vocab)


def gguf_file(model: Transformer, name: str, dtype: str, folder: Path) -> Path:
    """The network as a file for llama.cpp, made if it is not in `folder` yet."""
    path = folder / f"{name}-{dtype}.gguf"
    if not path.exists():
        directory = folder / name
        if not (directory / "config.json").exists():
            save_model(model, directory, tokenizer=train_tokenizer(["the whale and the krill, 12 of them\n" * 20], 290))
        export_gguf(directory, path, dtype=dtype)
    return path


def differences(a_BZ: Tensor, b_BZ: Tensor) -> list[float]:
    """Of each row of logits: root mean square of a - b, in that of b; of what is not a number, infinity."""
    apart = (a_BZ - b_BZ).square().mean(-1) / b_BZ.square().mean(-1)
    return apart.sqrt().nan_to_num(nan=float("inf")).tolist()
