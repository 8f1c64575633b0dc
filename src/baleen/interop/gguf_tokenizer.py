"""The tokenizer inside a GGUF file, as a fast tokenizer."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from baleen.config import UserError
from baleen.data.tokenizer import Tokenizer
from baleen.interop.gguf_file import GGUFFile

CONTROL, USER_DEFINED = 3, 4  # llama.cpp's token types
# Llama 3's split, from its published tokenizer.json.
LLAMA3_PRETOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_from_gguf(file: GGUFFile) -> Tokenizer:
    """Byte-level BPE with the special tokens and the chat template. Raises UserError for another kind."""
    kind, split = file.field("tokenizer.ggml.model", str), file.field("tokenizer.ggml.pre", str, "gpt-2")
    if kind != "gpt2":
        raise UserError(f"{file.path} has a {kind!r} tokenizer; Baleen reads byte-level BPE ('gpt2') from GGUF files")
    tokens = file.field("tokenizer.ggml.tokens", list)
    types = file.field("tokenizer.ggml.token_type", list)
    merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges", list)]
    if len(types) != len(tokens) or any(len(pair) != 2 for pair in merges) or len(set(tokens)) != len(tokens):
        raise UserError(f"{file.path} has a tokenizer whose lists do not fit each other")
    try:
        vocabulary = {token: id for id, token in enumerate(tokens)}
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split == "llama-bpe"))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{file.path} has a tokenizer that `tokenizers` cannot build: {error}") from None
    backend.pre_tokenizer = _pre_tokenizer(split, file)
    backend.decoder = decoders.ByteLevel()
    for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
        found = [token for token, kind in zip(tokens, types, strict=True) if kind == wanted]
        backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in found])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    named = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    for key, name in named.items():
        id = file.field(f"tokenizer.ggml.{name}_token_id", int, -1)
        if 0 <= id < len(tokens):
            settings[key] = tokens[id]
    return Tokenizer(backend, settings, file.field("tokenizer.chat_template", str, "") or None)


def _pre_tokenizer(split: str, file: GGUFFile) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split != "llama-bpe")
    match split:
        case "gpt-2" | "default":
            return byte_level
        case "smollm":
            return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        case "llama-bpe":
            splitter = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PRETOKENS), "isolated")
            return pre_tokenizers.Sequence([splitter, byte_level])
    raise UserError(f"{file.path} splits text as {split!r}; Baleen knows gpt-2, smollm and llama-bpe")
