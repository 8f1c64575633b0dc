"""Tasks: what is a question, what is the right answer to it, and what a program may do."""

import fcntl
import json
import math
import os
import sys
import tracemalloc
from types import SimpleNamespace

import pytest

from baleen.config import UserError
from baleen.data.document import Document
from baleen.eval import programs
from baleen.eval.likelihood import likelihoods
from baleen.eval.programs import pass_at_k, runs_without_fault
from baleen.eval.score import beginning, fitting, score_task
from baleen.eval.tasks import Choice, Cloze, Program, Write, made_task, read_task
from baleen.eval.token_loss import token_nats
from baleen.infer.engine import Request
from baleen.infer.sampler import SamplingParams

TEXT = "the whale sings a song to the sea and the sea sings back to the whale\n"
CONNECT = """import socket
server = socket.socket()
server.bind(('127.0.0.1', 0))
server.listen()
socket.create_connection(server.getsockname(), 1)"""
LEAVE_ONE_BEHIND = """import fcntl, os, time
held = open({file!r}, 'w')
fcntl.flock(held, fcntl.LOCK_EX)
if os.fork() == 0:
    os.setsid()
    time.sleep(60)"""


@pytest.fixture(scope="module")
def guarded():
    """Skips where the system does not let a process give up its network: there no program is run at all. Where
    BALEEN_GUARD is `require`, as in .ci/run, that is a failure."""
    if not sys.platform.startswith("linux") or programs._run("")[0] == programs.UNGUARDED:
        assert os.environ.get("BALEEN_GUARD") != "require"
        pytest.skip("this system does not let a process give up its network")


def test_likelihoods_are_those_of_a_plain_forward(engine):
    ids = beginning(engine.tokenizer, TEXT)
    whole, tail = likelihoods(engine, [(ids[:1], ids[1:]), (ids[:-3], ids[-3:])])
    nats_T = token_nats(engine.model, [ids])[0]
    assert whole.log_likelihood == pytest.approx(-float(nats_T.sum()), rel=1e-4) and whole.tokens == len(ids) - 1
    assert tail.log_likelihood == pytest.approx(-float(nats_T[-3:].sum()), rel=1e-4) and not tail.greedy
    long = likelihoods(engine, [(ids * 9, ids[:5])])[0]
    assert long.tokens == 5


def test_what_a_model_would_say_is_greedy(engine):
    ids = beginning(engine.tokenizer, "the whale")
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    said = list(engine.complete([Request(ids, params)])[0].token_ids)
    assert likelihoods(engine, [(ids, said)])[0].greedy


def test_the_likeliest_choice_counts(engine):
    choices = (" sings", " xylophones of the sea and the whale")
    by_length = Choice(prompt="the whale", choices=choices, answer=0)
    scores = score_task(engine, [by_length, by_length.model_copy(update={"answer": 1})])
    assert (
        scores["accuracy"] == 0.5 and scores["questions"] == 2 and scores["stderr"] == pytest.approx(0.25**0.5 / 2**0.5)
    )
    one = score_task(engine, [by_length])  # a model that knows nothing gives the shorter text more
    assert one["accuracy"] == 1.0


def test_gaps_and_answers(engine):
    """What the model would say itself is right, anything else wrong."""
    request = Request(beginning(engine.tokenizer, "the whale"), SamplingParams(temperature=0, max_tokens=4))
    [told] = engine.complete([request])
    gaps = [Cloze(text="the whale", gap=told.text), Cloze(text="the whale", gap=" a song of another")]
    ids = beginning(engine.tokenizer, "the whale")
    [own] = likelihoods(engine, [(ids, engine.tokenizer.encode(told.text))])
    assert own.greedy
    scores = score_task(engine, gaps)
    assert scores["accuracy"] == 0.5 and math.log(scores["perplexity"]) == pytest.approx(math.log(300), rel=0.2)
    asked = {"prompt": "the whale", "stop": "\0", "max_tokens": 4}
    writes = [Write(answers=("others", told.text.strip()), **asked), Write(answers=("no such words",), **asked)]
    assert score_task(engine, writes) == {"exact_match": 0.5, "stderr": 0.125**0.5, "questions": 2}


def test_programs_are_run_with_what_the_model_wrote(engine, monkeypatch):
    from baleen.eval import score

    seen = []
    monkeypatch.setattr(score, "runs_without_fault", lambda program: bool(seen.append(program)) or len(seen) % 2 == 0)
    question = Program(prompt="def one():\n", test="assert one() == 1", max_tokens=4)
    assert score_task(engine, [question], samples=2) == {"pass@1": 0.5, "pass@2": 1.0, "questions": 1}
    assert all(p.startswith("def one():\n") and p.endswith("\nassert one() == 1\n") for p in seen) and len(seen) == 2


