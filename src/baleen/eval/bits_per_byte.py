"""Bits per byte of text: a loss that does not depend on the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F

from baleen.data.document import Document
from baleen.data.tokenizer import Tokenizer
from baleen.model.transformer import Transformer

TOKENS_AT_ONCE = 8192


@torch.inference_mode()
def bits_per_byte(
    model: Transformer, tokenizer: Tokenizer, documents: Iterable[Document], *, window: int, stride: int | None = None
) -> dict[str, float]:
    """{bits_per_byte, bytes, tokens} of documents, each read from its own beginning.

    A document longer than `window` tokens is read in windows that start every `stride` tokens (half a window unless
    given), each token counted once, in the first window that holds it. All tokens count but the first of a document
    (bos); the bytes are those of Document.text, in UTF-8.
    """
    stride = window // 2 if stride is None else stride
    assert 1 <= stride < window, "the next window must begin before this one ends"
    nats, tokens, size = 0.0, 0, 0
    rows: list[tuple[list[int], int]] = []
    for document in documents:
        size += len(document.text.encode())
        rows += _windows(_encode(tokenizer, document), window, stride)
    for batch in _batches(sorted(rows, key=lambda row: len(row[0]))):
        longest = max(len(ids) for ids, _ in batch)
        ids_BT = torch.zeros(len(batch), longest, dtype=torch.long, device=model.device)
        counted_BT = torch.zeros(len(batch), longest, dtype=torch.bool, device=model.device)
        for b, (ids, first) in enumerate(batch):
            ids_BT[b, : len(ids)] = torch.tensor(ids, device=model.device)
            counted_BT[b, first : len(ids)] = True
        logits = model.logits(model(ids_BT[:, :-1]).hidden_BTd).float()
        loss = F.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
        nats += loss[counted_BT[:, 1:].flatten()].double().sum().item()
        tokens += int(counted_BT[:, 1:].sum())
    return {"bits_per_byte": nats / math.log(2) / max(1, size), "bytes": size, "tokens": tokens}


def _encode(tokenizer: Tokenizer, document: Document) -> list[int]:
    if document.messages is not None:
        return tokenizer.encode_chat(document.messages)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [*start, *tokenizer.encode(document.text), tokenizer.eos_id]


def _windows(ids: list[int], window: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """(tokens, index of the first one that counts); at least one token of context stands before it."""
    start, done = 0, 1
    while done < len(ids):
        yield ids[start : start + window], done - start
        done = min(len(ids), start + window)
        start += stride


def _batches(rows: list[tuple[list[int], int]]) -> Iterator[list[tuple[list[int], int]]]:
    """Rows, shortest first, in batches of at most TOKENS_AT_ONCE with their padding."""
    batch: list[tuple[list[int], int]] = []
    for row in rows:
        if batch and (len(batch) + 1) * len(row[0]) > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
