"""Pretraining from a recipe to a run directory: data, steps, checkpoints, samples, the model in the end."""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections import deque
from contextlib import ExitStack, closing
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baleen.config import UserError
from baleen.cost.card import card_paragraph, cost_card
from baleen.cost.figures import duration
from baleen.cost.ledger import Ledger, Stage, StageName
from baleen.cost.money import rate_card
from baleen.data.loader import Loader
from baleen.data.prepare import Prepared, check_data, prepare
from baleen.eval.bits_per_byte import bits_per_byte
from baleen.infer.engine import Engine, Request
from baleen.infer.sampler import SamplingParams
from baleen.interop.card import model_card
from baleen.interop.huggingface import save_model
from baleen.model.machine import counted_devices, device
from baleen.model.transformer import Transformer
from baleen.parallel.mesh import Grid
from baleen.parallel.ranks import ALONE, Ranks, fingerprint_of_code, joined
from baleen.parallel.state import SHARDS
from baleen.parallel.team import join
from baleen.parallel.worker import Alone
from baleen.recipe import CostConfig, Recipe
from baleen.train.display import Display
from baleen.train.export import export_shards
from baleen.train.layout import check_layout
from baleen.train.precision import keep_freed_memory
from baleen.train.rundir import Metrics, open_run
from baleen.train.saver import Saver, TeamSaver
from baleen.train.track import TrackerKind, check_tracker, open_tracker
from baleen.train.trainer import StepResult, Trainer, max_violation

FIRST_SAMPLE_SECONDS = 15.0
SAMPLE_TOKENS = 48
STEPS_BETWEEN_LOADS = 50  # rows of metrics.jsonl with the load of every expert


def train(
    recipe: Recipe,
    run_dir: Path,
    *,
    resume: bool = False,
    max_steps: int | None = None,
    track: TrackerKind = "none",
    display: Display | None = None,
    go_on: str = "go on with --resume",
) -> dict[str, Any]:
    """Train a model from scratch, or go on where the newest whole checkpoint stands.

    Ctrl-C and SIGTERM end the step under way, save and return; `go_on` is what is said of how to continue. A run of
    `max_steps` is measured and exported as well. Returns {run, status ("done", or "stopped" before the recipe's end),
    step, tokens, train_seconds, loss, heldout_bpb, max_violation_pooled, weights_sha256}. Raises UserError for bad
    input, having overwritten nothing.

    Under torchrun every process calls this, and all get the same summary. Then nothing is sampled or held out on the
    way (heldout_bpb is None: see `baleen eval`), and weights_sha256 is over all ranks' parts.
    """
    with joined(recipe.parallel.timeout_seconds) as ranks, ExitStack() as claim:
        if ranks.world > 1:
            ranks.require_equal({"recipe": recipe.to_toml(), "version of the code": fingerprint_of_code()})
        grid = check_layout(recipe, ranks.world)
        ranks.lead(lambda: check_tracker(track))  # what is refused leaves neither directory nor cost
        ranks.lead(lambda: check_data(recipe.data))
        ranks.lead(lambda: claim.enter_context(open_run(run_dir, recipe, resume=resume)))
        display = display or Display(quiet=ranks.rank > 0)
        return _train(recipe, run_dir, ranks, grid, max_steps, track, display, go_on)


