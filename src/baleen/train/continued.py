"""Continued training: a model that exists learns on, all of it (as after upcycling) or its MTP layers alone."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from baleen.config import UserError
from baleen.cost.card import card_paragraph, cost_card
from baleen.cost.figures import duration
from baleen.cost.ledger import Stage
from baleen.data.loader import Loader
from baleen.data.prepare import Prepared, check_data, prepare, section_chars
from baleen.eval.bits_per_byte import bits_per_byte
from baleen.interop import smollm2
from baleen.interop.card import model_card
from baleen.interop.huggingface import save_model
from baleen.interop.load import Loaded, generation_of, load
from baleen.model.layer import DecoderLayer
from baleen.parallel.worker import Alone
from baleen.recipe import Recipe, recipe_sections
from baleen.train.context import with_context
from baleen.train.continued_recipe import ContinuedRecipe
from baleen.train.display import Display
from baleen.train.draft import Drafting
from baleen.train.loop import Interruption, run_stage
from baleen.train.own_text import WithOwnText, own_text
from baleen.train.precision import keep_freed_memory
from baleen.train.rundir import Metrics, open_run, require_one_process
from baleen.train.saver import Saver
from baleen.train.trainer import StepResult, Trainer
from baleen.train.upcycled import closest_experts, jitter_routers, keep_constants, part_experts

Only = Literal["all", "mtp"]


def train_on(
    recipe: ContinuedRecipe,
    run_dir: Path,
    *,
    only: Only,
    resume: bool = False,
    max_steps: int | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """Train the model of `recipe.base` on, into `run_dir`: all of it, or only its MTP layers behind a frozen trunk.

    Returns {run, status ("done", or "stopped" before the recipe's end), step, tokens, train_seconds, loss, agreement,
    heldout_bpb_before, heldout_bpb, closest_experts}; agreement: share of positions at which the first MTP layer says
    what the trunk will; bits per byte of held-out text are None where the trunk is frozen, for they stay as they were;
    closest_experts: of the layers that were trained. Ctrl-C and SIGTERM save and return; a run of `max_steps` is
    exported as well. Raises UserError for bad input, having overwritten nothing.
    """
    if only not in get_args(Only):
        raise UserError(f"--only {only} is unknown: take {' or '.join(get_args(Only))}")
    require_one_process(f"--only {only}")
    display = display or Display()
    keep_freed_memory()
    loaded = load(recipe.base, dtype=torch.float32, to_train=True)
    if recipe.context is not None:
        loaded = loaded._replace(model=with_context(loaded.model, recipe.context))
    if recipe.train.seq_len > loaded.model.config.max_position_embeddings:
        raise UserError(f"train.seq_len ({recipe.train.seq_len}) is longer than the context of {recipe.base}")
    if only == "mtp" and not loaded.model.mtp_layers:
        raise UserError(f"{recipe.base} has no MTP layer to train: make it with `baleen upcycle ... --mtp 1`")
    training = recipe.training(loaded.model.config, document_mask=recipe.train.document_mask or only == "mtp")
    check_data(recipe.data)  # what is refused leaves neither directory nor cost
    with open_run(run_dir, recipe, resume=resume):
        last_step = math.inf if max_steps is None else max_steps
        return _train_on(recipe, training, run_dir, loaded, only, last_step, display)


def _train_on(
    recipe: ContinuedRecipe,
    training: Recipe,
    run_dir: Path,
    loaded: Loaded,
    only: Only,
    max_steps: float,
    display: Display,
) -> dict[str, Any]:
    with run_stage(recipe.cost, run_dir, "data"):
        prepared = prepare(
            recipe.data,
            vocab_size=loaded.model.config.vocab_size,
            seq_len=recipe.train.seq_len,
            seed=recipe.train.seed,
            cache_dir=run_dir / "data",
            tokenizer=loaded.tokenizer,
            progress=display.say,
        )
        if drawn_otherwise(recipe_sections(Path(recipe.base)), recipe):
            display.warn(
                f"rows of train.seq_len = {recipe.train.seq_len} are cut from other sections of the text than those of "
                f"{recipe.base}, so what is held out here is text that it was trained on: compare bits per byte before "
                "and after, but take neither for those of unseen text"
            )
        loader = Loader(prepared.train, seed=recipe.train.seed)
        if recipe.own_text.prompts:
            own = own_text(
                loaded.model, loaded.tokenizer, prepared.train, recipe.own_text, run_dir / "data" / "own-text",
                seed=recipe.train.seed, progress=display.say,
            )  # fmt: skip
            loader = WithOwnText(prepared.train, own, recipe.own_text.share, seed=recipe.train.seed)
    with run_stage(recipe.cost, run_dir, "pretrain" if recipe.context is None else "extend") as stage, display:
        run = _Run(recipe, training, run_dir, loaded, loader, only, stage, display)
        if not run.step:
            if only == "all":
                run.heldout_bpb_before = run.heldout_bpb(prepared)
            part_experts(run.trained_layers, recipe.train.expert_noise, recipe.train.seed)
        interrupted = run.train(max_steps)
    if interrupted:
        display.say(f"stopped at step {run.step} {run.saver.standing(run.step)}; go on with --resume")
        return run.summary("stopped", None)
    heldout = None
    if only == "all":
        with run_stage(recipe.cost, run_dir, "eval"):
            heldout = run.heldout_bpb(prepared)
    with run_stage(recipe.cost, run_dir, "export"):
        run.export(heldout)
    return run.summary("done" if run.trainer.done else "stopped", heldout)


def drawn_otherwise(base: dict[str, Any], recipe: ContinuedRecipe) -> bool:
    """Whether a run with these sections in its recipe split text that `recipe` reads too at other places."""
    of_base = base.get("data", {})
    shared = {*of_base.get("sources", ())} & {*recipe.data.sources}
    if not shared or "text" not in (of_base.get("format"), recipe.data.format):
        return False
    formats_differ = of_base.get("format") != recipe.data.format
    return formats_differ or section_chars(base["train"]["seq_len"]) != section_chars(recipe.train.seq_len)


class _Run:
    """A trainer, and what is told and saved on its way."""

    def __init__(
        self,
        recipe: ContinuedRecipe,
        training: Recipe,
        run_dir: Path,
        loaded: Loaded,
        loader: Loader,
        only: Only,
        stage: Stage,
        display: Display,
    ):
        self.recipe, self.run_dir, self.only, self.stage, self.display = recipe, run_dir, only, stage, display
        self.model, self.tokenizer, self.generation = loaded.model, loaded.tokenizer, generation_of(loaded.path)
        self.drafts_for_smollm2 = only == "mtp" and loaded.path == smollm2.cached_directory()
        self.worker = Drafting(self.model) if only == "mtp" else Alone(self.model)
        keep_constants(self.model)
        jitter_routers(self.worker.gates.values(), recipe.train.router_jitter)
        self.trainer = Trainer(training, self.worker, loader)
        self.heldout_bpb_before: float | None = None
        self.loss = self.agreement = math.nan  # of the last step
        torch.manual_seed(recipe.train.seed)
        self.saver = Saver(run_dir / "checkpoints", keep=recipe.train.keep_checkpoints, warn=display.warn)
        newest = self.saver.newest()
        if newest is not None:
            if newest.state["only"] != only:
                raise UserError(f"{run_dir} was begun with --only {newest.state['only']}: go on with the same")
            for difference in self.trainer.restore(newest):
                display.warn(f"this run may not repeat bit for bit: {difference}")
            self.heldout_bpb_before = newest.state["heldout_bpb_before"]
            self.loss, self.agreement = newest.state["loss"], newest.state["agreement"]
        count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        where = f"{self.trainer.precision}, on {self.model.device}"
        display.say(f"{recipe.name}: {count / 1e6:.1f}M parameters trained, {where}")

    @property
    def step(self) -> int:
        return self.trainer.counters.step

    def train(self, last_step: float) -> bool:
        """Steps until the tokens or the steps are used up, or Ctrl-C or SIGTERM; returns whether one of these came."""
        trainer, every = self.trainer, self.recipe.train.checkpoint_every
        counters = trainer.counters
        tokens, seconds = counters.tokens, counters.seconds
        self.model.train()
        with closing(Metrics(self.run_dir, self.step)) as metrics, Interruption() as interruption:
            while not trainer.done and self.step < last_step and not interruption.wanted:
                result = trainer.step()
                self.loss = result.loss
                if isinstance(self.worker, Drafting):
                    self.agreement = self.worker.agreement
                counters.wall_seconds = counters.seconds  # the clock of train.minutes is that of steps
                self.stage.progress(tokens=counters.tokens - tokens, productive_seconds=counters.seconds - seconds)
                metrics.write(self._told(result))
                if every and self.step % every == 0:
                    self._save()
            if self.step != self.saver.saved_step:
                self._save()
        if interruption.wanted:
            self.stage.interrupted()
        self.model.eval()
        return interruption.wanted

    def _save(self) -> None:
        taken = self.trainer.checkpoint()
        taken.state.update(only=self.only, heldout_bpb_before=self.heldout_bpb_before)
        taken.state.update(loss=self.loss, agreement=self.agreement)
        self.saver.save(taken)

    def _told(self, result: StepResult) -> dict[str, Any]:
        """Tells the step to whoever looks on, and returns its row."""
        counters, share = self.trainer.counters, min(1.0, self.trainer.position / self.recipe.train.tokens)
        self.display.warn_if_left_out(counters.step, result.grad_norm)
        parts = {"": f"step {counters.step}", "loss": f"{result.loss:.3f}"}
        if self.only == "mtp":
            parts["agree"] = f"{self.agreement:.1%}"
        parts["tok/s"] = f"{counters.tokens / counters.seconds:,.0f}"
        parts["left"] = duration(counters.seconds / share - counters.seconds)
        self.display.update(share, parts)
        return {
            "step": counters.step, "tokens": counters.tokens, "seconds": round(counters.seconds, 3),
            "loss": result.loss, "mtp_loss": result.mtp_loss, "agreement": self.agreement, "lr": result.lr,
            "grad_norm": result.grad_norm, "max_violation": result.max_violation, "skipped": counters.skipped,
            "usd": self.stage.usd_of_run,
        }  # fmt: skip

    @property
    def trained_layers(self) -> list[DecoderLayer]:
        model = self.model
        learn_mtp = self.only == "mtp" or self.recipe.train.mtp_loss_weight
        return [*(model.trunk_layers if self.only == "all" else ()), *(model.mtp_layers if learn_mtp else ())]

    def heldout_bpb(self, prepared: Prepared) -> float | None:
        if not prepared.heldout:
            return None
        window = self.recipe.train.seq_len
        return bits_per_byte(self.model, self.tokenizer, prepared.heldout, window=window)["bits_per_byte"]

    def export(self, heldout_bpb: float | None) -> None:
        """model/ in Hugging Face layout."""
        card = model_card(
            self.model.config,
            name=self.recipe.name,
            heldout_bpb=heldout_bpb,
            sources=self.recipe.data.sources,
            cost=card_paragraph(cost_card(self.run_dir)),
        )
        rest = {"tokenizer": self.tokenizer, "generation": self.generation, "card": card}
        save_model(self.model, self.run_dir / "model", **rest)
        if self.drafts_for_smollm2 and self.trainer.done:  # not a trial of a few steps
            save_model(self.model, smollm2.drafting_directory(), **rest)
            self.display.say(f"`baleen chat {smollm2.NAME}` drafts with it from now on")

    def summary(self, status: str, heldout_bpb: float | None) -> dict[str, Any]:
        counters = self.trainer.counters
        return {
            "run": str(self.run_dir),
            "status": status,
            "step": counters.step,
            "tokens": counters.tokens,
            "train_seconds": round(counters.seconds, 1),
            "loss": self.loss if math.isfinite(self.loss) else None,
            "agreement": self.agreement if math.isfinite(self.agreement) else None,
            "heldout_bpb_before": self.heldout_bpb_before,
            "heldout_bpb": heldout_bpb,
            "closest_experts": closest_experts(self.trained_layers),
        }
