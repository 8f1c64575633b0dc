"""Text of the model's own: beginnings of documents, continued greedily."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from baleen.config import UserError
from baleen.data.loader import Batch, Loader
from baleen.data.packing import PackedTokens, TokenisedDocument, pack_to
from baleen.data.tokenizer import Tokenizer, find
from baleen.infer.engine import Engine, Request
from baleen.infer.sampler import SamplingParams
from baleen.model.transformer import Transformer
from baleen.train.continued_recipe import OwnTextConfig

AT_ONCE = 32  # answers in one batch of the engine


def own_text(
    model: Transformer,
    tokenizer: Tokenizer,
    packed: PackedTokens,
    config: OwnTextConfig,
    directory: Path,
    *,
    seed: int,
    progress: Callable[[str], None],
) -> PackedTokens:
    """Prompts from the packed documents with the model's answers, which the loss mask marks, packed into a folder of
    `directory`, or found there: named by all that the answers hang on.

    A killed process leaves nothing there, and its work is done again.
    """
    directory /= _digest(model, tokenizer, packed, config, seed)
    if not directory.is_dir():
        prompts = beginnings(tokenizer, packed, config, seed)
        most = sum(len(prompt) + config.max_tokens for prompt in prompts)
        if most <= packed.seq_len:
            raise UserError(
                f"own_text makes at most {most} tokens, which fill no row of {packed.seq_len}: raise own_text.prompts "
                "or own_text.max_tokens, or take a shorter train.seq_len"
            )
        aside = directory.with_name(f".{directory.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            pack_to(aside, _answered(Engine(model, tokenizer), tokenizer, prompts, config, progress), packed.seq_len)
        except UserError:
            shutil.rmtree(aside)
            raise UserError(
                f"the model's own answers were too short to fill a row of {packed.seq_len}: raise own_text.prompts, or "
                "take a shorter train.seq_len"
            ) from None
        os.replace(aside, directory)
    return PackedTokens.open(directory, packed.seq_len)


class WithOwnText(Loader):
    """Rows of the text, and behind them in each batch a share of rows of the model's own."""

    def __init__(self, text: PackedTokens, own: PackedTokens, share: float, *, seed: int):
        super().__init__(text, seed=seed)
        self._own, self._share, self._given = Loader(own, seed=seed), share, 0

    def next_batch(self, sequences: int) -> Batch:
        before, self._given = self._given, self._given + sequences  # a share of all rows, however few a batch has
        own = round(self._given * self._share) - round(before * self._share)
        parts = [super().next_batch(sequences - own)] if own < sequences else []
        parts += [self._own.next_batch(own)] if own else []
        masks = [torch.ones_like(p.tokens) if p.loss_mask is None else p.loss_mask for p in parts]
        return Batch(torch.cat([p.tokens for p in parts]), torch.cat([p.document_ids for p in parts]), torch.cat(masks))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"own": self._own.state_dict(), "given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._own.load_state_dict(state["own"])
        self._given = state["given"]


def _digest(model: Transformer, tokenizer: Tokenizer, packed: PackedTokens, config: OwnTextConfig, seed: int) -> str:
    named = [config.model_dump_json(), model.config.model_dump_json(), tokenizer.fingerprint, packed.fingerprint, seed]
    digest = hashlib.blake2b(json.dumps(named).encode(), digest_size=8)
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().float().cpu().numpy().data)
    return digest.hexdigest()


def beginnings(tokenizer: Tokenizer, packed: PackedTokens, config: OwnTextConfig, seed: int) -> list[list[int]]:
    """`config.prompts` different prompts, fewer if there are fewer, of documents in an order drawn by `seed`: up to
    where the assistant first speaks, else the first `prompt_tokens` tokens."""
    ids, tokens = packed.flat_document_ids, packed.flat_tokens
    starts = np.flatnonzero(np.diff(ids, prepend=-1))
    opening = tokenizer.assistant_opening
    prompts: dict[tuple[int, ...], None] = {}
    for index in np.random.default_rng(seed).permutation(len(starts)):
        if len(prompts) == config.prompts:
            break
        stop = starts[index + 1] if index + 1 < len(starts) else len(tokens)
        document = tokens[starts[index] : stop].tolist()
        at = find(document, opening) if opening else -1
        prompt = document[: at + len(opening)] if at >= 0 else document[: config.prompt_tokens]
        if len(prompt) < packed.seq_len:
            prompts.setdefault(tuple(prompt))
    return [list(prompt) for prompt in prompts]


def _answered(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    config: OwnTextConfig,
    progress: Callable[[str], None],
) -> Iterator[TokenisedDocument]:
    params = SamplingParams(temperature=0.0, max_tokens=config.max_tokens)
    for start in range(0, len(prompts), AT_ONCE):
        batch = prompts[start : start + AT_ONCE]
        answers = engine.complete([Request(prompt, params) for prompt in batch])
        for prompt, answer in zip(batch, answers, strict=True):
            end = [tokenizer.eos_id] if answer.finish_reason == "stop" else []
            said = list(answer.token_ids)
            said += end if said[-1:] != end else []
            yield TokenisedDocument([*prompt, *said], [0] * len(prompt) + [1] * len(said))
        progress(f"the model's own words: {min(start + AT_ONCE, len(prompts)):,} of {len(prompts):,} answers")
