"""What every stage of post-training is given to work with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baleen.align.recipe import AlignRecipe
from baleen.align.tasks import Task
from baleen.cost.ledger import Stage as LedgerStage
from baleen.data.tokenizer import Tokenizer
from baleen.model.transformer import Transformer
from baleen.train.display import Display
from baleen.train.loop import Interruption
from baleen.train.rundir import Metrics
from baleen.train.saver import Saver


@dataclass
class Work:
    """One stage under way: the model it changes in place, and where it tells and saves what it does.

    `first_step`: steps of the stages before, so that steps count on through metrics.jsonl. `max_steps`: of this run in
    all, None for no limit.
    """

    recipe: AlignRecipe
    run_dir: Path
    folder: Path
    first_step: int
    model: Transformer
    tokenizer: Tokenizer
    ledger: LedgerStage
    saver: Saver
    display: Display
    interruption: Interruption
    max_steps: int | None = None
    warned: bool = False  # of rewards that fail: once is enough
    heldout: float | None = None  # accuracy at the last look at held-out questions

    def tasks(self, own: Sequence[Task]) -> Sequence[Task]:
        return own or self.recipe.tasks

    def metrics(self, step: int) -> Metrics:
        """metrics.jsonl, from this step of the stage on."""
        return Metrics(self.run_dir, self.first_step + step)

    def must_stop(self, step: int) -> bool:
        """Whether somebody asked to stop, or the run has had its steps."""
        limit = self.max_steps
        return self.interruption.wanted or (limit is not None and self.first_step + step >= limit)


Row = dict[str, Any]
