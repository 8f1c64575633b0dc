"""One row: a model trained by a recipe, measured and thrown away. Stopped, it goes on where it was saved."""

from __future__ import annotations

import datetime
import math
import os
import platform
import shutil
import statistics
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from attention import cached_numbers, use_shared_heads
from claim import PASSAGES, digest_of
from measures import groups_reached, largest_jump, longest_spike, middle_bits_per_byte, second_token_and_on
from passages import write_passages

from baleen.cost.account import find_run, read_ledger
from baleen.cost.ledger import lab_of
from baleen.data.loader import Loader
from baleen.data.packing import PackedTokens
from baleen.data.prepare import Prepared, prepare
from baleen.eval.bits_per_byte import bits_per_byte
from baleen.model.machine import device
from baleen.model.transformer import Transformer
from baleen.recipe import Recipe
from baleen.train.loop import Interruption, run_stage
from baleen.train.precision import keep_freed_memory
from baleen.train.rundir import Metrics, open_run, read_metrics
from baleen.train.saver import Saver
from baleen.train.trainer import StepResult, Trainer, max_violation, processor

LAST = 100  # steps that losses and loads are averaged over
THOUSAND = 1024


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def train_row(
    recipe: Recipe, run_dir: Path, key_value_heads: int | None, *, cache: Path, passages: bool = False
) -> dict[str, Any]:
    """{measure: value} of a model trained by `recipe`; key_value_heads: plain attention instead of MLA.

    cache: where prepared text is kept for all rows. passages: on short documents. Raises KeyboardInterrupt if it was
    stopped, having saved.
    """
    keep_freed_memory()
    if passages:
        file = cache.parent / "passages" / f"{digest_of(PASSAGES)}.jsonl"
        if not file.is_file():
            write_passages(file)
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": (str(file),)})})
    with open_run(run_dir, recipe, resume=True):
        with run_stage(recipe.cost, run_dir, "data"):
            prepared = text_of(recipe, cache)
        trainer = trainer_of(recipe, prepared, key_value_heads)
        recent = _train(trainer, run_dir)
        with run_stage(recipe.cost, run_dir, "eval"):
            return _measured(trainer, recent, prepared, key_value_heads, run_dir)


def text_of(recipe: Recipe, cache: Path) -> Prepared:
    return prepare(
        recipe.data, vocab_size=recipe.model.vocab_size, seq_len=recipe.train.seq_len, seed=recipe.train.seed,
        cache_dir=cache, progress=say,
    )  # fmt: skip


def trainer_of(recipe: Recipe, prepared: Prepared, key_value_heads: int | None = None) -> Trainer:
    """One that has not begun."""
    model = Transformer(recipe.model).to(device())
    if key_value_heads is not None:
        use_shared_heads(model, key_value_heads)
    model.init_weights(recipe.train.seed)
    return Trainer(recipe, model, Loader(trimmed(prepared.train), seed=recipe.train.seed))


def _train(trainer: Trainer, run_dir: Path) -> deque[StepResult]:
    """All steps that are left; returns the last ones."""
    recipe, counters, recent = trainer.recipe, trainer.counters, deque[StepResult](maxlen=LAST)
    saver = Saver(run_dir / "checkpoints", keep=1, warn=say)
    newest = saver.newest()
    if newest is not None:
        for difference in trainer.restore(newest):
            say(f"  not bit for bit the row that was begun: {difference}")
        counters = trainer.counters
        recent.extend(StepResult.from_json(row) for row in newest.state["recent"])
    metrics = Metrics(run_dir, counters.step)
    before = counters.tokens, counters.seconds
    with run_stage(recipe.cost, run_dir, "pretrain") as stage, Interruption() as interruption:
        while not trainer.done and not interruption.wanted:
            result = trainer.step()
            recent.append(result)
            stage.progress(tokens=counters.tokens - before[0], productive_seconds=counters.seconds - before[1])
            metrics.write({"step": counters.step, "loss": result.loss if math.isfinite(result.loss) else None})
            if counters.step % 50 == 0:
                speed = counters.tokens / counters.seconds
                say(f"  step {counters.step}: loss {result.loss:.3f}, {speed:,.0f} tokens/s")
            if interruption.wanted or counters.step % recipe.train.checkpoint_every == 0:
                taken = trainer.checkpoint()
                taken.state["recent"] = [result.to_json() for result in recent]
                saver.save(taken)
        metrics.close()
        if not trainer.done:
            stage.interrupted()
            raise KeyboardInterrupt
    return recent


