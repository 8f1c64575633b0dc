"""The REPL: turns, commands, interrupts, and a conversation that outgrows the context."""

import io
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from baleen import cli
from baleen.config import UserError
from baleen.data.corpus import Message
from baleen.data.tokenizer import Tokenizer
from baleen.data.tokenizer_training import train_tokenizer
from baleen.infer import chat as infer_chat
from baleen.infer.chat import CHAT_PARAMS, Chat, Local, answer_by_vote, answer_once, asked, params_of, printable
from baleen.infer.engine import Engine, Request, Stats
from baleen.infer.parse import words_of
from baleen.infer.sampler import SamplingParams
from baleen.interop.huggingface import save_model

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture
def engine(tiny_model):
    """Makes an engine with a true tokenizer of 290 tokens, over a small random model."""
    tokenizer = train_tokenizer(["hello there, how are you? well, and you?"] * 9, 290)
    return lambda **changes: Engine(
        tiny_model(torch.float64, vocab_size=290, num_hidden_layers=2, **changes), tokenizer
    )


@pytest.fixture
def chat(engine):
    """Makes a chat and the function that returns what it has printed since the last call."""

    def make(**changes):
        screen = io.StringIO()
        chat = Chat(Local(engine(**changes)), Console(file=screen, width=200), GREEDY)

        def printed():
            text = screen.getvalue()
            screen.seek(0)
            screen.truncate()
            return text

        return chat, printed

    return make


def expected(engine, messages, params=GREEDY):
    stop_ids = (engine.tokenizer.user_id,)
    params = SamplingParams(temperature=params.temperature, max_tokens=params.max_tokens, stop_ids=stop_ids)
    ids = engine.tokenizer.encode_chat(messages, add_generation_prompt=True)
    return printable(engine.complete([Request(ids, params)])[0].text)


def test_a_model_may_say_how_it_is_drawn(tmp_path):
    assert params_of(tmp_path) == params_of(tmp_path / "model.gguf") == CHAT_PARAMS
    for said, temperature in [(False, 0.0), (True, CHAT_PARAMS.temperature)]:
        (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": said}))
        assert params_of(tmp_path).temperature == temperature
    for said, ends in ((7, (7,)), ([7, 9], (7, 9)), (None, ())):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
        assert params_of(tmp_path).stop_ids == ends
    said = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "top_k": 40, "min_p": None, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert params_of(tmp_path) == SamplingParams(temperature=0.2, top_p=0.9, top_k=40)
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 40}))
    assert params_of(tmp_path) == replace(CHAT_PARAMS, top_k=40)
    (tmp_path / "generation_config.json").write_text(json.dumps(said | {"do_sample": False}))
    assert params_of(tmp_path).temperature == 0
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 9}))
    with pytest.raises(UserError, match=r"generation_config\.json: top_p is 9"):
        params_of(tmp_path)


def words(text):
    """Without markers, of which a random network writes some."""
    return "".join(piece.text for piece in words_of([text]))


def test_the_conversation_goes_on(chat):
    chat, printed = chat()
    chat.take("hello")
    first = expected(chat.partner.engine, [Message("user", "hello")])
    assert first and printed() == words(first) + "\n"
    assert chat.messages == [Message("user", "hello"), Message("assistant", first)]
    chat.take("and you?")
    assert chat.messages[-1].content == expected(chat.partner.engine, chat.messages[:3])
    chat.take("/reset")
    chat.take("hello")
    assert chat.messages == [Message("user", "hello"), Message("assistant", first)]


def test_system_message_stays(chat):
    chat, printed = chat()
    chat.take("/system you are well")
    chat.take("hello")
    assert chat.messages[-1].content == expected(chat.partner.engine, chat.messages[:2])
    chat.take("/reset")
    assert chat.messages == [Message("system", "you are well")]
    chat.take("/system")
    assert chat.messages == []


def test_speculation_changes_no_word(chat):
    chat, printed = chat()
    chat.take("/speculate off")
    chat.take("hello")
    plain = printed()
    assert chat.stats.accepted == []
    chat.take("/reset")
    chat.take("/speculate on")
    chat.take("hello")
    assert printed() == plain and len(chat.stats.accepted) == 1
    chat.take("/stats")
    assert "drafts 1 ahead" in printed()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/temperature warm", "a number such as 0.7"),
        ("/temperature -1", "temperature is -1.0"),
        ("/speculate perhaps", "on or off"),
        ("/speculate on", "no MTP layer"),
        ("/stats", "nothing has been answered"),
        ("/save", "the name of a file"),
        ("/dance", "/help lists"),
        ("hello " * 300, "the model's context holds 256"),
    ],
)
def test_mistakes_change_nothing(chat, line, says):
    chat, printed = chat(num_nextn_predict_layers=0)
    before = (chat.params, chat.draft, chat.messages)
    chat.take(line)
    assert says in printed()
    assert before == (chat.params, chat.draft, chat.messages)


