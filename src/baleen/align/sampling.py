"""Rejection sampling and distillation: many answers a question, of which a few right ones are kept to learn from."""

from __future__ import annotations

import json
from pathlib import Path

from baleen.align.judge import Judge
from baleen.align.recipe import SampleStage
from baleen.align.rollout import Group, sample, that_fit
from baleen.align.sft import chat_of
from baleen.align.stage import Work
from baleen.align.tasks import distinct_questions
from baleen.train.rundir import write_aside

SAMPLED = "sampled.jsonl"
PART = 64  # questions sampled between two looks at whether somebody asked to stop
SECONDS = 5.0  # of a verdict


def sample_answers(work: Work, stage: SampleStage) -> bool:
    """Leaves the kept answers in SAMPLED of the stage's folder, or what there is of them to go on from; whether it came
    to its end. The same answers, however often it was stopped."""
    drawn = distinct_questions(work.tasks(stage.tasks), "train", stage.seed, stage.questions)
    asked = list(that_fit(work.model, work.tokenizer, drawn, work.recipe.system))
    partial = work.folder / f"{SAMPLED}.partial"
    parts, tokens = _parts(partial), 0
    with Judge(sorted({question.verifier for question in asked} | {"format"}), SECONDS) as judge:
        for first in range(len(parts) * PART, len(asked), PART):
            if work.must_stop(0):
                return False
            groups = sample(
                work.model, work.tokenizer, asked[first : first + PART], stage.samples, stage.sampling,
                seed=stage.seed, system=work.recipe.system, first=first,
            )  # fmt: skip
            tokens += sum(len(answer.token_ids) for group in groups for answer in group.answers)
            parts.append([_row(group, text, work) for group in groups for text in kept(group, judge, stage.keep)])
            write_aside(partial, "".join(json.dumps(part) + "\n" for part in parts))
            work.ledger.progress(tokens=tokens, productive_seconds=work.ledger.seconds)
            done, right = min(first + PART, len(asked)), sum(map(len, parts))
            work.display.update(done / len(asked), {"": f"{done:,} questions", "kept": f"{right:,}"})
        judge.close(work.display.warn)
    rows = [row for part in parts for row in part]
    write_aside(work.folder / SAMPLED, "".join(rows))
    partial.unlink(missing_ok=True)
    work.display.say(f"kept {len(rows):,} answers to {len(asked):,} questions")
    return True


def kept(group: Group, judge: Judge, count: int) -> list[str]:
    """Of a question's right and well-formed answers the shortest different ones."""
    question = group.question
    texts = {answer.text for answer in group.answers if not answer.truncated}
    right = [
        text
        for text in sorted(texts, key=lambda text: (len(text), text))
        if judge.score(question.verifier, question.prompt, text, question.answer).value >= 1.0
        and judge.score("format", question.prompt, text, question.answer).value >= 1.0
    ]
    return right[:count]


def _row(group: Group, text: str, work: Work) -> str:
    turns = [{"role": m.role, "content": m.content} for m in chat_of(group.question, text, work.recipe.system)]
    return json.dumps({"messages": turns}, ensure_ascii=False) + "\n"


def _parts(partial: Path) -> list[list[str]]:
    return [json.loads(line) for line in partial.read_text().splitlines()] if partial.is_file() else []
