"""Group relative policy optimisation, top to bottom: ask, answer, judge, compare within the group, update.

arXiv 2402.03300 as R1 used it (Nature s41586-025-09422-z). Shapes: P problems of a step, G answers of each, N = P * G
answers or those of a forward, T tokens of the longest.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from baleen.align.accuracy import greedy_accuracy, heldout_questions
from baleen.align.judge import Judge
from baleen.align.logprobs import answer_logprobs, answer_tokens, answers_mask, micro_batches
from baleen.align.recipe import RLStage
from baleen.align.rollout import ACCURACY, ALIKE, Answer, Group, describe, punish_overlong, sample, score, that_fit
from baleen.align.stage import Row, Work
from baleen.align.tasks import Task, questions
from baleen.model.transformer import Transformer
from baleen.parallel.worker import Alone
from baleen.recipe import TrainConfig
from baleen.train.checkpoint import Checkpoint, Stored
from baleen.train.optimizer import Optimizer
from baleen.train.precision import Precision, computing_in, resolve_precision

STD_EPS = 1e-4  # beside the standard deviation, as in TRL: a group of nearly no variance must not explode
LARGE_GAP = 0.1  # nats a token between rollout and training: above it the two are not the same model


@dataclass
class Progress:
    """What counts on over a stage, and through its checkpoints."""

    step: int = 0
    tokens: int = 0  # drawn
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("rollout", "reward", "update"), 0.0))
    failures: dict[str, int] = field(default_factory=dict)  # of rewards, by kind
    skipped: int = 0  # updates whose gradient was not finite


def grpo(work: Work, stage: RLStage) -> Progress:
    """Practise `stage.steps` steps, or go on where the newest checkpoint stands; the model is changed in place.

    All that is random in a step comes from (stage.seed, step): a run that was stopped in the middle of a rollout does
    that step again, the same. Raises UserError for tasks without questions or rewards that cannot be loaded.
    """
    tasks, policy = work.tasks(stage.tasks), Policy(stage, work.model)
    heldout = heldout_questions(work, tasks, stage.eval_questions)
    newest = work.saver.newest()
    if newest is not None:
        policy.restore(newest)
    progress = policy.progress
    before = dict(progress.seconds), progress.tokens
    judging = Judge(reward_specs(stage, tasks), stage.reward_seconds)
    with closing(work.metrics(progress.step)) as metrics, judging as judge:
        while progress.step < stage.steps and not work.must_stop(progress.step):
            started, failed = time.monotonic(), Counter(judge.failures)
            drawn_before = progress.tokens
            groups, degenerate = collect(work, stage, judge, progress)
            left_out = progress.skipped
            with _timed(progress.seconds, "update"):
                row = policy.update(groups)
            progress.step += 1
            if progress.skipped > left_out:
                work.display.warn_if_left_out(work.first_step + progress.step, math.nan)
            speed = (progress.tokens - drawn_before) / (time.monotonic() - started)
            row = {"step": work.first_step + progress.step, "stage": "rl", **describe(groups), **row}
            row |= {"degenerate_groups": degenerate, "tokens_per_second": round(speed, 1)}
            if progress.step == stage.steps or (stage.eval_every and progress.step % stage.eval_every == 0):
                row["heldout_accuracy"] = greedy_accuracy(
                    work.model, work.tokenizer, heldout, judge, stage.sampling.max_tokens, work.recipe.system
                )
                row["sample"] = _shown(groups[0])
            for kind, count in (judge.failures - failed).items():
                progress.failures[kind] = progress.failures.get(kind, 0) + count
            parts = {name: seconds - before[0][name] for name, seconds in progress.seconds.items()}
            work.ledger.progress(
                tokens=progress.tokens - before[1], productive_seconds=sum(parts.values()), parts=parts
            )
            row |= {f"seconds_{name}": round(seconds, 3) for name, seconds in progress.seconds.items()}
            row |= {"tokens": progress.tokens, "seconds": round(sum(progress.seconds.values()), 3)}
            row |= {"reward_failures": sum(progress.failures.values()), "usd": work.ledger.usd_of_run}
            row |= {f"rewards_{kind}": count for kind, count in progress.failures.items()}
            _tell(work, stage, judge, row)
            metrics.write(row)
            if stage.checkpoint_every and progress.step % stage.checkpoint_every == 0:
                work.saver.save(policy.checkpoint())
    if work.saver.saved_step < progress.step:
        work.saver.save(policy.checkpoint())
    return progress


def reward_specs(stage: RLStage, tasks: Sequence[Task]) -> list[str]:
    """What the judge must know: the verifier of each task, and the rewards besides accuracy."""
    verifiers = {q.verifier for task in tasks for q in islice(questions([task], "train", 0), 1)}
    return sorted(verifiers | ({reward.name for reward in stage.rewards} - {ACCURACY}))


def collect(work: Work, stage: RLStage, judge: Judge, progress: Progress) -> tuple[list[Group], float]:
    """One step's groups, judged: P questions with G answers each; and the share of no variance of all that were drawn.

    Dynamic sampling (DAPO, arXiv 2503.14476): groups of no variance are replaced by groups of fresh questions, for as
    many further rollouts as the recipe allows; what is still missing then is filled up with them. Variance is that of
    the rewards before long answers are punished.
    """
    tasks, wanted = work.tasks(stage.tasks), stage.questions
    useful: list[Group] = []
    idle: list[Group] = []
    for attempt in range(1 + stage.dynamic_sampling):
        seed = (stage.seed * 1_000_003 + progress.step) * 101 + attempt  # 101: there are no more attempts
        stream = that_fit(work.model, work.tokenizer, questions(tasks, "train", seed), work.recipe.system)
        asked = list(islice(stream, wanted - len(useful)))
        with _timed(progress.seconds, "rollout"):
            drawn = sample(
                work.model,
                work.tokenizer,
                asked,
                stage.group_size,
                stage.sampling,
                seed=seed,
                system=work.recipe.system,
            )
        progress.tokens += sum(len(answer.token_ids) for group in drawn for answer in group.answers)
        with _timed(progress.seconds, "reward"):
            judged = [score(judge, stage.rewards, group) for group in drawn]
        useful += [group for group in judged if group.has_variance]
        idle += [group for group in judged if not group.has_variance]
        if len(useful) == wanted:
            break
    limits = stage.sampling.max_tokens, stage.overlong_buffer
    groups = [punish_overlong(group, *limits) for group in [*useful, *idle][:wanted]]
    return groups, len(idle) / len(useful + idle)


def advantages(rewards_PG: Tensor, scale: Literal["group", "batch", "none"]) -> Tensor:
    """(r - mean of the group) / std (R1, eq. 3), [P, G]. The std over a group, the whole batch, or left out (Dr. GRPO).

    The std is the sample's (n - 1). A group of no variance has advantages of exactly 0: the mean of equal numbers is
    not always one of them.
    """
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    centred_PG = centred_PG.masked_fill((rewards_PG.amax(1) - rewards_PG.amin(1) <= ALIKE)[:, None], 0.0)
    if scale == "none":
        return centred_PG
    std = rewards_PG.std(1, keepdim=True) if scale == "group" else rewards_PG.std()
    return centred_PG / (std + STD_EPS)


def token_weights(mask_NT: Tensor, loss_type: Literal["grpo", "dapo", "dr_grpo"], max_tokens: int) -> Tensor:
    """What each token counts in the loss of one update, [N, T]; 0 beyond an answer's end.

    grpo: answers alike, tokens alike within one (arXiv 2402.03300). dapo: all tokens alike (2503.14476). dr_grpo: as
    dapo, over the constant N * max_tokens, so that length changes nothing (2503.20783).
    """
    if loss_type == "grpo":
        return mask_NT / mask_NT.sum(1, keepdim=True).clamp(min=1) / len(mask_NT)
    if loss_type == "dapo":
        return mask_NT / mask_NT.sum().clamp(min=1)
    return mask_NT / (len(mask_NT) * max_tokens)


class PolicyLoss(NamedTuple):
    total: Tensor
    kl: Tensor  # sum of tokens' estimates, 0 without a reference
    clipped: Tensor  # number of tokens whose gradient the clip cuts off


def policy_loss(
    logprobs_NT: Tensor,
    old_logprobs_NT: Tensor,
    reference_logprobs_NT: Tensor | None,
    advantages_N: Tensor,
    mask_NT: Tensor,
    weights_NT: Tensor,
    *,
    clip_eps: float,
    clip_eps_high: float,
    kl_coef: float,
    importance_level: Literal["token", "sequence"] = "token",
) -> PolicyLoss:
    """R1, eq. 1-2: -min(ratio A, clip(ratio) A) + kl_coef * (pi_ref/pi - log(pi_ref/pi) - 1), summed by `weights_NT`.

    ratio = pi / pi_old of a token, or (GSPO) the geometric mean of its whole answer's. Summed over micro-batches of
    one update the results add up to that of the whole.
    """
    log_ratio_NT = logprobs_NT - old_logprobs_NT
    if importance_level == "sequence":
        log_ratio_N1 = (log_ratio_NT * mask_NT).sum(1, keepdim=True) / mask_NT.sum(1, keepdim=True).clamp(min=1)
        log_ratio_NT = log_ratio_N1.expand_as(logprobs_NT)
    ratio_NT, advantages_N1 = log_ratio_NT.exp(), advantages_N[:, None]
    clipped_NT = ratio_NT.clamp(1 - clip_eps, 1 + clip_eps_high) * advantages_N1
    objective_NT = torch.min(ratio_NT * advantages_N1, clipped_NT)
    cut_NT = (clipped_NT < ratio_NT * advantages_N1) & (mask_NT > 0)
    loss_NT, kl_NT = -objective_NT, torch.zeros_like(logprobs_NT)
    if reference_logprobs_NT is not None:
        log_reference_NT = reference_logprobs_NT - logprobs_NT
        kl_NT = log_reference_NT.exp() - log_reference_NT - 1
        loss_NT = loss_NT + kl_coef * kl_NT
    return PolicyLoss((loss_NT * weights_NT).sum(), (kl_NT * mask_NT).sum().detach(), cut_NT.sum())


class Policy:
    """The model that learns, its optimizer and its reference: all that a checkpoint of RL must bring back."""

    def __init__(self, stage: RLStage, model: Transformer):
        self.stage, self.model, self.progress = stage, model, Progress()
        pretraining = {"tokens": 1, "batch_tokens": 1, "seq_len": 1}  # which the optimizer does not look at
        train = TrainConfig.model_validate(
            pretraining | stage.model_dump(include={"lr", "betas", "weight_decay", "clip_norm"})
        )
        self.optimizer = Optimizer(model, train)
        self.precision: Precision = resolve_precision(stage.precision, model.device)
        self.reference = copy.deepcopy(model).requires_grad_(False) if stage.kl_coef else None

    def update(self, groups: Sequence[Group]) -> Row:
        """Several clipped steps from one rollout; returns what they measured.

        Where there is no reference, answers of advantage 0 add nothing to the gradient, and are not run: entropy and
        the gap between rollout and training are then those of the others.
        """
        stage, model = self.stage, self.model
        if self.reference is not None and stage.reference_every and self.progress.step % stage.reference_every == 0:
            self.reference.load_state_dict(model.state_dict())
        answers = [answer for group in groups for answer in group.answers]
        totals = [[score.total for score in group.scores] for group in groups]
        advantages_N = advantages(torch.tensor(totals, dtype=torch.float64), stage.scale_rewards).flatten().float()
        mask_NT = answers_mask(answers, stage.mask_truncated)
        learns_N = (advantages_N != 0) & (mask_NT.sum(1) > 0) if self.reference is None else mask_NT.sum(1) > 0
        old_NT = reference_NT = None
        if stage.minibatches * stage.inner_epochs > 1:
            old_NT = self._logprobs(model, answers, learns_N, mask_NT)
        if self.reference is not None:
            reference_NT = self._logprobs(self.reference, answers, learns_N, mask_NT)
        lr = stage.lr * min(1.0, (self.progress.step + 1) / (stage.warmup_steps + 1))
        seen: defaultdict[str, float] = defaultdict(float)
        for epoch in range(stage.inner_epochs):
            seed = (stage.seed * 1_000_003 + self.progress.step * 101 + epoch) % 2**64  # larger ones it does not take
            generator = torch.Generator().manual_seed(seed)
            for minibatch in torch.randperm(len(answers), generator=generator).chunk(stage.minibatches):
                weights_NT = torch.zeros_like(mask_NT)
                weights_NT[minibatch] = token_weights(mask_NT[minibatch], stage.loss_type, stage.sampling.max_tokens)
                rows = [row for row in minibatch.tolist() if learns_N[row]]
                if not rows:
                    continue  # a step without a gradient would still move by momentum and decay
                self.optimizer.zero_grad()
                loads: list[Tensor] = []
                for part in micro_batches(answers, rows, stage.micro_batch_tokens):
                    tokens = answer_tokens([answers[row] for row in part], model.config.eos_token_id, model.device)
                    T, index = tokens.mask_NT.shape[1], torch.tensor(part)
                    with computing_in(self.precision, model.device):
                        known = answer_logprobs(model, tokens, stage.sampling.temperature)
                    here = [None if t is None else t[index, :T].to(model.device) for t in (old_NT, reference_NT)]
                    mask, weights = (t[index, :T].to(model.device) for t in (mask_NT, weights_NT))
                    loss = policy_loss(
                        known.logprobs_NT,
                        known.logprobs_NT.detach() if here[0] is None else here[0],
                        here[1],
                        advantages_N[index].to(model.device),
                        mask,
                        weights,
                        clip_eps=stage.clip_eps,
                        clip_eps_high=stage.clip_eps_high or stage.clip_eps,
                        kl_coef=stage.kl_coef,
                        importance_level=stage.importance_level,
                    )
                    loss.total.backward()
                    loads = [a + b for a, b in zip(loads, known.loads, strict=True)] if loads else known.loads
                    seen["loss"] += loss.total.item()
                    seen["kl"] += loss.kl.item()
                    seen["clipped"] += loss.clipped.item()
                    seen["entropy"] += (known.entropy_NT * mask).sum().item()
                    seen["tokens"] += mask.sum().item()
                    if not seen["updates"]:  # later the weights are no longer those that drew
                        gap_NT = (known.own_logprobs_NT - tokens.drawn_logprobs_NT).abs() * tokens.mask_NT
                        seen["gap"] += gap_NT.sum().item()
                        seen["gap_tokens"] += tokens.mask_NT.sum().item()
                        seen["largest_gap"] = max(seen["largest_gap"], gap_NT.max().item())
                seen["updates"] += 1
                norm = self._step(lr, loads)
                seen["grad_norm"] += norm if math.isfinite(norm) else 0.0
                seen["finite"] += math.isfinite(norm)
        return {
            "loss": seen["loss"] / max(1, seen["updates"]),
            "lr": lr,
            "grad_norm": seen["grad_norm"] / seen["finite"] if seen["finite"] else None,
            "entropy": _ratio(seen["entropy"], seen["tokens"]),
            "kl": _ratio(seen["kl"], seen["tokens"]) if self.reference is not None else None,
            "clipped": _ratio(seen["clipped"], seen["tokens"]),
            "logprob_gap": _ratio(seen["gap"], seen["gap_tokens"]),
            "largest_logprob_gap": seen["largest_gap"] if seen["gap_tokens"] else None,
            "skipped": self.progress.skipped,
        }

    def _step(self, lr: float, loads: list[Tensor]) -> float:
        """One optimizer step and, if the recipe moves it, the router's bias; returns the gradient's norm.

        A gradient that is not finite changes nothing but `skipped`.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.stage.clip_norm)
        if not torch.isfinite(norm):
            self.progress.skipped += 1
            return norm.item()
        self.optimizer.step(lr)
        if self.stage.bias_update_speed:
            for gate, load in zip(self.model.gates, loads, strict=False):  # those of the MTP layers saw nothing
                gate.update_bias(load, self.stage.bias_update_speed)
        return norm.item()

    @torch.no_grad()
    def _logprobs(self, model: Transformer, answers: Sequence[Answer], asked_N: Tensor, mask_NT: Tensor) -> Tensor:
        """Log-probabilities of the asked answers' tokens, [N, T]; 0 elsewhere."""
        out_NT, rows = torch.zeros_like(mask_NT), asked_N.nonzero()[:, 0].tolist()
        for part in micro_batches(answers, rows, self.stage.micro_batch_tokens):
            tokens = answer_tokens([answers[row] for row in part], model.config.eos_token_id, model.device)
            with computing_in(self.precision, model.device):
                known = answer_logprobs(model, tokens, self.stage.sampling.temperature)
            out_NT[torch.tensor(part), : tokens.mask_NT.shape[1]] = known.logprobs_NT.cpu()
        return out_NT

    def checkpoint(self) -> Checkpoint:
        tensors = {**self._weights(), "optimizer": self.optimizer.state_tensors()}
        return Checkpoint(self.progress.step, tensors, {"progress": asdict(self.progress)})

    def restore(self, stored: Stored) -> None:
        optimizer = self.optimizer.empty_state_tensors(stored.names("optimizer"))
        stored.read_into({**self._weights(), "optimizer": optimizer})
        self.optimizer.load_state_tensors(optimizer)
        self.progress = Progress(**stored.state["progress"])

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        reference = {} if self.reference is None else {"reference": Alone(self.reference).tensors()}
        return {"model": Alone(self.model).tensors(), **reference}


