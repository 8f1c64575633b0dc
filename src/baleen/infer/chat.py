"""Talking with a model in the terminal: the REPL of `baleen chat`, and one answer for `--prompt`.

Who answers is a `Partner`: an engine in this process (`Local`), or a server elsewhere.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from baleen.config import UserError
from baleen.data.corpus import Message
from baleen.infer.answers import Vote, majority
from baleen.infer.engine import Engine, Generation, Request, Speculate, Stats
from baleen.infer.parse import THINK, opens_reasoning, words_of
from baleen.infer.recent import recent
from baleen.infer.sampler import SamplingParams
from baleen.infer.shown import ShownAnswer
from baleen.interop.load import generation_of

CHAT_PARAMS = SamplingParams(temperature=0.7, top_p=0.95)
SAID = ("temperature", "top_p", "top_k", "min_p")  # where generation_config.json does
ROOM_SHARE = 4  # a quarter of the context is kept free for the answer while there are older turns to drop


class Reply(Protocol):
    """An answer on its way: iterate for its text, the thought between `<think>` and `</think>`.

    dropped: the oldest messages that the context has no room for.
    """

    @property
    def dropped(self) -> int: ...

    @property
    def stats(self) -> Stats: ...

    def __iter__(self) -> Iterator[str]: ...


class Partner(Protocol):
    """Whoever answers. `drafts`: whether it has MTP layers that may draft ahead, and leaves it to us."""

    @property
    def drafts(self) -> bool: ...

    def reply(self, messages: Sequence[Message], params: SamplingParams, draft: bool) -> Reply: ...


class Local:
    """An engine in this process."""

    def __init__(self, engine: Engine):
        self.engine = engine

    @property
    def drafts(self) -> bool:
        return self.engine.model.config.num_nextn_predict_layers > 0

    def reply(self, messages: Sequence[Message], params: SamplingParams, draft: bool) -> Reply:
        encode = partial(self.engine.tokenizer.encode_chat, add_generation_prompt=True)
        prompt_ids, dropped = recent(messages, encode, self.engine.context - self.engine.context // ROOM_SHARE)
        generation = respond(self.engine, prompt_ids, params, "auto" if draft else 0)
        return _LocalReply(generation, opening_of(self.engine, prompt_ids), dropped)


class _LocalReply:
    def __init__(self, generation: Generation, opening: str, dropped: int):
        self._generation, self._opening, self.dropped = generation, opening, dropped

    @property
    def stats(self) -> Stats:
        return self._generation.stats

    def __iter__(self) -> Iterator[str]:
        opening = self._opening
        for event in self._generation:
            if event.text:  # a thought of no word is none
                yield opening + event.text
                opening = ""


def opening_of(engine: Engine, prompt_ids: list[int]) -> str:
    """What of the answer the chat template has written already: the opening of its thought, or nothing."""
    return f"{THINK}\n" if opens_reasoning(engine.tokenizer, prompt_ids) else ""


def params_of(model: Path) -> SamplingParams:
    """How the model at this path talks: as its generation_config.json says (a do_sample of false is temperature 0), for
    the rest by CHAT_PARAMS, and until any of the end tokens that are listed there."""
    said = generation_of(model)
    ends = said.get("eos_token_id")
    stop_ids = tuple(id for id in (ends if isinstance(ends, list) else [ends]) if isinstance(id, int))
    own = {name: said[name] for name in SAID if isinstance(said.get(name), int | float)}
    if said.get("do_sample") is False:
        own["temperature"] = 0.0
    try:
        return replace(CHAT_PARAMS, **own, stop_ids=stop_ids)
    except UserError as error:
        raise UserError(f"{model / 'generation_config.json'}: {error}") from None


def respond(engine: Engine, prompt_ids: list[int], params: SamplingParams, speculate: Speculate) -> Generation:
    """Begin the next turn of a conversation that fits the context (see `recent`), as the chat template has it."""
    return engine.generate([turn(engine, prompt_ids, params)], speculate=speculate)


def turn(engine: Engine, prompt_ids: list[int], params: SamplingParams) -> Request:
    """Of the assistant alone."""
    return Request(prompt_ids, replace(params, stop_ids=(*params.stop_ids, *engine.tokenizer.answer_ends)))


def asked(prompt: str, system: str = "") -> list[Message]:
    """A conversation of one question, under a system message if there is one."""
    return [*([Message("system", system)] if system else []), Message("user", prompt)]


def answer_once(
    partner: Partner, messages: Sequence[Message], out: TextIO, thoughts: TextIO, params: SamplingParams = CHAT_PARAMS
) -> Stats:
    """One answer, as it comes, each part with a line break: `baleen chat RUN --prompt TEXT`."""
    reply = partner.reply(messages, params, partner.drafts)
    _write(reply, out, thoughts)
    return reply.stats


def answer_by_vote(
    engine: Engine,
    messages: Sequence[Message],
    out: TextIO,
    thoughts: TextIO,
    votes: int,
    params: SamplingParams = CHAT_PARAMS,
) -> Vote:
    """The majority of `votes` answers, drawn together: writes the first that says it. Raises UserError if none does.

    With a seed, answer i takes seed + i.
    """
    prompt_ids = engine.tokenizer.encode_chat(messages, add_generation_prompt=True)
    seeds = [None if params.seed is None else params.seed + i for i in range(votes)]
    requests = [turn(engine, prompt_ids, replace(params, seed=seed)) for seed in seeds]
    opening = opening_of(engine, prompt_ids)
    texts = [opening + done.text for done in engine.complete(requests)]
    vote = majority(texts)
    if vote is None:
        raise UserError(f"none of the {votes} answers came to an end: give more room to think, or ask again")
    _write([texts[vote.index]], out, thoughts)
    return vote


def _write(answer: Iterable[str], out: TextIO, thoughts: TextIO) -> None:
    for part, pieces in groupby(words_of(map(printable, answer)), key=lambda words: words.part):
        file = out if part == "content" else thoughts
        for words in pieces:
            file.write(words.text)
            file.flush()
        file.write("\n")


def printable(text: str) -> str:
    """Without control characters, by which a model's words could steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or (c >= " " and not "\x7f" <= c < "\xa0"))