def _train(
    recipe: Recipe,
    run_dir: Path,
    ranks: Ranks,
    grid: Grid,
    max_steps: int | None,
    track: TrackerKind,
    display: Display,
    go_on: str,
) -> dict[str, Any]:
    """`train` on one of several ranks: rank 0 keeps the run directory and the ledger."""
    keep_freed_memory()
    with run_stage(recipe.cost, run_dir, "data", ranks):
        prepared = _prepare(recipe, run_dir, display)
    # Opened when the text has been taken, and closed whatever else is refused.
    tracking = closing(open_tracker(track if ranks.rank == 0 else "none", run_dir, recipe.model_dump()))
    pretraining = run_stage(recipe.cost, run_dir, "pretrain", ranks)
    with tracking as tracker, pretraining as stage, display, Interruption() as interruption:
        run = _Run(recipe, run_dir, prepared, stage, display, ranks, grid)
        if run.trainer.done:
            display.say(f"{run_dir} is trained to its end already")
        metrics = Metrics(run_dir, run.trainer.counters.step) if ranks.rank == 0 else None
        last_step = math.inf if max_steps is None else max_steps
        stopped = False
        try:
            while not run.trainer.done and run.trainer.counters.step < last_step and not stopped:
                row = run.step()
                if metrics is not None:
                    metrics.write(row)
                numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}
                tracker.log(row["step"], numbers)
                run.save_if_due()
                stopped = run.agree(interruption)
        finally:
            if metrics is not None:
                metrics.close()
        done = run.trainer.done  # not when it is saved: the clock may end a schedule too
        if stopped:
            stage.interrupted()
        run.save()
    if stopped:
        step = run.trainer.counters.step
        display.say(f"stopped at step {step} {run.saver.standing(step)}; {go_on}")
        return run.summary("stopped", None)
    with run_stage(recipe.cost, run_dir, "eval", ranks):
        heldout = run.heldout_bpb()
    with run_stage(recipe.cost, run_dir, "export", ranks):
        run.export(heldout)
    return run.summary("done" if done else "stopped", heldout)