def test_temperature_and_help(chat):
    chat, printed = chat()
    chat.take("/temperature 0.3")
    assert chat.params.temperature == 0.3 and chat.params.max_tokens == 12
    chat.take("/help")
    listed = printed()
    assert all(name in listed for name in ("/help", "/reset", "/system TEXT", "/speculate on|off", "/save FILE"))


def test_save_overwrites_nothing(chat, tmp_path):
    chat, printed = chat()
    chat.take("hello")
    file = tmp_path / "talk.jsonl"
    chat.take(f"/save {file}")
    saved = file.read_text(encoding="utf-8")
    assert [m["role"] for m in json.loads(saved)["messages"]] == ["user", "assistant"]
    printed()
    chat.take("again")
    chat.take(f"/save {file}")
    assert "is there already" in printed().replace("\n", "") and file.read_text(encoding="utf-8") == saved
    chat.take(f"/save {tmp_path / 'no' / 'folder.jsonl'}")
    assert "can't be written" in printed().replace("\n", "")


def test_interrupt_stops_the_answer_only(chat):
    chat, printed = chat(num_nextn_predict_layers=0)
    whole = expected(chat.partner.engine, [Message("user", "hello")])
    forwards = []

    def interrupt(*_):
        forwards.append(1)
        if len(forwards) == 6:
            raise KeyboardInterrupt

    handle = chat.partner.engine.model.register_forward_hook(interrupt)
    chat.take("hello")
    handle.remove()
    assert len(forwards) == 6
    partial = chat.messages[-1].content
    assert whole.startswith(partial) and 0 < len(partial) < len(whole)
    assert printed() == partial + " …\n"
    chat.take("go on")
    assert chat.messages[-1].content == expected(chat.partner.engine, chat.messages[:3])


def test_run_ends_at_quit(chat):
    chat, printed = chat()
    lines = iter(["/temperature 0", KeyboardInterrupt(), "", "/quit", "never read"])

    def read():
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    chat.run(read)
    assert "/quit or Ctrl-D" in printed() and next(lines) == "never read"


def test_run_ends_with_its_input(chat):
    chat, printed = chat()
    chat.run(_at_end)
    assert printed() == ""


def _at_end():
    raise EOFError


def test_oldest_turns_are_dropped_with_a_notice(chat, monkeypatch):
    chat, printed = chat(max_position_embeddings=128)
    chat.take("/system be brief")
    notices = 0
    for number in range(8):
        chat.take(f"hello there number {number}")
        notices += "the context is full" in printed()
    assert notices >= 2
    assert len(chat.messages) == 17  # the system message and every turn are kept for /save
    asked_for = []
    respond = infer_chat.respond
    monkeypatch.setattr(infer_chat, "respond", lambda *args: asked_for.append(args[1]) or respond(*args))
    chat.take("and you?")
    (ids,) = asked_for  # three quarters of the context; the last turn is there, and the system message
    text = chat.partner.engine.tokenizer.decode(ids, skip_special=False)
    assert len(ids) <= 96 and "be brief" in text and "and you?" in text and "number 0" not in text


def test_the_last_turn_may_fill_the_context(engine):
    engine = engine(max_position_embeddings=64)
    turns = [Message("user", "hi"), Message("assistant", "hello"), Message("user", "?" * 50)]
    reply = Local(engine).reply(turns, GREEDY, False)
    assert reply.dropped == 2 and reply.stats.prompt_tokens > 50
    with pytest.raises(UserError, match="context holds 64"):
        answer_once(Local(engine), asked("?" * 80), io.StringIO(), io.StringIO())


def test_one_answer(engine):
    engine = engine()
    out = io.StringIO()
    stats = answer_once(Local(engine), asked("hello"), out, io.StringIO(), GREEDY)
    assert out.getvalue() == words(expected(engine, [Message("user", "hello")])) + "\n"
    assert 0 < stats.tokens <= 12


def test_a_run_is_asked_as_it_was_trained(engine, tmp_path, monkeypatch):
    """Under its recipe's system message, at the prompt and in a conversation alike."""
    model, said = engine(), []
    save_model(model.model.float(), tmp_path / "model", tokenizer=model.tokenizer)
    (tmp_path / "recipe.toml").write_text('system = "Work out the sum."')
    monkeypatch.setattr(infer_chat, "answer_once", lambda partner, messages, *_: said.append(messages))
    monkeypatch.setattr(infer_chat.Chat, "run", lambda self, read: said.append(list(self.messages)))
    cli.chat_(tmp_path, prompt="1+1=")
    cli.chat_(tmp_path)
    cli.chat_(tmp_path / "model")
    system = Message("system", "Work out the sum.")
    assert said == [[system, Message("user", "1+1=")], [system], [system]]


def test_a_user_turn_of_the_models_own_ends_the_answer(engine):
    engine = engine()
    with torch.no_grad():  # the model says nothing but the user's marker
        engine.model.lm_head.weight.zero_()
        engine.model.model.norm.weight.zero_()
    engine = Engine(engine.model, MarkerFirst(engine.tokenizer))
    out = io.StringIO()
    stats = answer_once(Local(engine), asked("hello"), out, io.StringIO(), GREEDY)
    assert out.getvalue() == "" and stats.tokens == 1


