"""Post-training from a recipe to a run directory: its stages one after the other, each resumable.

stages/1-sft/ and so on hold a stage's checkpoints while it is under way, and its model/ (or sampled.jsonl) when it is
done: that is how a resumed run knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from baleen.align.accuracy import HELDOUT_SEED
from baleen.align.grpo import grpo, reward_specs
from baleen.align.judge import Judge
from baleen.align.recipe import AlignRecipe, RLStage, SampleStage, SFTStage, Stage
from baleen.align.sampling import SAMPLED, sample_answers
from baleen.align.sft import Chat, conversations, fine_tune, read_chats
from baleen.align.stage import Work
from baleen.align.tasks import distinct_questions
from baleen.config import UserError
from baleen.cost.card import card_paragraph, cost_card
from baleen.cost.ledger import StageName
from baleen.data.tokenizer import Tokenizer
from baleen.data.tokenizer_training import train_tokenizer
from baleen.interop.card import model_card
from baleen.interop.huggingface import save_model
from baleen.interop.load import Loaded, generation_of, load, model_path
from baleen.model.machine import device
from baleen.model.transformer import Transformer
from baleen.train.display import Display
from baleen.train.loop import Interruption, run_stage
from baleen.train.rundir import open_run, read_metrics, require_one_process, write_aside
from baleen.train.saver import Saver
from baleen.train.upcycled import keep_constants

KEEP = 2  # checkpoints of a stage whose recipe does not say


def align(
    recipe: AlignRecipe,
    run_dir: Path,
    *,
    resume: bool = False,
    max_steps: int | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """Run the stages, or go on where the run was stopped.

    Returns {run, status ("done" | "stopped"), step, stages_done}. Raises UserError for bad input, having overwritten
    nothing.
    """
    return Pipeline(recipe, run_dir, display or Display(), max_steps).run(resume)


def check(recipe: AlignRecipe, stages: Sequence[Stage]) -> None:
    """Raises UserError for what one of the stages to come would stumble over: rewards, teachers, too few questions."""
    for stage in stages:
        if isinstance(stage, SampleStage) and stage.teacher:
            model_path(stage.teacher)
        tasks = stage.tasks or recipe.tasks
        if isinstance(stage, SFTStage) and stage.worked:
            distinct_questions(tasks, "train", stage.train.seed, stage.worked)
        if isinstance(stage, SampleStage):
            distinct_questions(tasks, "train", stage.seed, stage.questions)
        if isinstance(stage, RLStage):
            distinct_questions(tasks, "test", HELDOUT_SEED, stage.eval_questions)
            with Judge(reward_specs(stage, tasks), stage.reward_seconds):
                pass  # it loads them all


class Pipeline:
    def __init__(self, recipe: AlignRecipe, run_dir: Path, display: Display, max_steps: int | None = None):
        self.recipe, self.run_dir, self.display, self.max_steps = recipe, run_dir, display, max_steps
        self._standing = "and saved"

    def run(self, resume: bool) -> dict[str, Any]:
        require_one_process("post-training")
        check(self.recipe, [stage for i, stage in enumerate(self.recipe.stages) if not self.is_done(i)])
        with open_run(self.run_dir, self.recipe, resume=resume):
            return self._run()

    def _run(self) -> dict[str, Any]:
        recipe = self.recipe
        with Interruption() as interruption:
            for number, stage in enumerate(recipe.stages):
                if self.is_done(number):
                    continue
                if interruption.wanted or not self._do(number, stage, interruption):
                    self.display.say(f"stopped {self._standing}; go on with --resume")
                    return self.summary("stopped")
        self._export()
        return self.summary("done")

    def _do(self, number: int, stage: Stage, interruption: Interruption) -> bool:
        """One stage with its place in the ledger; whether it came to its end."""
        recipe = self.recipe
        self.display.say(f"stage {number + 1} of {len(recipe.stages)}: {stage.kind}")
        with run_stage(recipe.cost, self.run_dir, self.ledger_name(number)) as ledger, self.display:
            loaded = self.start_of(number)
            folder = self.folder(number)
            keep = stage.train.keep_checkpoints if isinstance(stage, SFTStage) else KEEP
            saver = Saver(folder / "checkpoints", keep=keep, warn=self.display.warn)
            work = Work(
                recipe, self.run_dir, folder, self.first_step(number), loaded.model, loaded.tokenizer,
                ledger, saver, self.display, interruption, self.max_steps,
            )  # fmt: skip
            finished = self._work(work, number, generation_of(loaded.path))
            if not finished:
                ledger.interrupted()
        return finished

    def _work(self, work: Work, number: int, generation: Mapping[str, Any]) -> bool:
        """One stage; whether it came to its end. generation: the settings that its model came with, which stay."""
        stage = self.recipe.stages[number]
        if isinstance(stage, SampleStage):
            return sample_answers(work, stage)
        keep_constants(work.model)
        if isinstance(stage, RLStage):
            steps = grpo(work, stage).step
            finished = steps == stage.steps
        else:
            trainer = fine_tune(work, stage, conversations(work, stage, self.sampled(number)))
            finished, steps = trainer.done, trainer.counters.step
        self._standing = work.saver.standing(steps)
        if finished:
            write_aside(work.folder / "steps", f"{steps}\n")
            save_model(work.model, work.folder / "model", tokenizer=work.tokenizer, generation=generation)
        return finished

    # --- what a stage finds and leaves

    def folder(self, number: int) -> Path:
        folder = self.run_dir / "stages" / f"{number + 1}-{self.recipe.stages[number].kind}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def is_done(self, number: int) -> bool:
        folder = self.run_dir / "stages" / f"{number + 1}-{self.recipe.stages[number].kind}"
        return (folder / "model" / "config.json").is_file() or (folder / SAMPLED).is_file()

    def first_step(self, number: int) -> int:
        """Steps of the stages before."""
        files = (self.folder(i) / "steps" for i in range(number))
        return sum(int(file.read_text()) for file in files if file.is_file())

    def start_of(self, number: int) -> Loaded:
        """The model that a stage begins with."""
        stage = self.recipe.stages[number]
        if isinstance(stage, SampleStage) and stage.teacher:
            return load(stage.teacher)
        fresh = not isinstance(stage, SampleStage) and stage.start == "base"
        trained = [] if fresh else [i for i in range(number) if self.recipe.stages[i].kind != "sample"]
        if trained:
            return load(self.folder(trained[-1]), dtype=torch.float32)
        return self.base()

    def base(self) -> Loaded:
        """recipe.base, or a new network from its seed with a tokenizer of the tasks' own words."""
        if self.recipe.base:
            return load(self.recipe.base, dtype=torch.float32, to_train=True)
        assert self.recipe.model is not None
        model = Transformer(self.recipe.model).to(device())
        model.init_weights(self.seed)
        return Loaded(model, self.tokenizer(self.recipe.model.vocab_size), self.run_dir)

    @property
    def seed(self) -> int:
        stage = next((s for s in self.recipe.stages if isinstance(s, SFTStage)), None)
        return stage.train.seed if stage else 0

    def tokenizer(self, vocab_size: int) -> Tokenizer:
        """Trained on the first sft stage's words, once a run."""
        directory = self.run_dir / "tokenizer"
        if not (directory / "tokenizer.json").is_file():
            train_tokenizer(self._words(), vocab_size).save(directory)
        return Tokenizer.load(directory)

    def _words(self) -> list[str]:
        number, stage = next(((i, s) for i, s in enumerate(self.recipe.stages) if isinstance(s, SFTStage)), (0, None))
        if stage is None:
            raise UserError("a network made anew needs an sft stage to learn its first words from: add one, or a base")
        words: list[str] = []
        if stage.worked:
            tasks = stage.tasks or self.recipe.tasks
            for q in distinct_questions(tasks, "train", stage.train.seed, stage.worked):
                words += [q.prompt, *q.worked, q.solution]
        sampled = self.sampled(number) if stage.sampled else []
        chats = [*read_chats(stage.sources), *sampled]
        return words + [message.content for chat in chats for message in chat]

    def sampled(self, number: int) -> list[Chat]:
        """What the sample stages before this one kept."""
        files = [self.folder(i) / SAMPLED for i in range(number) if self.recipe.stages[i].kind == "sample"]
        filled = [str(file) for file in files if file.is_file() and file.stat().st_size]
        return read_chats(filled)

    def ledger_name(self, number: int) -> StageName:
        """distill: sampling from a teacher, and learning from what it said."""
        stages = self.recipe.stages[: number + 1]
        if isinstance(stages[-1], RLStage):
            return "rl"
        samplers = [stage for stage in stages if isinstance(stage, SampleStage)]
        learns = not isinstance(stages[-1], SFTStage) or stages[-1].sampled
        return "distill" if learns and samplers and samplers[-1].teacher else "sft"

    def _export(self) -> None:
        """model/ of the run: that of its last trained stage."""
        trained = [i for i, stage in enumerate(self.recipe.stages) if stage.kind != "sample"]
        with run_stage(self.recipe.cost, self.run_dir, "export"):
            loaded = load(self.folder(trained[-1])) if trained else self.base()
            cost = card_paragraph(cost_card(self.run_dir))
            card = model_card(loaded.model.config, name=self.recipe.name, cost=cost)
            rest = {"tokenizer": loaded.tokenizer, "generation": generation_of(loaded.path), "card": card}
            save_model(loaded.model, self.run_dir / "model", **rest)

    def summary(self, status: str) -> dict[str, Any]:
        rows: Sequence[dict[str, Any]] = read_metrics(self.run_dir)
        last = rows[-1] if rows else {}
        kept = ("reward", "accuracy", "answer_tokens", "reward_failures")
        heldout = [row["heldout_accuracy"] for row in rows if row.get("heldout_accuracy") is not None]
        return {
            "run": str(self.run_dir),
            "status": status,
            "step": last.get("step", 0),
            "stages_done": sum(self.is_done(i) for i in range(len(self.recipe.stages))),
            "heldout_accuracy": heldout[-1] if heldout else None,
            **{key: last[key] for key in kept if key in last},
        }
