"""The tokenizer inside a GGUF file: read as a fast tokenizer, and written from one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from baleen.config import UserError, read_json
from baleen.data.tokenizer import Tokenizer
from baleen.data.tokenizer_training import DIGIT, V3_PRETOKENS, pretokens
from baleen.interop.gguf_file import GGUFFile

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types
# Llama 3's split, from its published tokenizer.json.
LLAMA3_PRETOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
V3_NUMBERS = r"\p{N}{1,3}"  # where ours takes one digit at a time
NAMED = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


# By llama.cpp's names.
PRE_TOKENIZERS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": pretokens(LLAMA3_PRETOKENS),
    "deepseek-v3": pretokens(V3_NUMBERS, *V3_PRETOKENS),
}


def tokenizer_from_gguf(file: GGUFFile) -> Tokenizer:
    """Byte-level BPE with the special tokens and the chat template. Raises UserError for another kind."""
    kind, split = file.field("tokenizer.ggml.model", str), file.field("tokenizer.ggml.pre", str, "gpt-2")
    if kind != "gpt2":
        raise UserError(f"{file.path} has a {kind!r} tokenizer; Baleen reads byte-level BPE ('gpt2') from GGUF files")
    split = "gpt-2" if split == "default" else split
    if split not in PRE_TOKENIZERS:
        raise UserError(f"{file.path} splits text as {split!r}; Baleen knows {', '.join(PRE_TOKENIZERS)}")
    tokens, merged = (file.field(f"tokenizer.ggml.{key}", list) for key in ("tokens", "merges"))
    if not all(isinstance(text, str) for text in (*tokens, *merged)):
        raise UserError(f"{file.path} has a tokenizer whose tokens or merges are not text")
    types = file.field("tokenizer.ggml.token_type", list)
    merges = [tuple(merge.split(" ")) for merge in merged]
    if len(types) != len(tokens) or any(len(pair) != 2 for pair in merges) or len(set(tokens)) != len(tokens):
        raise UserError(f"{file.path} has a tokenizer whose lists do not fit each other")
    try:
        vocabulary = {token: id for id, token in enumerate(tokens) if types[id] != UNUSED}
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split == "llama-bpe"))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{file.path} has a tokenizer that `tokenizers` cannot build: {error}") from None
    backend.pre_tokenizer = PRE_TOKENIZERS[split]
    backend.decoder = decoders.ByteLevel()
    for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
        found = [token for token, kind in zip(tokens, types, strict=True) if kind == wanted]
        backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in found])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key, name in NAMED.items():
        id = file.field(f"tokenizer.ggml.{name}_token_id", int, -1)
        if 0 <= id < len(tokens):
            settings[key] = tokens[id]
    # llama.cpp begins a text of Llama 3 with bos where the file is silent.
    if file.field("tokenizer.ggml.add_bos_token", bool, split == "llama-bpe") and "bos_token" in settings:
        bos = settings["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return Tokenizer(backend, settings, file.field("tokenizer.chat_template", str, "") or None)


def tokenizer_settings(directory: Path, vocab_size: int) -> dict[str, Any]:
    """Metadata of a GGUF file for the tokenizer in a model directory; rows of the embedding without a token are unused.

    Raises UserError if it is none, no byte-level BPE, or splits text in a way that llama.cpp has no name for.
    """
    tokenizer = Tokenizer.load(directory)
    description = json.loads(tokenizer.definition)  # as the library writes it, nothing left out
    model, added = description["model"], {token["id"]: token for token in description["added_tokens"]}
    if model["type"] != "BPE" or not _changes_nothing(description.get("normalizer")):
        raise UserError(f"{directory} has no byte-level BPE tokenizer, the only kind that Baleen writes to GGUF")
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{directory} has a tokenizer of {tokenizer.vocab_size} tokens for a model of {vocab_size}")
    names = {id: token for token, id in model["vocab"].items()} | {id: token["content"] for id, token in added.items()}
    kinds = dict.fromkeys(names, NORMAL)
    kinds |= {id: CONTROL if token["special"] else USER_DEFINED for id, token in added.items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    out: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _name_of(description, directory),
        "tokenizer.ggml.tokens": [names.get(id, f"[UNUSED_{id}]") for id in range(vocab_size)],
        "tokenizer.ggml.token_type": [kinds.get(id, UNUSED) for id in range(vocab_size)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": _adds_bos(description, directory),
    }
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    out |= {f"tokenizer.ggml.{name}_token_id": id for name, id in ids.items() if id is not None}
    if tokenizer.template is not None:
        # transformers' marks around the assistant's words mean nothing to llama.cpp; a comment trims spaces as they do
        template = re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{#\1 \2#}", tokenizer.template)
        out["tokenizer.chat_template"] = template
    return out


def _changes_nothing(normalizer: dict[str, Any] | None) -> bool:
    """DeepSeek's own tokenizer.json has an empty sequence of normalizers."""
    return not normalizer or (normalizer["type"] == "Sequence" and not normalizer["normalizers"])


def _adds_bos(description: dict[str, Any], directory: Path) -> bool:
    """As tokenizer_config.json says, for DeepSeek's tokenizer.json does not; else whether a template adds one."""
    said = read_json(directory / "tokenizer_config.json").get("add_bos_token")
    return said if isinstance(said, bool) else "SpecialToken" in json.dumps(description.get("post_processor"))


def _name_of(description: dict[str, Any], directory: Path) -> str:
    """llama.cpp's name for how text is split before the merges."""
    found, whole_words = _canonical(description.get("pre_tokenizer")), bool(description["model"].get("ignore_merges"))
    for name, known in PRE_TOKENIZERS.items():
        if _description_of(known) == found and whole_words == (name == "llama-bpe"):  # the name decides that too
            return name
    ours = not whole_words and _description_of(pretokens(DIGIT, *V3_PRETOKENS)) == found
    if ours and not any(re.search(r"\d\d", token) for token in description["model"]["vocab"]):
        return "deepseek-v3"  # merges within longer numbers, of which there are none
    raise UserError(f"{directory} has a tokenizer that splits text as llama.cpp cannot: it would read prompts wrongly")


def _description_of(pre_tokenizer: pre_tokenizers.PreTokenizer) -> str:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    return _canonical(json.loads(backend.to_str())["pre_tokenizer"])


def _canonical(pre_tokenizer: Any) -> str:
    """A line break may stand as itself or as an escape; offsets do not concern the tokens."""
    text = json.dumps(pre_tokenizer, sort_keys=True)
    return re.sub(r'"trim_offsets": \w+', "", text.replace(r"\\r", r"\r").replace(r"\\n", r"\n"))