class _Run:
    """One process's work on a run: the trainer, and what is told and saved on its way."""

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        prepared: Prepared,
        stage: Stage,
        display: Display,
        ranks: Ranks,
        grid: Grid,
    ):
        self.recipe, self.run_dir, self.prepared, self.stage, self.display = recipe, run_dir, prepared, stage, display
        self.ranks = ranks
        with torch.device("meta" if ranks.world > 1 else device()):  # no process ever holds a model that several share
            model = Transformer(recipe.model)
        parameters = sum(p.numel() for p in model.parameters())
        worker = Alone(model) if ranks.world == 1 else join(model, recipe.parallel, grid, device())
        worker.init_weights(recipe.train.seed)
        loader = Loader(prepared.train, seed=recipe.train.seed, rank=worker.data_rank, world_size=worker.data_ranks)
        self.trainer = Trainer(recipe, worker, loader)
        ranks.require_equal(
            {
                "text to train on": prepared.train.fingerprint,
                "tokenizer": prepared.tokenizer.fingerprint,
                "precision of products": self.trainer.precision,
            }
        )
        folder, keep = run_dir / "checkpoints", recipe.train.keep_checkpoints
        self.saver = (
            Saver(folder, keep=keep, warn=display.warn)
            if ranks.world == 1
            else TeamSaver(
                folder, keep=keep, warn=display.warn, ranks=ranks, timeout_seconds=recipe.parallel.timeout_seconds
            )
        )
        newest = self.saver.newest()
        if newest is not None:
            for difference in self.trainer.restore(newest):
                display.warn(f"this run may not repeat bit for bit: {difference}")
        self._before = self.trainer.counters.wall_seconds, self.trainer.counters.seconds, self.trainer.counters.tokens
        self._started = time.monotonic()
        self._next_sample = self._before[0] + FIRST_SAMPLE_SECONDS
        self._recent: deque[StepResult] = deque(maxlen=100)
        if newest is not None:
            self._recent.extend(StepResult.from_json(row) for row in newest.state.get("recent", ()))
        where = f"{worker.layout} on {device()}"
        display.say(f"{recipe.name}: {parameters / 1e6:.1f}M parameters, {self.trainer.precision}, {where}")

    def step(self) -> dict[str, Any]:
        """One training step and what falls due after it; returns its row of metrics.jsonl."""
        trainer, train = self.trainer, self.recipe.train
        result = trainer.step()
        self._recent.append(result)
        counters = trainer.counters
        _, seconds_before, tokens_before = self._before
        tokens, seconds = counters.tokens - tokens_before, counters.seconds - seconds_before
        self.stage.progress(tokens=tokens, productive_seconds=seconds)
        row: dict[str, Any] = {
            "step": counters.step, "tokens": counters.tokens, "seconds": round(counters.seconds, 3),
            "loss": result.loss, "mtp_loss": result.mtp_loss, "balance_loss": result.balance_loss, "lr": result.lr,
            "grad_norm": result.grad_norm, "tokens_per_second": round(result.tokens / result.seconds, 1),
            "max_violation": result.max_violation, "skipped": counters.skipped, "usd": self.stage.usd_of_run,
        }  # fmt: skip
        if result.nodes_reached is not None:
            row["nodes_reached"] = result.nodes_reached
        self.display.warn_if_left_out(counters.step, result.grad_norm)
        if counters.step % STEPS_BETWEEN_LOADS == 0:
            row["expert_load"] = [(load / load.sum()).tolist() for load in result.loads]
        if train.eval_every and counters.step % train.eval_every == 0:
            row["heldout_bpb"] = self.heldout_bpb()
        self._tick()
        if self.ranks.world == 1 and train.sample_every_seconds and counters.wall_seconds >= self._next_sample:
            self._next_sample = counters.wall_seconds + train.sample_every_seconds
            row |= self._sample()
        self._tick()
        self._show(row)
        return row

    def _tick(self) -> None:
        self.trainer.counters.wall_seconds = self._before[0] + time.monotonic() - self._started

    def _show(self, row: dict[str, Any]) -> None:
        share = min(1.0, self.trainer.position / self.recipe.train.tokens)
        wall = self.trainer.counters.wall_seconds
        parts = {
            "": f"step {row['step']}",
            "loss": f"{self._mean_loss():.3f}",
            "tok/s": f"{sum(r.tokens for r in self._recent) / sum(r.seconds for r in self._recent):,.0f}",
            "balance": f"+{row['max_violation']:.0%}",
            "left": duration(wall / share - wall),
            "$": f"{self.stage.usd_of_run:.4f}",
        }
        self.display.update(share, parts)

    def _mean_loss(self) -> float:
        """Of the last 100 steps, those left out whose gradient was not finite; nan if that leaves none."""
        losses = [result.loss for result in self._recent if math.isfinite(result.loss)]
        return sum(losses) / len(losses) if losses else math.nan

    def _sample(self) -> dict[str, str]:
        """{sample: a short answer of the model as it is now, on its own random stream}; nothing if it has none."""
        prompt, ids = self._opening
        params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=SAMPLE_TOKENS, seed=self.recipe.train.seed)
        try:
            text = Engine(self.trainer.model, self.prepared.tokenizer).complete([Request(ids, params)])[0].text.strip()
        except UserError as error:  # training has its own way with what is not finite
            self.display.warn(f"step {self.trainer.counters.step}: no sample: {error}")
            return {}
        self.display.sample(self.trainer.counters.step, prompt, text)
        return {"sample": f"{prompt} {text}".strip()}

    @cached_property
    def _opening(self) -> tuple[str, list[int]]:
        """The first held-out message that leaves room for an answer, and its tokens; if none does, a mere beginning."""
        tokenizer, room = self.prepared.tokenizer, self.recipe.model.max_position_embeddings - SAMPLE_TOKENS
        for document in self.prepared.heldout:
            if document.messages:
                ids = tokenizer.encode_chat(document.messages[:1], add_generation_prompt=True)
                if len(ids) <= room:
                    return document.messages[0].content, ids
        return "", [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]

    def heldout_bpb(self) -> float | None:
        """Bits per byte on the held-out text; None if nothing was held out, or the model is spread over ranks."""
        prepared, window = self.prepared, self.recipe.train.seq_len
        if not prepared.heldout or self.ranks.world > 1:
            return None
        result = bits_per_byte(self.trainer.model, prepared.tokenizer, prepared.heldout, window=window)
        return result["bits_per_byte"]

    def save_if_due(self) -> None:
        """Called when the step's row is written, so that no checkpoint is ahead of metrics.jsonl."""
        every = self.recipe.train.checkpoint_every
        if every and self.trainer.counters.step % every == 0:
            self._begin_save()

    def save(self) -> None:
        """A checkpoint of now, unless this step has one."""
        self._begin_save()
        self.saver.settle(wait=True)

    def _begin_save(self) -> None:
        self.saver.settle(wait=False)
        if not self.saver.has(self.trainer.counters.step):
            self._tick()
            taken = self.trainer.checkpoint()
            taken.state["recent"] = [result.to_json() for result in self._recent]  # the summary is of them
            self.saver.save(taken)

    def agree(self, interruption: Interruption) -> bool:
        """Whether any rank is to stop. Clocks differ from rank to rank, and schedules may depend on them."""
        wanted, wall = self.ranks.largest([float(interruption.wanted), self.trainer.counters.wall_seconds])
        self.trainer.counters.wall_seconds = wall
        self.saver.settle(wait=False)
        return bool(wanted)

    def export(self, heldout_bpb: float | None) -> None:
        """model/ (and model-ema/) in Hugging Face layout."""
        recipe = self.recipe
        card = model_card(
            recipe.model,
            name=recipe.name,
            tokens=self.trainer.counters.tokens,
            heldout_bpb=heldout_bpb,
            sources=recipe.data.sources,
            cost=card_paragraph(cost_card(self.run_dir)) if self.ranks.rank == 0 else "",  # whose the ledger is
        )
        if self.ranks.world > 1:
            shards = self.saver.folder / f"step-{self.saver.saved_step}" / SHARDS
            for group in ["model", "ema"] if self.trainer.ema else ["model"]:
                export_shards(
                    shards,
                    group,
                    self.run_dir / {"model": "model", "ema": "model-ema"}[group],
                    recipe.model,
                    self.ranks,
                    dtype=torch.float32,
                    tokenizer=self.prepared.tokenizer,
                    card=card,
                )
            return
        model = self.trainer.model
        save_model(model, self.run_dir / "model", tokenizer=self.prepared.tokenizer, card=card)
        if self.trainer.ema:
            averaged = Transformer(recipe.model).to(model.device)
            averaged.load_state_dict(self.trainer.ema, strict=not recipe.model.tie_word_embeddings)
            save_model(averaged, self.run_dir / "model-ema", tokenizer=self.prepared.tokenizer, card=card)

    def summary(self, status: str, heldout_bpb: float | None) -> dict[str, Any]:
        counters, loss = self.trainer.counters, self._mean_loss()
        return {
            "run": str(self.run_dir),
            "status": status,
            "step": counters.step,
            "tokens": counters.tokens,
            "train_seconds": round(counters.wall_seconds, 1),
            "loss": loss if math.isfinite(loss) else None,
            "heldout_bpb": heldout_bpb,
            "max_violation_pooled": self._pooled_violation() if self._recent else None,
            "weights_sha256": self.ranks.digest_of_all(weights_sha256(self._weights())),
        }

    def _weights(self) -> dict[str, Tensor]:
        """Those held here."""
        return self.trainer.model.state_dict() if self.ranks.world == 1 else self.trainer.worker.tensors()

    def _pooled_violation(self) -> float:
        """max_violation of the last 100 steps' loads added up: what is left of imbalance when chance averages out."""
        # Those of a checkpoint are on the CPU; steps that left the MTP layers out have fewer.
        loads = [[load.cpu() for load in result.loads] for result in self._recent]
        return max_violation([torch.stack(layer).sum(0) for layer in zip(*loads, strict=False)])


