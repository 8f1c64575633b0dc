"""Every generated question is answered by its own worked solution, and training shares no question with testing."""

import random
import re
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baleen.align.recipe import load_align_recipe
from baleen.align.rewards import REWARDS, format_
from baleen.align.tasks import (
    ChainSum,
    Comparison,
    Countdown,
    LetterCounting,
    Sorting,
    distinct_questions,
    questions,
)
from baleen.config import UserError
from baleen.infer.answers import answer_of

TASKS = [
    ChainSum(terms=(2, 6)),
    ChainSum(terms=(2, 3), digits=2),
    Countdown(numbers=(2, 4)),
    Comparison(digits=(1, 5)),
    LetterCounting(words=(1, 3)),
    Sorting(numbers=(1, 6), digits=2),
    Sorting(numbers=(1, 4), terms=(2, 3)),
]
by_name = pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.name}")


@by_name
@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_the_worked_solution_is_right_and_well_formed(task, seed):
    question = task.question(random.Random(seed))
    verifier = REWARDS[question.verifier]
    assert verifier(question.prompt, question.completion, question.answer) == 1
    assert format_(question.prompt, question.completion, question.answer) == 1
    wrong = question.completion.replace(f"<answer>{question.solution}", f"<answer>{question.solution}7")
    assert verifier(question.prompt, wrong, question.answer) == 0


@given(seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_a_chain_sum_is_what_python_reckons(seed):
    question = ChainSum(terms=(2, 6), digits=2).question(random.Random(seed))
    assert eval(question.prompt.rstrip("=")) == int(question.answer)
    steps = [step.split("=") for step in "".join(question.worked).split()]
    assert all(eval(operation) == int(step[-1]) >= 0 for step in steps for operation in step)
    assert steps[-1][-1] == question.answer
    assert len(steps) == max(1, question.prompt.count("+") + question.prompt.count("-"))


@by_name
@given(seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_a_hasty_solution_leaves_out_the_intermediate_results_and_nothing_else(task, seed):
    question = task.question(random.Random(seed))
    hasty = question.hasty()
    assert (hasty.prompt, hasty.answer, hasty.solution) == (question.prompt, question.answer, question.solution)
    assert "".join(hasty.worked) == "".join(question.worked[::2])
    assert REWARDS[question.verifier](question.prompt, hasty.completion, question.answer) == 1
    assert format_(question.prompt, hasty.completion, question.answer) == 1


@pytest.mark.parametrize("seed", range(20))
def test_numbers_of_more_digits_are_added_place_by_place(seed):
    question = ChainSum(terms=(2, 2), digits=3).question(random.Random(seed))
    first, sign, term = re.findall(r"\d+|[+-]", question.prompt)
    places = [int(digit) * 10**power for power, digit in zip((2, 1, 0), term, strict=True)]
    done, left = [int(first)], sum(places)
    expected = question.prompt.rstrip("=")
    for place in places:
        if place:
            left -= place
            done.append(done[-1] + int(f"{sign}{place}"))
            expected += f"={done[-1]}{sign}{left}" if left else f"={done[-1]}"
    assert "".join(question.worked) == expected


def test_a_hasty_sum_takes_all_terms_at_once():
    question = ChainSum(terms=(5, 5)).question(random.Random(3))
    assert (
        question.hasty().completion
        == f"<think>{question.prompt}{question.answer}</think><answer>{question.answer}</answer>"
    )
    assert question.completion.count("=") == 4


@by_name
@given(seeds=st.tuples(st.integers(0, 2**32), st.integers(0, 2**32)))
@settings(max_examples=10, deadline=None)
def test_training_and_testing_share_no_question(task, seeds):
    train = {q.prompt for q in islice(questions([task], "train", seeds[0]), 60)}
    test = {q.prompt for q in islice(questions([task], "test", seeds[1]), 20)}
    assert not train & test


@pytest.mark.parametrize(
    "task", [Countdown(), Sorting(), Sorting(terms=(2, 3)), Comparison()], ids=lambda task: task.name
)
def test_the_same_numbers_in_another_order_are_no_new_question(task):
    def asked(split):
        words = (q.prompt.replace(",", "").split() for q in islice(questions([task], split, 0), 2000))
        return {tuple(sorted(word for word in prompt if word[0].isdigit())) for prompt in words}

    if task.name == "countdown":  # the target is not one of the numbers given

        def asked(split):
            return {
                (q.prompt.split()[1], *sorted(q.prompt.split()[3:])) for q in islice(questions([task], split, 0), 2000)
            }

    assert not asked("train") & asked("test")


@given(seed=st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_questions_depend_on_the_seed_alone(seed):
    first, again = (list(islice(questions(TASKS, "train", seed), 20)) for _ in range(2))
    assert first == again
    assert first != list(islice(questions(TASKS, "train", seed + 1), 20))


def test_difficulty_follows_the_limits():
    terms = {q.prompt.count("+") + q.prompt.count("-") + 1 for q in islice(questions([TASKS[0]], "train", 0), 300)}
    assert terms == {2, 3, 4, 5, 6}


def test_distinct_questions_are_distinct_and_a_small_task_says_so():
    prompts = [q.prompt for q in distinct_questions([ChainSum()], "test", 0, 200)]
    assert len(set(prompts)) == 200
    with pytest.raises(UserError, match="fewer than 200"):
        distinct_questions([Comparison(digits=(1, 1))], "test", 0, 200)
    few = distinct_questions([Comparison(digits=(1, 1))], "test", 0, 200, or_fewer=True)
    assert 0 < len(few) == len({q.asked for q in few}) < 200


def test_a_task_without_a_question_of_the_split_ends():
    class Same(ChainSum):
        def question(self, rng):
            return ChainSum().question(random.Random(1))

    split = "train" if Same().question(random.Random(0)).is_for_testing else "test"
    with pytest.raises(UserError, match="no question for the split"):
        next(questions([Same()], split, 0))


def test_a_range_that_is_upside_down_is_refused():
    with pytest.raises(UserError, match=r"tasks.*fewest first"):
        load_align_recipe("reason", ["tasks=[{name='chain_sum', terms=[5, 3]}]"])


def test_the_prompt_never_gives_the_answer_form_away():
    question = Countdown().question(random.Random(3))
    assert question.solution not in question.prompt and answer_of(question.completion) == question.solution


@given(seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_sums_are_worked_out_before_they_are_sorted(seed):
    question = Sorting(numbers=(1, 5), terms=(2, 3)).question(random.Random(seed))
    *lines, last = "".join(question.worked).split("\n")
    reckoned = [int(line.rpartition("=")[2]) for line in lines]
    assert [eval(asked) for asked in question.prompt.split()[1:]] == reckoned
    assert last == f"So {question.solution}" and [*map(int, question.solution.split())] == sorted(reckoned)
    assert question.hasty().completion == f"<think>{last}</think><answer>{question.solution}</answer>"
