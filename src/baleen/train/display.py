"""What a person sees while a run trains: one line that moves, and samples that grow above it. All on stderr."""

from __future__ import annotations

import math
import sys
import time
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal to redraw a line on


class Display:
    """A progress bar on a terminal; a line every few seconds elsewhere; nothing at all if `quiet`."""

    def __init__(self, *, quiet: bool = False):
        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False, soft_wrap=True)
        self._bar = Progress(
            BarColumn(bar_width=24), TextColumn("{task.description}"), console=self.console, transient=True
        )
        self._task = self._bar.add_task("", total=1.0)
        self._last_line = 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, message: str) -> None:
        self.console.print(escape(message))

    def warn(self, message: str) -> None:
        self.console.print(f"[yellow]warning:[/] {escape(message)}")

    def warn_if_left_out(self, step: int, grad_norm: float) -> None:
        if not math.isfinite(grad_norm):
            self.warn(f"step {step}: the gradient is not finite; the update is left out")

    def sample(self, step: int, prompt: str, text: str) -> None:
        self.console.print(f"[dim]step {step}[/]  [cyan]{escape(prompt)}[/] [bold]{escape(text)}[/]")

    def update(self, share: float, parts: dict[str, str]) -> None:
        """share of the run that is done, and what to print beside it."""
        text = "  ".join(f"{name} {value}" if name else value for name, value in parts.items())
        if self.console.is_terminal:
            self._bar.update(self._task, completed=min(share, 1.0), description=text)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.console.print(f"{share:4.0%}  {escape(text)}")
