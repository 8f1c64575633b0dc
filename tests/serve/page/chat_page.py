"""The chat page as a person uses it, and a scripted engine that also tells experts and guesses."""

import time

import torch
from scripted_engine import ScriptedEngine

LAYERS, EXPERTS = 2, 8  # routed ones, of the scripted engine's configuration
LAPTOP = {"width": 1360, "height": 820}
PATIENCE = 60.0  # seconds, for a machine that is busy with other things
PHONE = {"width": 390, "height": 844}

RICH = """<think>first the formula</think>The square:

$$\\frac{x^2}{2}$$

| a | b |
|---|--:|
| 1 | $y_1$ |

```python
def double(x):  # twice
    return 2 * "x"
```

**end**"""
RICH_ANSWER = RICH.partition("</think>")[2]


def experts_of(id: int, layer: int) -> list[int]:
    """Where the traced engine says that a token went: made up, but always the same."""
    return [(id * (layer + 1) + step) % EXPERTS for step in (0, 3, 6)]


class TracedEngine(ScriptedEngine):
    """Of the tokens of a step, all but the last were guessed.

    steps_left: after so many steps it waits, None: never. fail: the next step fails.
    """

    steps_left = None
    fail = False

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.context = 4096  # long answers, though nearly every token is a single letter

    def step(self):
        if self.fail:
            raise RuntimeError("told to fail")
        if self.steps_left == 0:
            time.sleep(0.01)
            return []
        if self.steps_left is not None:
            self.steps_left -= 1
        return [self._traced(event) for event in super().step()]

    def _traced(self, event):
        read = event.token_ids[: len(event.token_ids) - (event.finish_reason is not None)]
        routes = torch.tensor([[experts_of(id, layer) for layer in range(LAYERS)] for id in read], dtype=torch.int16)
        guessed = max(0, len(event.token_ids) - 1)
        routes = routes.reshape(len(read), LAYERS, 3)
        return event._replace(routes=routes, accepted=guessed, drafted=guessed + 1)


class DenseEngine(TracedEngine):
    """Of a model without experts: nothing is told of where tokens went."""

    def __init__(self, config, *arguments, **options):
        super().__init__(config.model_copy(update={"first_k_dense_replace": 4}), *arguments, **options)

    def _traced(self, event):
        return super()._traced(event)._replace(routes=None)


def say(answers: dict[str, str]):
    """An answer for each last message of the person; any other is echoed."""

    def answer(prompt: str) -> str:
        message = prompt.rpartition("<|user|>")[2].partition("<|assistant|>")[0]
        return answers.get(message, "I heard " + message)

    return answer


class ChatPage:
    """A playwright page on which the chat page is open; `engine`: the scripted one behind it."""

    def __init__(self, page, server):
        self.page, self.server = page, server

    @property
    def engine(self):
        return self.server.engine

    def prompt(self, request: int = -1) -> str:
        """What the model was asked, as text."""
        return self.engine.tokenizer.decode(self.engine.requests[request].prompt_ids, skip_special=False)

    def beside(self) -> "ChatPage":
        """Another tab of this browser, on the same conversation."""
        page = self.page.context.new_page()
        page.goto(self.page.url)
        return ChatPage(page, self.server)

    def ready(self) -> None:
        self.page.wait_for_selector("#model option", state="attached")

    def ask(self, text: str, wait: bool = True) -> None:
        before = self.page.locator(".message.answer").count()
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")
        self.page.locator(".message.answer").nth(before).wait_for()
        if wait:
            self.settle()

    def settle(self) -> None:
        """Until the last answer has ended and is laid out: then it is announced."""
        script = "!['', 'Answering'].includes(document.getElementById('announcer').textContent)"
        self.until(script)

    def until(self, script: str, argument=None) -> None:
        """Waits for a condition. (playwright waits by evaluating a string in the page, and its policy forbids that.)"""
        deadline = time.monotonic() + PATIENCE
        while not self.page.evaluate(script, argument):
            assert time.monotonic() < deadline, script
            self.page.wait_for_timeout(20)

    def last(self, selector: str = ""):
        """The last answer, or something in it."""
        return self.page.locator(f".message.answer:last-of-type {selector}".strip())

    def button(self, name: str, exact: bool = True):
        return self.page.get_by_role("button", name=name, exact=exact)

    def told(self, text: str) -> None:
        """Waits for a notice, and takes it away."""
        notice = self.page.locator(".toast", has_text=text)
        notice.wait_for()
        notice.evaluate("notice => notice.remove()")

    def titles(self) -> list[str]:
        """Of the list of conversations."""
        return self.page.locator("#conversations .name").all_inner_texts()