def test_an_answer_gets_what_the_prompt_leaves(engine):
    context = engine.context
    assert fitting(engine, [1] * 10, 10**6) == ([1] * 10, context - 10)
    assert fitting(engine, [1] * 10, 5) == ([1] * 10, 5)
    ids, room = fitting(engine, list(range(2 * context)), 10**6)
    assert room == context // 4 and ids == list(range(2 * context))[-(context - room) :]


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (["{"], "t.jsonl:1 is not valid JSON"),
        (['{"prompt": "a"}'], "t.jsonl:1 has none of the keys"),
        (['{"prompt": "a", "choices": ["b"], "answer": 0}'], "choices"),
        (['{"prompt": "a", "choices": ["b", "c"], "answer": 2}'], "answer 2 is none of the 2"),
        (['{"text": "a", "gap": "b"}', '{"prompt": "a", "answers": ["b"]}'], "of Cloze and Write"),
        ([""], "of no kind"),
        (['{"text": "a", "gap": "b", "gup": 1}'], "gup"),
    ],
)
def test_a_file_that_is_no_task(tmp_path, lines, fault):
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match=fault):
        read_task(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_task(tmp_path / "missing.jsonl")


def test_a_task_file(tmp_path):
    file = tmp_path / "t.jsonl"
    row = {"text": "the sea\u2028sings", "gap": " back"}  # a separator of lines for Unicode, not for JSON
    file.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\n\n")
    assert read_task(file) == [Cloze(**row)]


def test_tasks_of_heldout_text():
    lines = [f"line {n} of the whale's long song number {n * n} ends with waves\n" for n in range(9)]
    documents = [Document("".join(lines), "a"), Document("".join(line.upper() for line in lines), "b")]
    gaps = made_task("last-word", documents)
    assert gaps and all(q.gap.lower() == " waves" and q.gap in q.text for q in gaps)
    assert all(any(d.text.startswith(q.text + q.gap) for d in documents) for q in gaps)
    turns = made_task("next-line", documents)
    for turn in turns:
        own = next(d for d in documents if d.text.startswith(turn.prompt))
        assert own.text.startswith(turn.prompt + turn.choices[turn.answer])
        assert len(turn.choices) == 4 and sum(choice in own.text for choice in turn.choices) == 1
    assert all(turn.prompt.endswith("\n") for turn in turns) and len({turn.answer for turn in turns}) > 1
    wrong = {choice.lower() for turn in turns for place, choice in enumerate(turn.choices) if place != turn.answer}
    assert wrong == {line.strip().lower() for line in lines}  # whatever it begins with
    assert made_task("next-line", documents) == turns
    with pytest.raises(UserError, match="no task 'first-word'"):
        made_task("first-word", documents)
    market = "we met her at the market today, and the day before, and the week before that as well\n"
    (gap,) = made_task("last-word", [Document(f"mark {market}we all hit the mark\n", "c")])
    assert gap.gap == " mark"
    for text in ("short", f"{market}we all hit the mark\n"):  # a market is no mark
        with pytest.raises(UserError, match="too short"):
            made_task("last-word", [Document(text, "a")])


def test_pass_at_k_is_unbiased():
    assert pass_at_k(5, 0, 3) == 0.0 and pass_at_k(5, 5, 1) == 1.0 and pass_at_k(5, 3, 3) == 1.0
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("import json, random\nassert json.loads('1') == 1", True),
        ("assert False", False),
        ("import sys\nsys.exit(77)", False),
        ("raise SystemExit\nassert False", False),
        ("import os\nos._exit(0)\nassert False", False),
        (CONNECT, False),
        ("bytearray(10**9)", False),
        ("open('f', 'w').write('x' * 10**7)", False),
        ("import os\nassert not os.environ.get('PATH')", True),
        ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))", False),
    ],
)  # fmt: skip
def test_what_a_program_may_do(guarded, program, passes):
    assert runs_without_fault(program) == passes


def test_nothing_outlives_a_program(guarded, tmp_path):
    """Where it may start any; the lock is held as long as one of them lives."""
    file = tmp_path / "held"
    runs_without_fault(LEAVE_ONE_BEHIND.format(file=str(file)))
    assert file.exists()
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(("platform", "fault"), [("darwin", "use Linux"), ("linux", "allow user namespaces")])
def test_where_a_network_cannot_be_taken_away_no_program_is_run(platform, fault, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(programs, "_run", lambda program: (programs.UNGUARDED, False))
    monkeypatch.setattr(programs, "_check_guard", programs._check_guard.__wrapped__)
    with pytest.raises(UserError, match=fault):
        runs_without_fault("")


def test_questions_of_a_long_text_are_made_when_they_are_drawn():
    """Each holds all that stands before it: those of all 4,000 lines would take half a gigabyte."""
    lines = [f"line {n} of the whale's long song number {n * n} ends with waves\n" for n in range(4000)]
    documents = [Document("".join(lines), "a"), Document("".join(lines).upper(), "b")]
    for name in ("last-word", "next-line"):
        tracemalloc.start()
        questions = made_task(name, documents)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(questions) == 200 and peak < 100e6, f"{name}: {peak / 1e6:.0f} MB"


def test_a_prompt_beyond_the_context_is_not_read_whole(engine, monkeypatch):
    read = []
    encode = engine.tokenizer.encode
    monkeypatch.setattr(engine.tokenizer, "encode", lambda text: read.append(len(text)) or encode(text))
    score_task(engine, [Choice(prompt=TEXT * 10_000, choices=("a", "b"), answer=0)])
    assert max(read) == 64 * engine.context


def test_spaces_around_an_answer_do_not_count(engine, monkeypatch):
    monkeypatch.setattr(engine, "complete", lambda requests: [SimpleNamespace(text=" 2 ") for _ in requests])
    assert score_task(engine, [Write(prompt="1+1=", answers=(" 2",))])["exact_match"] == 1.0


def test_where_no_program_passes_that_is_no_score(monkeypatch):
    monkeypatch.setattr(programs, "_run", lambda program: (1, False))
    programs._check_guard.cache_clear()
    try:
        with pytest.raises(UserError, match="an empty program fails here"):
            runs_without_fault("1")
    finally:
        programs._check_guard.cache_clear()