class MarkerFirst:
    """A tokenizer whose user marker is token 0, the one a model of zeros chooses."""

    user_id = 0
    answer_ends = property(lambda self: (self._tokenizer.eos_id, self.user_id))

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


def test_control_characters_never_reach_the_terminal():
    assert printable("a\x1b[2J\x07b\r\n\tc\x9b\x7f é🐋") == "a[2Jb\n\tc é🐋"


class Scripted:
    """A partner, and its reply: it says these pieces, and raises those that are exceptions."""

    drafts, dropped, stats = False, 0, Stats()

    def __init__(self, *pieces):
        self.pieces = pieces

    def reply(self, messages, params, draft):
        return self

    def __iter__(self):
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece


def test_the_thought_is_folded():
    screen = io.StringIO()
    chat = Chat(Scripted("<thi", "nk>3+8=11 ", "11-2=9</think><ans", "wer>9</answer>"), Console(file=screen, width=200))
    chat.take("3+8-2=")
    assert re.fullmatch(r"Thinking for \d+\.\d s \(/thought shows it\)\n9\n", screen.getvalue())
    assert chat.messages[-1].content == "<think>3+8=11 11-2=9</think><answer>9</answer>"  # as it was, for /save
    chat.take("/thought")
    assert screen.getvalue().endswith("\n3+8=11 11-2=9\n")
    chat.partner = Scripted("nine")
    chat.take("and?")
    chat.take("/thought")
    assert screen.getvalue().endswith("\nnine\nthere was no thought before the last answer\n")


def test_a_thought_may_be_interrupted():
    screen = io.StringIO()
    chat = Chat(Scripted("<think>3+8", KeyboardInterrupt()), Console(file=screen, width=200))
    chat.take("3+8-2=")
    assert re.fullmatch(r"Thinking … for \d+\.\d s \(/thought shows it\)\n", screen.getvalue())


def test_thought_and_answer_of_one_question_go_apart():
    out, thoughts = io.StringIO(), io.StringIO()
    answer_once(Scripted("<think>\n3+8=11</think>", "<answer>1", "1</answer>"), asked("3+8="), out, thoughts)
    assert (out.getvalue(), thoughts.getvalue()) == ("11\n", "3+8=11\n")


@pytest.fixture
def thinker(engine, tmp_path):
    """An engine whose chat template opens the thought itself."""
    engine = engine(num_nextn_predict_layers=0)
    engine.tokenizer.save(tmp_path)
    with (tmp_path / "chat_template.jinja").open("a", encoding="utf-8") as file:
        file.write("<think>\n")
    return Engine(engine.model, Tokenizer.load(tmp_path))


def test_a_template_may_open_the_thought(thinker):
    reply = Local(thinker).reply([Message("user", "hello")], GREEDY, 0)
    assert "".join(reply).startswith("<think>\n")


def test_votes_know_a_thought_that_the_template_opened(thinker, monkeypatch):
    texts = ["3+8 is", "3+8=10</think>10", "3+8=11</think>11", "3+8 is", "8+3=11</think>11"]
    drawn = []

    def complete(requests):
        drawn.extend(requests)
        return [SimpleNamespace(text=text) for text in texts]

    monkeypatch.setattr(thinker, "complete", complete)
    out, thoughts = io.StringIO(), io.StringIO()
    assert answer_by_vote(thinker, asked("3+8="), out, thoughts, 5) == (2, 2, 3)
    assert (out.getvalue(), thoughts.getvalue()) == ("11\n", "3+8=11\n")
    assert len(drawn) == 5 and all(thinker.tokenizer.user_id in request.params.stop_ids for request in drawn)
    del texts[1:3], texts[2:]
    with pytest.raises(UserError, match="none of the 2 answers"):
        answer_by_vote(thinker, asked("3+8="), io.StringIO(), io.StringIO(), 2)


@pytest.mark.parametrize("generation, temperature", [({"temperature": 0.2}, 0.2), ({"do_sample": False}, 0.7)])
def test_a_vote_is_drawn_as_the_model_says_but_never_greedily(engine, tmp_path, monkeypatch, generation, temperature):
    model, drawn = engine(), []
    save_model(model.model.float(), tmp_path, tokenizer=model.tokenizer, generation=generation)
    vote = SimpleNamespace(votes=3, cast=3)
    monkeypatch.setattr(infer_chat, "answer_by_vote", lambda *args: drawn.append(args[-1].temperature) or vote)
    cli.chat_(tmp_path, prompt="3+8=", votes=3)
    assert drawn == [temperature]


def test_an_interrupt_before_the_first_word_leaves_no_turn(thinker):
    chat = Chat(Local(thinker), Console(file=io.StringIO()), GREEDY)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = thinker.model.register_forward_hook(interrupt)
    chat.take("hello")
    handle.remove()
    assert chat.messages == []
    chat.take("hello")
    assert chat.messages[-1].content.startswith("<think>\n") and len(chat.messages) == 2
