"""A tokenizer made from text: a byte-level BPE with V3's split into pretokens and our special tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from baleen.config import UserError
from baleen.data.control import REASONING_TOKENS
from baleen.data.template import BALEEN_TEMPLATE
from baleen.data.tokenizer import BYTE_OF_CHARACTER, Tokenizer

BOS, EOS, PAD = "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|pad|>"
# fmt: off
SPECIAL_TOKENS = (
    BOS, EOS, PAD, "<|user|>", "<|assistant|>", "<|system|>", "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>",
    *REASONING_TOKENS, "<|tool_calls_begin|>", "<|tool_call_begin|>", "<|tool_sep|>", "<|tool_call_end|>",
    "<|tool_calls_end|>", "<|tool_output_begin|>", "<|tool_output_end|>",
)
# fmt: on
# V3's split, one pattern after the other: numbers, then Chinese and Japanese, then the rest, where punctuation takes
# the line breaks after it along (§4.1). V3 takes up to three digits at a time; single ones let numbers of any length
# line up by place, so that a small model can learn to reckon, and spare a small vocabulary a thousand entries.
# llama.cpp knows the split as `deepseek-v3`, which is this one too as long as no token holds two digits.
DIGIT = r"\p{N}"
V3_PRETOKENS = (
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` entries: special tokens first, then the 256 bytes, then merges.

    Deterministic. Raises UserError if `vocab_size` is too small, or larger than the text can fill.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise UserError(f"vocab_size is {vocab_size}: the special tokens and the 256 bytes alone need {smallest}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pretokens(DIGIT, *V3_PRETOKENS)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=sorted(BYTE_OF_CHARACTER),
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() < vocab_size:
        raise UserError(
            f"vocab_size is {vocab_size}, but the text fills only {backend.get_vocab_size()}: "
            "set model.vocab_size to that or less, or give more text"
        )
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    description = json.loads(backend.to_str())
    for token in description["added_tokens"]:
        token["special"] = token["content"] not in REASONING_TOKENS  # they are words to be shown and scored
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(description)), settings, BALEEN_TEMPLATE)


def pretokens(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Text is cut at the matches of each pattern in turn, then its bytes are written as characters."""
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