class Chat:
    """One conversation on one console. `messages` keeps every turn, those too that the context no longer holds."""

    def __init__(self, partner: Partner, console: Console, params: SamplingParams = CHAT_PARAMS, system: str = ""):
        self.partner, self.console, self.params = partner, console, params
        self.draft = partner.drafts
        self.messages: list[Message] = [Message("system", system)] if system else []
        self.stats: Stats | None = None
        self._dropped, self._thought = 0, ""
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/help": ("", "these commands", self._help),
            "/reset": ("", "forget the conversation; the system message stays", self._reset),
            "/system": ("TEXT", "begin anew under this system message; without TEXT under none", self._system),
            "/temperature": ("X", "0 always takes the likeliest token, 1 draws as the model was trained", self._heat),
            "/speculate": ("on|off", "let the MTP layers draft ahead: faster where they guess well", self._speculate),
            "/thought": ("", "what the model thought before its last answer", self._show_thought),
            "/stats": ("", "speed and accepted drafts of the last answer", self._show_stats),
            "/save": ("FILE", "write the conversation as a line of jsonl, which a recipe can train on", self._save),
            "/quit": ("", "end; so does Ctrl-D", self._quit),
        }
        self._running = True

    def run(self, read: Callable[[], str]) -> None:
        """Read lines until /quit or the end of input. Ctrl-C stops an answer, and at the prompt says how to quit."""
        while self._running:
            try:
                line = read().strip()
                if line:
                    self.take(line)
            except EOFError:
                self._running = False
            except KeyboardInterrupt:
                self._say("\n/quit or Ctrl-D ends the conversation.")

    def take(self, line: str) -> None:
        """One line of the user: a command, or a turn to answer. A mistake is told and changes nothing."""
        try:
            if not line.startswith("/"):
                self._answer(line)
                return
            name, _, argument = line.partition(" ")
            if name not in self._commands:
                raise UserError(f"there is no command {name}: /help lists them")
            self._commands[name][2](argument.strip())
        except UserError as error:
            self.console.print(str(error), style="red", markup=False, highlight=False)

    def _answer(self, text: str) -> None:
        messages = [*self.messages, Message("user", text)]
        reply = self.partner.reply(messages, self.params, self.draft)
        if reply.dropped > self._dropped:
            self._say(f"(the context is full: the oldest {reply.dropped} messages are no longer seen)")
        self._dropped = reply.dropped
        answer, shown, interrupted = "", ShownAnswer(self.console), False
        try:
            for piece in map(printable, reply):
                answer += piece
                shown.feed(piece)
        except KeyboardInterrupt:
            interrupted = True
        shown.end(interrupted=interrupted)
        self.stats, self._thought = reply.stats, shown.thought
        if answer:
            self.messages = [*messages, Message("assistant", answer)]

    def _say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False)

    # --- commands

    def _help(self, argument: str) -> None:
        table = Table.grid(padding=(0, 2))
        for name, (parameter, meaning, _) in self._commands.items():
            table.add_row(escape(f"{name} {parameter}"), meaning)
        self.console.print(table)

    def _reset(self, argument: str) -> None:
        self.messages = [message for message in self.messages[:1] if message.role == "system"]
        self._dropped = 0

    def _system(self, argument: str) -> None:
        self.messages = [Message("system", argument)] if argument else []
        self._dropped = 0

    def _heat(self, argument: str) -> None:
        try:
            temperature = float(argument)
        except ValueError:
            raise UserError(f"/temperature takes a number such as 0.7, not {argument!r}") from None
        self.params = replace(self.params, temperature=temperature)

    def _speculate(self, argument: str) -> None:
        if argument not in ("on", "off"):
            raise UserError(f"/speculate takes on or off, not {argument!r}")
        if not self.partner.drafts:
            raise UserError("there is nothing to choose: the model has no MTP layer to draft with, or a server decides")
        self.draft = argument == "on"

    def _show_thought(self, argument: str) -> None:
        if not self._thought:
            raise UserError("there was no thought before the last answer")
        self._say(self._thought)

    def _show_stats(self, argument: str) -> None:
        if self.stats is None:
            raise UserError("nothing has been answered yet")
        stats = self.stats
        self._say(
            f"{stats.prompt_tokens} tokens read, {stats.tokens} written at {stats.tokens_per_second:.1f} a second, "
            f"{stats.tokens_per_step:.2f} a step"
        )
        for depth, share in enumerate(stats.acceptance, 1):
            kept, drafted = stats.accepted[depth - 1], stats.drafted[depth - 1]
            self._say(f"drafts {depth} ahead: {kept} of {drafted} accepted ({share:.0%})")

    def _save(self, argument: str) -> None:
        if not argument:
            raise UserError("/save takes the name of a file")
        turns = [{"role": message.role, "content": message.content} for message in self.messages]
        try:
            with Path(argument).expanduser().open("x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
        except FileExistsError:
            raise UserError(f"{argument} is there already: take another name") from None
        except OSError as error:
            raise UserError(f"{argument} can't be written: {error.strerror}") from None
        self._say(f"saved to {argument}")

    def _quit(self, argument: str) -> None:
        self._running = False


def chat(partner: Partner, console: Console, params: SamplingParams = CHAT_PARAMS, system: str = "") -> None:
    """The REPL, with the terminal's own line editing where there is one."""
    with contextlib.suppress(ImportError):  # not on Windows
        importlib.import_module("readline")  # input() uses it once it is loaded
    console.print("Type a message, or /help. Ctrl-C stops an answer.", style="dim")
    Chat(partner, console, params, system).run(lambda: console.input("[bold cyan]>[/] "))
