"""Supervised fine-tuning: conversations of which only the assistant's words are learnt, each seen by itself."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import closing

from baleen.align.accuracy import drawn_answers, greedy_accuracy, heldout_questions, mean_correct
from baleen.align.judge import Judge
from baleen.align.recipe import SamplingConfig, SFTStage
from baleen.align.stage import Row, Work
from baleen.align.tasks import Question, distinct_questions
from baleen.config import UserError
from baleen.data.corpus import read_documents
from baleen.data.document import Message
from baleen.data.loader import Loader
from baleen.data.packing import PackedTokens, TokenisedDocument, pack, whole_in_rows
from baleen.data.tokenizer import Tokenizer
from baleen.train.trainer import Trainer

Chat = Sequence[Message]
EVAL_QUESTIONS = 500
EVAL_TOKENS = 256


def conversations(work: Work, stage: SFTStage, sampled: Sequence[Chat]) -> list[Chat]:
    """What the stage learns from, in the order of its keys: worked solutions, files, sampled answers."""
    chats: list[Chat] = []
    if stage.worked:
        asked = distinct_questions(work.tasks(stage.tasks), "train", stage.train.seed, stage.worked)
        hurry = random.Random(stage.train.seed)
        shown = [question.hasty() if hurry.random() < stage.hasty else question for question in asked]
        chats += [chat_of(question, question.completion, work.recipe.system) for question in shown]
    chats += read_chats(stage.sources)
    if stage.sampled:
        if not sampled:
            raise UserError(
                "no sampled answer was right, so there is nothing to learn from: sample more, or train more"
            )
        chats += sampled
    return chats


def read_chats(sources: Sequence[str]) -> list[Chat]:
    """The conversations of files, folders or packages; none of none."""
    return [d.messages for d in read_documents(sources, "chat") if d.messages] if sources else []


def chat_of(question: Question, completion: str, system: str) -> Chat:
    head = [Message("system", system)] if system else []
    return [*head, Message("user", question.prompt), Message("assistant", completion)]


def tokenised(chats: Sequence[Chat], tokenizer: Tokenizer) -> Iterator[TokenisedDocument]:
    """Each conversation's tokens, the assistant's words to be learnt."""
    for ids in tokenizer.encode_chats(chats):
        yield TokenisedDocument(ids, tokenizer.assistant_mask(ids))


def packed_rows(chats: Sequence[Chat], tokenizer: Tokenizer, seq_len: int) -> PackedTokens:
    """Rows in which no conversation is cut. Raises UserError if one is longer than a row, or if no assistant speaks."""
    documents = list(tokenised(chats, tokenizer))
    if not any(1 in (document.loss_mask or ()) for document in documents):
        raise UserError(
            "no conversation has words of an assistant, so there is nothing to learn from: give messages of the role "
            "assistant"
        )
    longest = max(len(document.tokens) for document in documents)
    if longest > seq_len + 1:
        raise UserError(
            f"a conversation has {longest} tokens, more than a row of train.seq_len {seq_len}: raise train.seq_len to "
            f"{longest - 1} or more, or leave such conversations out"
        )
    return pack(whole_in_rows(documents, seq_len, tokenizer.pad_id), seq_len)


def fine_tune(work: Work, stage: SFTStage, chats: Sequence[Chat]) -> Trainer:
    """Train on the chats until stage.train says so, or go on where the newest checkpoint stands."""
    recipe = work.recipe.training(work.model.config, stage)
    packed = packed_rows(chats, work.tokenizer, stage.train.seq_len)
    trainer = Trainer(recipe, work.model, Loader(packed, seed=stage.train.seed))
    newest = work.saver.newest()
    if newest is not None:
        for difference in trainer.restore(newest):
            work.display.warn(f"this stage may not repeat bit for bit: {difference}")
    counters = trainer.counters
    wall, seconds, tokens = counters.wall_seconds, counters.seconds, counters.tokens
    started = time.monotonic()
    with closing(work.metrics(counters.step)) as metrics:
        while not trainer.done and not work.must_stop(counters.step):
            result = trainer.step()
            counters.wall_seconds = wall + time.monotonic() - started
            work.ledger.progress(tokens=counters.tokens - tokens, productive_seconds=counters.seconds - seconds)
            row: Row = {
                "step": work.first_step + counters.step, "stage": "sft", "tokens": counters.tokens,
                "seconds": round(counters.seconds, 3), "loss": result.loss, "lr": result.lr,
                "grad_norm": result.grad_norm, "tokens_per_second": round(result.tokens / result.seconds, 1),
                "max_violation": result.max_violation, "skipped": counters.skipped, "usd": work.ledger.usd_of_run,
            }  # fmt: skip
            work.display.warn_if_left_out(counters.step, result.grad_norm)
            if stage.train.eval_every and (trainer.done or counters.step % stage.train.eval_every == 0):
                try:
                    row |= heldout_accuracy(work, stage)
                except UserError:  # the model gives no numbers
                    work.saver.save(trainer.checkpoint())
                    raise
                counters.wall_seconds = wall + time.monotonic() - started
            _tell(work, trainer, row)
            metrics.write(row)
            if stage.train.checkpoint_every and counters.step % stage.train.checkpoint_every == 0:
                work.saver.save(trainer.checkpoint())
    if work.saver.saved_step < counters.step:
        work.saver.save(trainer.checkpoint())
    return trainer


def heldout_accuracy(work: Work, stage: SFTStage) -> Row:
    """{heldout_accuracy: of greedy answers, heldout_sampled: of stage.eval_samples drawn ones}, on held-out questions
    of the recipe's tasks (the stage's own, if it alone has some); nothing without any.

    Drawn from the same numbers each time, so that weights that hardly differ hardly differ in it.
    """
    tasks = work.recipe.tasks or stage.tasks
    if not tasks:
        return {}
    asked = heldout_questions(work, tasks, EVAL_QUESTIONS, or_fewer=True)
    with Judge(sorted({question.verifier for question in asked}), seconds=5.0) as judge:
        common = (work.model, work.tokenizer, asked, judge)
        row: Row = {"heldout_accuracy": greedy_accuracy(*common, EVAL_TOKENS, work.recipe.system)}
        if stage.eval_samples:
            drawing = {"samples": stage.eval_samples, "seed": 0, "system": work.recipe.system}
            row["heldout_sampled"] = mean_correct(
                drawn_answers(*common, SamplingConfig(max_tokens=EVAL_TOKENS), **drawing)
            )
        judge.close(work.display.warn)
    return row


def _tell(work: Work, trainer: Trainer, row: Row) -> None:
    parts = {"": f"sft step {trainer.counters.step}", "loss": f"{row['loss']:.3f}"}
    work.heldout = row.get("heldout_accuracy", work.heldout)
    if work.heldout is not None:
        parts["held out"] = f"{work.heldout:.1%}"
    parts |= {"tok/s": f"{row['tokens_per_second']:,.0f}", "$": f"{row['usd']:.4f}"}
    work.display.update(trainer.position / trainer.recipe.train.tokens, parts)