def trimmed(packed: PackedTokens) -> PackedTokens:
    """A whole number of thousands of rows (all, if there are not so many): arms whose texts differ by a few tokens, as
    FIM's do, then read them in one order."""
    rows = len(packed) // THOUSAND * THOUSAND or len(packed)
    end = rows * packed.seq_len + 1
    mask = None if packed.flat_loss_mask is None else packed.flat_loss_mask[:end]
    return PackedTokens(packed.seq_len, packed.flat_tokens[:end], packed.flat_document_ids[:end], mask)


def _measured(
    trainer: Trainer, recent: deque[StepResult], prepared: Prepared, key_value_heads: int | None, run_dir: Path
) -> dict[str, Any]:
    recipe, model, counters = trainer.recipe, trainer.model.eval(), trainer.counters
    losses = [row["loss"] for row in read_metrics(run_dir)]
    window = recipe.train.seq_len
    measured: dict[str, Any] = {
        "heldout_bpb": bits_per_byte(model, prepared.tokenizer, prepared.heldout, window=window)["bits_per_byte"],
        "loss": statistics.mean(loss for loss in losses[-LAST:] if loss is not None),
        "late_loss": statistics.mean(loss for loss in losses[-(len(losses) // 4) :] if loss is not None),
        "largest_jump": largest_jump(losses),
        "longest_spike": longest_spike(losses),
        "skipped": counters.skipped,
        "tokens": counters.tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "active_parameters": _active(recipe, model),
        "cache_bytes": 2 * recipe.model.num_hidden_layers * cached_numbers(recipe.model, key_value_heads),
    }
    if model.gates:
        loads = [torch.stack(layer).sum(0) for layer in zip(*(r.loads for r in recent), strict=False)]
        measured["max_violation"] = statistics.mean(r.max_violation for r in recent)
        measured["max_violation_pooled"] = max_violation(loads)
        measured["nodes"] = groups_reached(model, prepared.train)
    if model.mtp_layers:
        measured |= second_token_and_on(model, prepared)
    if recipe.data.format == "text":
        measured |= middle_bits_per_byte(model, prepared)
    return measured


def _active(recipe: Recipe, model: Transformer) -> int:
    """Parameters that one token multiplies, MTP and the input embedding left out."""
    cfg = recipe.model
    total = sum(p.numel() for layer in model.trunk_layers for p in layer.parameters()) + model.lm_head.weight.numel()
    idle = cfg.n_routed_experts - cfg.num_experts_per_tok
    layers = sum(cfg.is_moe_layer(i) for i in range(cfg.num_hidden_layers))
    return total - layers * idle * 3 * cfg.hidden_size * cfg.moe_intermediate_size


def account_of(run_dirs: Sequence[Path]) -> dict[str, Any]:
    """What the ledger has of a row's runs, evaluation and interrupted parts included."""
    lab = lab_of(run_dirs[0])
    ledger = read_ledger(lab)
    stages = [stage for run_dir in run_dirs for stage in ledger.of_run(find_run(lab, run_dir))]
    threads, cpus = torch.get_num_threads(), os.cpu_count()
    return {
        "device_hours": sum(stage.device_hours for stage in stages),
        "usd": sum(stage.usd for stage in stages),
        "load": round(os.getloadavg()[0] - threads, 2),  # of others, roughly
        "machine": f"{threads} of {cpus} CPUs, {processor()}, {platform.system()}, torch {torch.__version__}",
        "date": datetime.date.today().isoformat(),
    }


def thrown_away(run_dirs: Sequence[Path]) -> None:
    """The weights go; the ledger stands beside them and stays."""
    for run_dir in run_dirs:
        shutil.rmtree(run_dir)
