"""An answer on a console, as it comes: its thought folded into one line, its words as they are."""

from __future__ import annotations

import time

from rich.console import Console

from baleen.infer.parse import AnswerParser, Piece, Words


class ShownAnswer:
    """Feed it printable text. `thought`: what the model thought so far, to be shown on request."""

    def __init__(self, console: Console):
        self._console, self._parser = console, AnswerParser()
        self._began: float | None = None  # of the thought that is under way
        self.thought = ""

    def feed(self, text: str) -> None:
        self._show(self._parser.feed(text))

    def end(self, *, interrupted: bool = False) -> None:
        self._show(self._parser.flush())
        if interrupted:
            self._console.print(" …", end="", style="dim")
        if self._began is None:
            self._console.print()
        self._fold()

    def _show(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            assert isinstance(piece, Words)  # no tools were offered
            if piece.part == "content":
                self._fold()
                self._console.print(piece.text, end="", markup=False, highlight=False, soft_wrap=True)
                continue
            if self._began is None:
                self._began = time.perf_counter()
                self._console.print("Thinking", end="", style="dim")
            self.thought += piece.text

    def _fold(self) -> None:
        if self._began is not None:
            seconds = time.perf_counter() - self._began
            self._console.print(f" for {seconds:.1f} s (/thought shows it)", style="dim", highlight=False)
            self._began = None