def weights_sha256(state: dict[str, Tensor]) -> str:
    """One checksum over names and bytes of all weights: equal if and only if two runs ended alike."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _prepare(recipe: Recipe, run_dir: Path, display: Display) -> Prepared:
    prepared = prepare(
        recipe.data,
        vocab_size=recipe.model.vocab_size,
        seq_len=recipe.train.seq_len,
        seed=recipe.train.seed,
        cache_dir=run_dir / "data",
        progress=display.say,
    )
    ends = {"bos_token_id": prepared.tokenizer.bos_id, "eos_token_id": prepared.tokenizer.eos_id}
    for key, id in ends.items():  # what other engines begin and stop at
        if id is not None and id != getattr(recipe.model, key):
            raise UserError(
                f"model.{key}={getattr(recipe.model, key)}, but the tokenizer's is {id}: set model.{key}={id}"
            )
    return prepared


def run_stage(cost: CostConfig, run_dir: Path, name: StageName, ranks: Ranks = ALONE) -> Stage:
    """The ledger's stage, kept by rank 0 for all: a device is a GPU, or a thread of the CPU."""
    device_name, devices = counted_devices()
    return Ledger.open(run_dir, project=cost.project, rank=ranks.rank).stage(
        name,
        purpose=cost.purpose,
        devices=ranks.world * devices,
        device_name=device_name,
        rate=rate_card(device_name, cost.usd_per_device_hour),
    )


class Interruption:
    """Turns the first Ctrl-C or SIGTERM into a wish that is read between steps; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.wanted = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._wish)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _wish(self, number: int, frame: object) -> None:
        self.wanted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
