"""One step of continuous batching: read, draw, keep, draft.

Shapes: N tokens of the step, R places that want a token, M scored places, d hidden, Z = vocab_size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from baleen.infer.logprobs import logprobs_of, require_numbers
from baleen.infer.request import Event, Logprob
from baleen.infer.run import Run
from baleen.infer.runner import Runner
from baleen.infer.sampler import Place, choose
from baleen.infer.speculative import Drafter, Payoff
from baleen.model.cache import Batch


class Stepper:
    """Takes runs one forward of the trunk further; `drafter` is None for a model without MTP layers."""

    def __init__(self, runner: Runner, drafter: Drafter | None):
        self.runner, self._drafter = runner, drafter
        self._payoff = Payoff()

    def step(self, plan: Sequence[tuple[Run, int]]) -> list[tuple[Run, Event]]:
        """Each run reads so many tokens; an event for each that then says something. Raises UserError where the model
        gives no numbers: its answers can only be aborted then.

        Afterwards `run.span.count` tokens of it are true and in the cache, from `job.computed` on.
        """
        started = time.perf_counter()
        runs = [run for run, _ in plan]
        only_answers = all(run.job.remaining == 1 for run in runs)
        tokens: list[int] = []
        for run, count in plan:
            tokens += run.read(len(tokens), count)
        starts, tables = [run.job.computed for run in runs], [run.job.pages for run in runs]
        result = self.runner.forward(Batch(tokens, starts, [count for _, count in plan], tables))
        self._score_prompts(runs, result.hidden_Nd)
        speakers = [run for run in runs if run.span.is_last]
        events = [
            (run, run.move_on(drawn, logprobs, result.experts))
            for run, (drawn, logprobs) in zip(speakers, self._draw(speakers, result.hidden_Nd), strict=True)
        ]
        finished = {id(run) for run, event in events if event.finish_reason is not None}
        drafted = self._draft([run for run in runs if id(run) not in finished], result.hidden_Nd)
        for run in runs:
            if run.depth and run.job.unread is None and (not run.read_along or id(run) in finished):
                run.job.unread = run.job.computed
        if only_answers and any(run.adaptive for run in runs):
            said = sum(len(event.token_ids) for _, event in events)
            self._payoff.observe(len(runs), drafted, said, time.perf_counter() - started)
        return events

    def _score_prompts(self, runs: Sequence[Run], hidden_Nd: Tensor) -> None:
        for run in [run for run in runs if run.scores_prompt]:
            rows, ids = run.scored_rows()
            if ids:
                logits_MZ = self.runner.logits(hidden_Nd[rows.start : rows.stop])
                tops = [run.request.params.prompt_logprobs or 0] * len(ids)
                run.prompt_logprobs += logprobs_of(logits_MZ, ids, tops)

    def _draw(self, runs: Sequence[Run], hidden_Nd: Tensor) -> list[tuple[list[int], list[Logprob]]]:
        """For each run the tokens at its places and, if any run wants to know, their log-probabilities."""
        rows: list[int] = []
        places: list[Place] = []
        borders = [0]  # of each run's places
        for run in runs:
            own = run.places()
            if own:
                rows += run.place_rows()
                places += own
            borders.append(len(places))
        if not places:
            return [([], []) for _ in runs]
        logits_RZ = self.runner.logits(hidden_Nd if len(rows) == len(hidden_Nd) else hidden_Nd[rows])
        drawn_R = choose(logits_RZ, places)
        require_numbers(logits_RZ.gather(1, drawn_R[:, None]))
        drawn = drawn_R.tolist()
        tops = [place.params.logprobs for place in places]
        asked = any(top is not None for top in tops)
        logprobs = logprobs_of(logits_RZ, drawn, [top or 0 for top in tops]) if asked else []
        return [(drawn[start:end], logprobs[start:end]) for start, end in pairwise(borders)]

    def _draft(self, runs: Sequence[Run], hidden_Nd: Tensor) -> bool:
        """Let the MTP layers read along, and draft for the next step; whether adaptive answers under way did."""
        if self._drafter is None:
            return False
        speaking = sum(run.span.is_last for run in runs)
        pays = any(run.adaptive for run in runs) and speaking > 0 and self._payoff.drafts(speaking)
        windows = []
        for run in runs:
            # Prompts are always read along, to their first token: later drafts rest on them.
            run.read_along = bool(run.depth) and (
                pays or not run.adaptive or not run.span.is_last or run.answer.count == 1
            )
            if run.read_along:
                windows.append((run, run.window()))
            run.tail_Td = None
        if windows:
            self._drafter.propose(hidden_Nd, [window for _, window in windows])
        for run, window in windows:
            run.job.drafts, run.tail_Td, run.tail_end = window.drafts, window.tail_Td, window.start + window.count
            run.read_along = window.place is None or window.wanted == run.depth
        return pays
