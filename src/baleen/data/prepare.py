"""The whole way from sources to packed training tokens and held-out documents, cached."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers

from baleen.config import UserError, read_json
from baleen.data.clean import clean, heldout_threshold, text_hash
from baleen.data.corpus import read_documents, source_files
from baleen.data.document import Document, Message
from baleen.data.fim import cut_for_fim, fim_tokens
from baleen.data.packing import PackedTokens, TokenisedDocument, pack_to
from baleen.data.tokenizer import Tokenizer
from baleen.data.tokenizer_training import train_tokenizer
from baleen.recipe import DataConfig

FORMAT_VERSION = 3  # raise it when the same settings would give other tokens
BATCH_DOCUMENTS = 512  # tokenised at once, on all cores
# A book is one file: uncut it would be wholly in training or wholly held out. About eight rows of English a section.
SECTION_CHARS_PER_TOKEN = 32
MIN_SECTION_CHARS = 8192


@dataclass(frozen=True)
class Prepared:
    """`stats` counts files (read, binary, empty, other), documents (read, filtered, duplicate, train, heldout), their
    bytes (as bits per byte counts them) and the tokens of the training part."""

    tokenizer: Tokenizer
    train: PackedTokens
    heldout: list[Document]
    stats: dict[str, int]


def prepare(
    data: DataConfig,
    *,
    vocab_size: int,
    seq_len: int,
    seed: int,
    cache_dir: Path,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Prepared:
    """Reads, cleans, splits, trains the tokenizer on the training part (unless one is given), tokenises and packs.

    The result is kept in `cache_dir` under a key of the settings and of the sources' names, sizes and times, so that a
    second call only opens it. `progress` is told each step in words. Raises UserError for bad sources, settings that do
    not fit together, or too little text.
    """
    check_data(data)
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} entries: set model.vocab_size to that or more")
    key = _cache_key(data, vocab_size, seq_len, seed, tokenizer)
    directory = cache_dir / key
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _locked(cache_dir):
        if not directory.is_dir():
            aside = cache_dir / ".building"
            shutil.rmtree(aside, ignore_errors=True)  # what a killed process left
            aside.mkdir()
            try:
                _build(aside, data, vocab_size, seq_len, seed, tokenizer, progress)
                os.replace(aside, directory)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return Prepared(
        tokenizer or Tokenizer.load(directory / "tokenizer"),
        PackedTokens.open(directory, seq_len),
        list(_read_spool(directory / "heldout.jsonl")),
        read_json(directory / "stats.json"),
    )


def check_data(data: DataConfig) -> None:
    """Raises UserError for settings that do not fit together and sources that are not there; reads none of them."""
    if data.format == "chat" and (data.fim_rate or data.pretoken_split_rate):
        raise UserError(
            "data.fim_rate and data.pretoken_split_rate are for data.format 'text': set them to 0 for 'chat'"
        )
    for source in data.sources:
        source_files(source)


def section_chars(seq_len: int) -> int:
    """Where a text is longer, it is cut into sections, of which some are held out."""
    return max(MIN_SECTION_CHARS, SECTION_CHARS_PER_TOKEN * seq_len)


def _cache_key(data: DataConfig, vocab_size: int, seq_len: int, seed: int, tokenizer: Tokenizer | None) -> str:
    files = [(str(path), path.stat()) for source in data.sources for path in source_files(source)]
    identity = {
        "version": [FORMAT_VERSION, tokenizers.__version__],
        "data": data.model_dump(),
        "numbers": [vocab_size, seq_len, seed],
        "files": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files],
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
    }
    return blake2b(json.dumps(identity).encode(errors="surrogatepass"), digest_size=12).hexdigest()


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process at a time: of the ranks on a machine the first builds, the others wait and open."""
    with (directory / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(
    directory: Path,
    data: DataConfig,
    vocab_size: int,
    seq_len: int,
    seed: int,
    tokenizer: Tokenizer | None,
    progress: Callable[[str], None],
) -> None:
    counts: Counter[str] = Counter()
    spool = directory / "documents.jsonl"  # read once, cleaned once, however large
    progress("reading and cleaning the text")
    documents = read_documents(data.sources, data.format, counts)
    if data.format == "text":
        documents = _sections(documents, section_chars(seq_len))
    hashes = _write_spool(spool, clean(documents, min_chars=data.min_chars, counts=counts))
    if not hashes:
        raise UserError(
            f"nothing is left of the text: of {counts['documents_read']} documents all are shorter than data.min_chars "
            f"({data.min_chars}) or one phrase over and over"
        )
    threshold = heldout_threshold(hashes, data.heldout_fraction)
    if max(hashes) < threshold:
        raise UserError(
            f"the text makes {len(hashes)} document(s) after cleaning, too few to train on some and hold others out: "
            "give more text, or set data.heldout_fraction lower (0 holds nothing out)"
        )

    def train_documents() -> Iterator[Document]:
        return (d for d, h in zip(_read_spool(spool), hashes, strict=True) if h >= threshold)

    heldout = (d for d, h in zip(_read_spool(spool), hashes, strict=True) if h < threshold)
    _write_spool(directory / "heldout.jsonl", _counted(heldout, "heldout", counts))
    if tokenizer is None:
        progress(f"training a tokenizer of {vocab_size} entries")
        tokenizer = train_tokenizer(_texts(train_documents()), vocab_size)
    tokenizer.save(directory / "tokenizer")
    progress("turning the text into tokens")
    training = _counted(train_documents(), "train", counts)
    packed = pack_to(directory, _tokenise(training, tokenizer, data, seed, counts), seq_len)
    spool.unlink()
    (directory / "stats.json").write_text(json.dumps(dict(sorted(counts.items())), indent=2), encoding="utf-8")
    progress(
        f"{counts['documents_train']:,} documents to train on, {counts['documents_heldout']:,} held out; "
        f"{counts['tokens_train']:,} tokens in {len(packed):,} rows"
    )


def _sections(documents: Iterable[Document], max_chars: int) -> Iterator[Document]:
    """Long documents cut at the end of a paragraph, else of a line, else anywhere; joined they are the document."""
    for document in documents:
        text, start, number = document.text, 0, 0
        while len(text) - start > max_chars:
            window = text[start : start + max_chars]
            half = max_chars // 2
            cuts = [window.rfind(mark, half) + len(mark) for mark in ("\n\n", "\n", " ") if mark in window[half:]]
            stop = start + (cuts[0] if cuts else max_chars)
            number += 1
            yield Document(text[start:stop], f"{document.source} section {number}")
            start = stop
        yield Document(text[start:], f"{document.source} section {number + 1}" if number else document.source)


def _texts(documents: Iterable[Document]) -> Iterator[str]:
    """What the tokenizer learns from: in a conversation no line break joins one turn to the next."""
    for document in documents:
        if document.messages is None:
            yield document.text
        else:
            yield from (message.content for message in document.messages)


def _tokenise(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    data: DataConfig,
    seed: int,
    counts: Counter[str],
) -> Iterator[TokenisedDocument]:
    documents = iter(documents)
    while batch := list(islice(documents, BATCH_DOCUMENTS)):
        if data.format == "chat":
            tokenised = _tokenise_chats(batch, tokenizer)
        else:
            tokenised = _tokenise_texts(batch, tokenizer, data, seed)
        for document in tokenised:
            counts["tokens_train"] += len(document.tokens)
            yield document


def _tokenise_chats(batch: list[Document], tokenizer: Tokenizer) -> Iterator[TokenisedDocument]:
    chats = [document.messages or () for document in batch]
    for messages, ids in zip(chats, tokenizer.encode_chats(chats), strict=True):
        if tokenizer.eos_id not in ids or not messages or messages[-1].role != "assistant":
            ids.append(tokenizer.eos_id)
        yield TokenisedDocument(ids)


def _tokenise_texts(
    batch: list[Document], tokenizer: Tokenizer, data: DataConfig, seed: int
) -> Iterator[TokenisedDocument]:
    # Each document has a generator of its own, so that what becomes of it does not depend on the others.
    rngs = [np.random.default_rng((seed, text_hash(document.text))) for document in batch]
    cuts = [cut_for_fim(d.text, data.fim_rate, rng) for d, rng in zip(batch, rngs, strict=True)]
    pieces = [cut or (document.text,) for document, cut in zip(batch, cuts, strict=True)]
    encoded = iter(tokenizer.encode_batch([text for texts in pieces for text in texts]))
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for texts, rng in zip(pieces, rngs, strict=True):
        parts = [tokenizer.split_joined(next(encoded), data.pretoken_split_rate, rng) for _ in texts]
        ids = parts[0] if len(parts) == 1 else fim_tokens(parts[0], parts[1], parts[2], tokenizer)
        yield TokenisedDocument([*bos, *ids, tokenizer.eos_id])


def _counted(documents: Iterable[Document], part: str, counts: Counter[str]) -> Iterator[Document]:
    for document in documents:
        counts[f"documents_{part}"] += 1
        counts[f"bytes_{part}"] += len(document.text.encode())
        yield document


def _write_spool(path: Path, documents: Iterable[Document]) -> list[int]:
    """Writes the documents, one JSON object a line, and gives their hashes."""
    hashes = []
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            messages = document.messages and [[message.role, message.content] for message in document.messages]
            file.write(json.dumps([document.text, document.source, messages]) + "\n")
            hashes.append(text_hash(document.text))
    return hashes


def _read_spool(path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            text, source, messages = json.loads(line)
            yield Document(text, source, None if messages is None else tuple(Message(*turn) for turn in messages))
