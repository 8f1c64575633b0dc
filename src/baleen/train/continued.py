"""Continued training: a model that exists learns on, all of it (as after upcycling) or its MTP layers alone."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from baleen.config import UserError
from baleen.cost.card import card_paragraph, cost_card
from baleen.cost.figures import duration
from baleen.cost.ledger import Stage
from baleen.data.loader import Batch, Loader
from baleen.data.packing import PackedTokens
from baleen.data.prepare import Prepared, check_data, prepare
from baleen.eval.bits_per_byte import bits_per_byte
from baleen.interop import smollm2
from baleen.interop.card import model_card
from baleen.interop.huggingface import save_model
from baleen.interop.load import Loaded, generation_of, load
from baleen.model.layer import DecoderLayer
from baleen.train.checkpoint import Checkpoint
from baleen.train.context import with_context
from baleen.train.continued_recipe import ContinuedRecipe
from baleen.train.display import Display
from baleen.train.draft import draft_loss, freeze_trunk
from baleen.train.loop import Interruption, run_stage
from baleen.train.loss import training_loss
from baleen.train.own_text import own_text
from baleen.train.precision import Precision, computing_in, keep_freed_memory, resolve_precision
from baleen.train.rundir import Metrics, open_run, require_one_process
from baleen.train.saver import Saver
from baleen.train.schedule import Curve
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

    Returns {run, status ("done" | "stopped"), step, tokens, train_seconds, loss, agreement, heldout_bpb_before,
    heldout_bpb, closest_experts}; agreement: share of positions at which the first MTP layer says what the trunk will;
    bits per byte of held-out text are None where the trunk is frozen, for they stay what they were; closest_experts: of
    the layers that were trained. Ctrl-C and SIGTERM save and return. Raises UserError for bad input, having overwritten
    nothing.
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
    check_data(recipe.data)  # what is refused leaves neither directory nor cost
    with open_run(run_dir, recipe, resume=resume):
        return _train_on(recipe, run_dir, loaded, only, math.inf if max_steps is None else max_steps, display)


def _train_on(
    recipe: ContinuedRecipe, run_dir: Path, loaded: Loaded, only: Only, max_steps: float, display: Display
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
        texts = [prepared.train]
        if recipe.own_text.prompts:
            folder = run_dir / "data" / "own-text"
            texts.append(
                own_text(
                    loaded.model, loaded.tokenizer, prepared.train, recipe.own_text, folder,
                    seed=recipe.train.seed, progress=display.say,
                )
            )  # fmt: skip
    with run_stage(recipe.cost, run_dir, "pretrain" if recipe.context is None else "extend") as stage, display:
        run = _Run(recipe, run_dir, loaded, texts, only, stage, display)
        if only == "all" and not run.counters.step:
            run.counters.heldout_bpb_before = run.heldout_bpb(prepared)
            part_experts(run.trained_layers, recipe.train.expert_noise, recipe.train.seed)
        status = run.train(max_steps)
    if status == "stopped":
        step = run.counters.step
        display.say(f"stopped at step {step} {run.saver.standing(step)}; go on with --resume")
        return run.summary(status, None)
    heldout = None
    if only == "all":
        with run_stage(recipe.cost, run_dir, "eval"):
            heldout = run.heldout_bpb(prepared)
    with run_stage(recipe.cost, run_dir, "export"):
        run.export(heldout)
    return run.summary(status, heldout)


@dataclass
class _Counters:
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0  # updates left out because the gradient was not finite
    heldout_bpb_before: float | None = None  # the first step


def _learnt(tokens_BT: Tensor, mask_BT: Tensor | None, first: int) -> int:
    """How many targets count in the loss of these rows, of which each begins with `first` tokens that are none."""
    return tokens_BT[:, first:].numel() if mask_BT is None else int(mask_BT[:, first:].sum())


class _Run:
    def __init__(
        self,
        recipe: ContinuedRecipe,
        run_dir: Path,
        loaded: Loaded,
        texts: Sequence[PackedTokens],
        only: Only,
        stage: Stage,
        display: Display,
    ):
        self.recipe, self.run_dir, self.only, self.stage, self.display = recipe, run_dir, only, stage, display
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.generation = generation_of(loaded.path)
        self.loaders = [Loader(text, seed=recipe.train.seed) for text in texts]
        if only == "mtp":
            freeze_trunk(self.model)
        keep_constants(self.model)
        jitter_routers(self.model, recipe.train.router_jitter)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        train = recipe.train
        matrices = [p for p in self.trained.values() if p.ndim >= 2]
        vectors = [p for p in self.trained.values() if p.ndim < 2]  # norms and biases do not decay
        groups = [
            {"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0},
        ]  # fmt: skip
        self.optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)
        self.lr = Curve(train.lr_schedule, train.tokens)
        self.precision: Precision = resolve_precision(train.precision, self.model.device)
        self.counters, self.loss, self.agreement = _Counters(), math.nan, math.nan
        torch.manual_seed(train.seed)
        self.saver = Saver(run_dir / "checkpoints", keep=train.keep_checkpoints, warn=display.warn)
        newest = self.saver.newest()
        if newest is not None:
            assert isinstance(newest, Checkpoint), "continued training is one process"
            self._restore(newest)
        count = sum(p.numel() for p in self.trained.values())
        display.say(f"{recipe.name}: {count / 1e6:.1f}M parameters trained, {self.precision}, on {self.model.device}")

    @property
    def position(self) -> float:
        """Where the schedule stands, in tokens: those trained on, or the share of train.minutes that is used up."""
        train = self.recipe.train
        by_clock = train.tokens * self.counters.seconds / (60 * train.minutes) if train.minutes else 0.0
        return max(self.counters.tokens, by_clock)

    def train(self, last_step: float) -> str:
        """Steps until the tokens or the steps are used up, or Ctrl-C or SIGTERM; returns "done" or "stopped"."""
        metrics, train, before = Metrics(self.run_dir, self.counters.step), self.recipe.train, self.counters.seconds
        tokens_before = self.counters.tokens
        self.model.train()
        with closing(metrics), Interruption() as interruption:
            while self.position < train.tokens and self.counters.step < last_step and not interruption.wanted:
                metrics.write(self._step())
                tokens = self.counters.tokens - tokens_before
                self.stage.progress(tokens=tokens, productive_seconds=self.counters.seconds - before)
                if train.checkpoint_every and self.counters.step % train.checkpoint_every == 0:
                    self._save()
        if interruption.wanted:
            self.stage.interrupted()
        self._save()
        self.model.eval()
        return "stopped" if interruption.wanted else "done"

    def _step(self) -> dict[str, Any]:
        started, train, counters = time.monotonic(), self.recipe.train, self.counters
        batch = self._batch(train.batch_tokens // train.seq_len)
        B, size = len(batch.tokens), train.micro_batch_size or len(batch.tokens)
        first = 2 if self.only == "mtp" else 1  # the text's next token, or the one after it
        total = max(1, _learnt(batch.tokens, batch.loss_mask, first))
        self.optimizer.zero_grad(set_to_none=True)
        self.loss, self.agreement = 0.0, 0.0
        loads: list[Tensor] = []
        for start in range(0, B, size):
            rows = slice(start, start + size)
            parts = (batch.tokens, batch.document_ids, batch.loss_mask)
            tokens, documents, mask = (None if t is None else t[rows].to(self.model.device) for t in parts)
            assert tokens is not None and documents is not None
            share = _learnt(tokens, mask, first) / total
            with computing_in(self.precision, self.model.device):
                loss, agreement, of_part = self._loss(tokens, documents, mask)
            (loss * share).backward()
            self.loss += loss.item() * share
            self.agreement += agreement * share
            loads = [a + b for a, b in zip(loads, of_part, strict=True)] if loads else of_part
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), train.clip_norm).item()
        for group in self.optimizer.param_groups:
            group["lr"] = train.lr * self.lr(self.position)
        if math.isfinite(norm):
            self.optimizer.step()
            for gate, load in zip(self._gates(), loads, strict=True):
                gate.update_bias(load, train.bias_update_speed)
        else:
            counters.skipped += 1
        counters.step += 1
        self.display.warn_if_left_out(counters.step, norm)
        counters.tokens += B * train.seq_len
        counters.seconds += time.monotonic() - started
        share = min(1.0, self.position / train.tokens)
        self.display.update(
            share,
            {
                "": f"step {counters.step}", "loss": f"{self.loss:.3f}", "agree": f"{self.agreement:.1%}",
                "tok/s": f"{counters.tokens / counters.seconds:,.0f}",
                "left": duration(counters.seconds / share - counters.seconds),
            },
        )  # fmt: skip
        row = {
            "step": counters.step, "tokens": counters.tokens, "seconds": round(counters.seconds, 3), "loss": self.loss,
            "agreement": self.agreement, "lr": self.optimizer.param_groups[0]["lr"], "grad_norm": norm,
            "skipped": counters.skipped, "usd": self.stage.usd_of_run,
        }  # fmt: skip
        return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}

    def _batch(self, sequences: int) -> Batch:
        """Rows of the text, then rows of the model's own."""
        own = round(sequences * self.recipe.own_text.share) if len(self.loaders) > 1 else 0
        parts = [
            loader.next_batch(count)
            for loader, count in zip(self.loaders, (sequences - own, own), strict=False)
            if count
        ]
        tokens, documents = torch.cat([p.tokens for p in parts]), torch.cat([p.document_ids for p in parts])
        masks = [torch.ones_like(p.tokens) if p.loss_mask is None else p.loss_mask for p in parts]
        return Batch(tokens, documents, torch.cat(masks) if len(self.loaders) > 1 else None)

    def _loss(self, tokens: Tensor, documents: Tensor, mask: Tensor | None) -> tuple[Tensor, float, list[Tensor]]:
        if self.only == "mtp":
            return draft_loss(self.model, tokens[:, :-1], documents[:, :-1], mask)
        loss = training_loss(
            self.model,
            tokens,
            mtp_loss_weight=self.recipe.train.mtp_loss_weight,
            balance_loss_weight=self.recipe.train.balance_loss_weight,
            document_ids=documents if self.recipe.train.document_mask else None,
            loss_mask=mask,
        )
        return loss.total, 0.0, loss.loads

    def _gates(self) -> list[Any]:
        """Those whose loads a step returns."""
        gates, train = self.model.gates, self.recipe.train
        mtp = len(gates) - sum(self.model.config.is_moe_layer(i) for i in range(self.model.config.num_hidden_layers))
        if self.only == "mtp":
            return gates[len(gates) - mtp :]
        return gates if train.mtp_loss_weight else gates[: len(gates) - mtp]

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
        whole = self.position >= self.recipe.train.tokens  # not a few steps, for a trial
        if self.only == "mtp" and self.recipe.base == smollm2.NAME and whole:
            save_model(self.model, smollm2.drafting_directory(), **rest)
            self.display.say(f"`baleen chat {smollm2.NAME}` drafts with it from now on")

    def summary(self, status: str, heldout_bpb: float | None) -> dict[str, Any]:
        return {
            "run": str(self.run_dir),
            "status": status,
            "step": self.counters.step,
            "tokens": self.counters.tokens,
            "train_seconds": round(self.counters.seconds, 1),
            "loss": self.loss if math.isfinite(self.loss) else None,
            "agreement": self.agreement if self.only == "mtp" and math.isfinite(self.agreement) else None,
            "heldout_bpb_before": self.counters.heldout_bpb_before,
            "heldout_bpb": heldout_bpb,
            "closest_experts": closest_experts(self.trained_layers),
        }

    def _save(self) -> None:
        if self.counters.step == self.saver.saved_step:
            return
        names = {id(parameter): name for name, parameter in self.trained.items()}
        moments = {
            f"{names[id(parameter)]}.{key}": value
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
        }
        biases = {f"gate {i}": gate.e_score_correction_bias for i, gate in enumerate(self.model.gates)}
        weights = {name: p for name, p in self.trained.items()}
        state = {
            "counters": asdict(self.counters),
            "loaders": [loader.state_dict() for loader in self.loaders],
            "rng": torch.get_rng_state().tolist(),
            "only": self.only,
        }
        tensors = {"model": weights | biases, "optimizer": moments}
        self.saver.save(Checkpoint(self.counters.step, tensors, state))

    def _restore(self, found: Checkpoint) -> None:
        if found.state["only"] != self.only:
            raise UserError(f"{self.run_dir} was begun with --only {found.state['only']}: go on with the same")
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(found.tensors["model"][name])
            for i, gate in enumerate(self.model.gates):
                gate.e_score_correction_bias.copy_(found.tensors["model"][f"gate {i}"])
        for key, value in found.tensors["optimizer"].items():
            name, _, kind = key.rpartition(".")
            self.optimizer.state[self.trained[name]][kind] = value
        self.counters = _Counters(**found.state["counters"])
        for loader, state in zip(self.loaders, found.state["loaders"], strict=True):
            loader.load_state_dict(state)
        torch.set_rng_state(torch.tensor(found.state["rng"], dtype=torch.uint8))
