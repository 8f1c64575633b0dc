"""A verifier may raise, hang, give nonsense or call home: it is worth nothing, is counted, and the run goes on."""

import os
from itertools import islice

import pytest

from baleen.align.judge import Judge
from baleen.align.tasks import ReasoningGym, questions
from baleen.config import UserError

REWARD = """
import json, math, os, socket, subprocess, sys, time, urllib.request

def fine(prompt, completion, answer):
    print("words on stdout disturb nothing")
    return len(completion) + 0.5

def raises(prompt, completion, answer):
    raise KeyError("no such thing")

def hangs(prompt, completion, answer):
    if completion == "hang":
        while True:
            time.sleep(1)
    return 1

def dies(prompt, completion, answer):
    os._exit(3)

def nan(prompt, completion, answer):
    return math.nan

def infinite(prompt, completion, answer):
    return -math.inf

def nothing(prompt, completion, answer):
    return None

def huge(prompt, completion, answer):
    return 1e39

def starts_a_shell(prompt, completion, answer):
    subprocess.run(["true"])
    return 1

def hides_its_call(prompt, completion, answer):
    try:
        socket.create_connection(("127.0.0.1", 9))
    except PermissionError:
        pass
    return 1

def calls_home(prompt, completion, answer):
    urllib.request.urlopen("http://127.0.0.1:9/", timeout=1)
    return 1
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(REWARD)
    return path


def test_whatever_goes_wrong_is_nothing_and_counted(file):
    names = ["fine", "raises", "hangs", "dies", "nan", "infinite", "nothing", "calls_home", "huge"]
    names += ["starts_a_shell", "hides_its_call"]
    spec = {name: f"{file}:{name}" for name in names}
    with Judge(list(spec.values()), 60.0) as judge:

        def score(name, completion="abc"):
            return judge.score(spec[name], "2+2=", completion, "4")

        assert score("fine") == (3.5, None)
        assert score("raises") == (0.0, "raised")
        assert "no such thing" in judge.last_error
        assert score("nan") == (0.0, "not_finite")
        assert score("infinite") == (0.0, "not_finite")
        assert score("huge") == (0.0, "not_finite")
        assert score("nothing") == (0.0, "raised")
        assert score("starts_a_shell") == (0.0, "raised")
        assert score("hides_its_call") == (0.0, "raised")
        assert score("calls_home") == (0.0, "raised")
        assert "network" in judge.last_error
        assert score("hangs", "fine") == (1.0, None)
        judge.seconds = 0.2
        assert score("hangs", "hang") == (0.0, "timed_out")
        judge.seconds = 60.0
        assert score("dies") == (0.0, "timed_out")
        assert score("fine") == (3.5, None)  # a new process took over
        assert judge.failures == {"raised": 5, "timed_out": 2, "not_finite": 3}


def test_results_of_failures_alone_are_no_results(file):
    told = []
    with Judge([f"{file}:fine", f"{file}:raises"], 60.0) as judge:
        judge.close(told.append)
        assert told == []
        judge.score(f"{file}:raises", "", "", "")
        with pytest.raises(UserError, match="every reward failed.*no such thing"):
            judge.close(told.append)
        judge.score(f"{file}:fine", "", "", "")
        judge.close(told.append)
    assert len(told) == 1 and "so far 1 raised" in told[0]


def test_ctrl_c_is_not_for_the_judge(file):
    """The terminal sends it to all processes of the run's group."""
    with Judge([f"{file}:fine"], 60.0) as judge:
        assert judge._process is not None and os.getpgid(judge._process.pid) != os.getpgid(0)


def test_a_reward_that_no_longer_loads_is_counted(file):
    with Judge([f"{file}:fine", f"{file}:dies"], 60.0) as judge:
        judge.score(f"{file}:dies", "", "", "")
        file.unlink()
        assert judge.score(f"{file}:fine", "", "abc", "") == (0.0, "raised")
        file.write_text(REWARD)
        assert judge.score(f"{file}:fine", "", "abc", "") == (3.5, None)


def test_built_in_rewards_run_there_too():
    with Judge(["number", "format"], 5.0) as judge:
        assert judge.score("number", "2+2=", "<think>a</think><answer>4</answer>", "4").value == 1
        assert judge.score("format", "2+2=", "4", "4").value == 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("acuracy", "there is no reward 'acuracy'"),
        ("missing.py:f", "is missing"),
        ("{file}:no_such", "has no function no_such"),
    ],
)
def test_an_unknown_reward_is_named_before_anything_runs(spec, message, file):
    with pytest.raises(UserError, match=message), Judge([spec.format(file=file)], 5.0):
        pass


def test_a_module_that_does_not_import_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere")
    with pytest.raises(UserError, match="no_such_module_anywhere"), Judge([f"{tmp_path}/broken.py:f"], 5.0):
        pass


@pytest.mark.slow
def test_any_task_of_reasoning_gym_brings_its_own_verifier():
    pytest.importorskip("reasoning_gym")
    tasks = [ReasoningGym(task=name) for name in ("chain_sum", "prime_factorization", "rearc", "arc_agi")]
    asked = list(islice(questions(tasks, "train", 0), 8))
    with Judge(sorted({q.verifier for q in asked}), 20.0) as judge:
        for q in asked:
            right = f"<think>so</think><answer>{q.solution}</answer>"
            assert judge.score(q.verifier, q.prompt, right, q.answer) == (1.0, None)
        factors = next(q for q in asked if q.verifier.endswith("prime_factorization"))
        wrong = "<think>so</think><answer>no number at all</answer>"
        assert judge.score(factors.verifier, factors.prompt, wrong, factors.answer).value < 1  # its scorer may raise