def _tell(work: Work, stage: RLStage, judge: Judge, row: Row) -> None:
    done = row["step"] - work.first_step
    if judge.failures and not work.warned:
        work.warned = True
        work.display.warn(judge.fault)
    if (row["logprob_gap"] or 0.0) > LARGE_GAP:
        work.display.warn(f"rollout and training differ by {row['logprob_gap']:.2f} nats a token at step {row['step']}")
    parts = {"": f"rl step {done}", "reward": f"{row['reward']:.3f}", "right": f"{row['accuracy']:.1%}"}
    work.heldout = row.get("heldout_accuracy", work.heldout)
    if work.heldout is not None:
        parts["held out"] = f"{work.heldout:.1%}"
    parts |= {"tokens": f"{row['answer_tokens']:.0f}", "alike": f"{row['degenerate_groups']:.0%}"}
    parts |= {key: f"{row[key]:.3f}" for key in ("entropy", "kl") if row[key] is not None}
    parts |= {"tok/s": f"{row['tokens_per_second']:,.0f}", "$": f"{row['usd']:.4f}"}
    work.display.update(done / stage.steps, parts)


def _shown(group: Group) -> str:
    return f"{group.question.prompt} {group.answers[0].text}"


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None


class _timed:
    """Adds the seconds of a block to `seconds[name]`."""

    def __init__(self, seconds: dict[str, float], name: str):
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: Any) -> None:
        self.seconds[self.name] += time.monotonic() - self._started
