"""An engine that says what a test wants, token by token, through the face of the real one."""

import time

from baleen.infer.engine import Event
from baleen.infer.text import Answer, Spelling


class Pages:
    total = 64

    def __init__(self):
        self.in_use = 0


class Shape:
    def __init__(self, config):
        self.config = config


class ScriptedEngine:
    """`answer(prompt_ids)` gives the ids to say, one a step; after the last comes the end token.

    It may instead be an exception, which the step raises. `pause`: seconds a step.
    """

    def __init__(self, config, tokenizer, answer, *, pause=0.0, per_step=1):
        self.model, self.tokenizer, self.context = Shape(config), tokenizer, config.max_position_embeddings
        self.pages, self.answer, self.pause, self.per_step = Pages(), answer, pause, per_step
        self.requests, self.aborted, self._runs = [], [], {}

    @property
    def has_work(self):
        return bool(self._runs)

    @property
    def running(self):
        return len(self._runs)

    waiting = 0

    def submit(self, request):
        id = len(self.requests)
        self.requests.append(request)
        params = request.params
        room = self.context - len(request.prompt_ids)
        ends = (self.tokenizer.eos_id, *params.stop_ids)
        spelling = Spelling(self.tokenizer, params.skip_special)
        text = Answer(spelling, ends, params.stop, min(room, params.max_tokens or room))
        script = self.answer(list(request.prompt_ids))
        self._runs[id] = script if isinstance(script, Exception) else ([*script, self.tokenizer.eos_id], text)
        self.pages.in_use += 1
        return id

    def abort(self, id):
        if self._runs.pop(id, None) is not None:
            self.aborted.append(id)
            self.pages.in_use -= 1

    def step(self):
        time.sleep(self.pause)
        events = []
        for id, run in list(self._runs.items()):
            if isinstance(run, Exception):
                raise run
            ids, text = run
            new, used, reason = text.feed(ids[: self.per_step])
            taken = ids[:used]
            del ids[:used]
            events.append(Event(id, new, tuple(taken), 0, reason))
            if reason is not None:
                del self._runs[id]
                self.pages.in_use -= 1
        return events
