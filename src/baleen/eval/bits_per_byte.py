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
THOUGHT_ENDS = "</think>"
LOGITS_AT_ONCE = 1024  # of which each is as wide as the vocabulary


@torch.inference_mode()
def bits_per_byte(
    model: Transformer, tokenizer: Tokenizer, documents: Iterable[Document], *, window: int, stride: int | None = None
) -> dict[str, float]:
    """{bits_per_byte, bytes, tokens} of documents, each read from its own beginning.

    A document longer than `window` tokens is read in windows that start every `stride` tokens (half a window unless
    given), each token counted once, in the first window that holds it. All tokens count but the first of a document
    (bos, or without one the eos of another); the bytes are those of Document.text, in UTF-8, less the thoughts of
    earlier turns where the chat template leaves them out.
    """
    stride = window // 2 if stride is None else stride
    assert 1 <= stride < window, "the next window must begin before this one ends"
    nats, tokens, size = 0.0, 0, 0
    rows: list[tuple[list[int], int]] = []
    for document in documents:
        size += len(_scored_text(tokenizer, document).encode())
        rows += _windows(_encode(tokenizer, document), window, stride)
    for batch in _batches(sorted(rows, key=lambda row: len(row[0]))):
        longest = max(len(ids) for ids, _ in batch)
        ids_BT = torch.zeros(len(batch), longest, dtype=torch.long, device=model.device)
        counted_BT = torch.zeros(len(batch), longest, dtype=torch.bool, device=model.device)
        for b, (ids, first) in enumerate(batch):
            ids_BT[b, : len(ids)] = torch.tensor(ids, device=model.device)
            counted_BT[b, first : len(ids)] = True
        counted_BT = counted_BT[:, 1:]
        hidden_Nd = model(ids_BT[:, :-1]).hidden_BTd[counted_BT]
        targets_N = ids_BT[:, 1:][counted_BT]
        for some_Nd, of_them_N in zip(hidden_Nd.split(LOGITS_AT_ONCE), targets_N.split(LOGITS_AT_ONCE), strict=True):
            loss_N = F.cross_entropy(model.logits(some_Nd).float(), of_them_N, reduction="none")
            nats += loss_N.double().sum().item()
        tokens += len(targets_N)
    return {"bits_per_byte": nats / math.log(2) / max(1, size), "bytes": size, "tokens": tokens}


def _encode(tokenizer: Tokenizer, document: Document) -> list[int]:
    if document.messages is not None:
        return tokenizer.encode_chat(document.messages)
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return [start, *tokenizer.encode(document.text), tokenizer.eos_id]


def _scored_text(tokenizer: Tokenizer, document: Document) -> str:
    """Document.text without the thoughts that the chat template leaves out, whose tokens are not read either."""
    if document.messages is None or THOUGHT_ENDS not in document.text:
        return document.text
    rendered = tokenizer.render(document.messages)
    shown = (
        m.content if m.content in rendered else m.content.split(THOUGHT_ENDS)[-1].lstrip("\n")
        for m in document.messages
    )
    return "".join(f"{content}\n" for content in shown)


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
