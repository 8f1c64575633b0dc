"""Rewards by rules: what is paid, and above all what is not."""

import json

import pytest

from baleen.align.rewards import REWARDS, countdown, format_, language, length, number, sorting
from baleen.infer.answers import answer_of

R = "<think>so</think><answer>{}</answer>".format


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>a</think><answer> 7 </answer>", "7"),
        ("<think>a</think>7", "7"),
        ("7", "7"),
        ("<think>never ends 7", None),
        ("<think>a</think><answer>7</answer><answer>8</answer>", None),
        ("<think>a</think><answer>7", None),
        ("<answer>1</answer><think>no</think><answer>7</answer>", "7"),
        ("", ""),
    ],
)
def test_answer_of(completion, answer):
    assert answer_of(completion) == answer


@pytest.mark.parametrize("said", ["7", "7.0", "14/2", "+7"])
def test_a_number_in_any_spelling(said):
    assert number("", R(said), "7") == 1


@pytest.mark.parametrize("said", ["", "8", "about 7", "7 8", "7/0", "1e1", "٧", "7" * 500, "nan", "--7"])
def test_not_that_number(said):
    assert number("", R(said), "7") == 0


GIVEN = json.dumps([24, [3, 5, 8, 8]])


@pytest.mark.parametrize("said", ["3*8", "(8-5)*8", "8 * 3", "3*8 = 24", "(5-3)*8+8"])
def test_countdown_reached(said):
    assert countdown("", R(said), GIVEN) == 1


@pytest.mark.parametrize(
    "said",
    ["24", "8*8*3", "5*5-1", "3*", "__import__('os')", "3*8.0", "2**3*3", "8/0", "True*24", "-(3*8)*-1", "(" * 9000]
    + ["3*8=25", "3*8 # right", "3*8=", "3*8=24=24", "3*8" + 200 * " " + "or not"],
)
def test_countdown_not_reached(said):
    assert countdown("", R(said), GIVEN) == 0


def test_sorting_reads_numbers_however_set_apart():
    assert sorting("", R("[1, 2, 10]"), "1 2 10") == 1
    assert sorting("", R("1 10 2"), "1 2 10") == 0
    assert sorting("", R("one 1 2 10"), "1 2 10") == 0


def test_json_compares_values():
    assert REWARDS["json"]("", R('{"b": 1, "a": [2.0]}'), '{"a": [2], "b": 1}') == 1
    assert REWARDS["json"]("", R("{"), "{}") == 0


@pytest.mark.parametrize(
    ("said", "right", "paid"),
    [
        ("true", "1", 0), ("1", "true", 0), ("0", "false", 0), ('[1, {"a": true}]', '[1, {"a": 1}]', 0),
        ("true", "true", 1), ("1.0", "1", 1), ("null", "false", 0), ("[1]", "[1, 2]", 0), ('{"a": 1}', '{"b": 1}', 0),
    ],
)  # fmt: skip
def test_in_json_true_is_no_number(said, right, paid):
    assert REWARDS["json"]("", R(said), right) == paid


@pytest.mark.parametrize(
    "completion",
    [
        "<answer>7</answer>",
        "<think></think><answer>7</answer>",
        "<think> </think><answer>7</answer>",
        "<think>a</think><answer></answer>",
        "<think>a</think><answer> </answer>",
        "so <think>a</think><answer>7</answer>",
        "<think>a</think><answer>7</answer> done",
        "<think>a</think><answer>7</answer><answer>8</answer>",
        "<think>a<think>b</think><answer>7</answer>",
        "<think>a</think><answer>7",
    ],
)
def test_format_is_strict(completion):
    assert format_("", completion, "") == 0


def test_format_pays_for_a_wrong_answer_too():
    assert format_("", R("wrong"), "7") == 1


def test_language_is_the_share_of_letters_in_the_prompts_script():
    assert language("How many?", "<think>four</think>four", "") == 1
    assert language("How many?", "四四four", "") == pytest.approx(4 / 6)
    assert language("多少?", "<think>four", "") == 0
    assert language("3+4=", "seven", "") == 1
    assert language("次の計算問題を解いてください", "答えは七です。テスト", "") == 1
    assert language("What is ｘ?", "ｘ is seven", "") == 1


def test_length_grows_and_is_bounded():
    assert length("", "a" * 50, "") < length("", "a" * 100, "") < length("", "a" * 10_000, "") == 1


@pytest.mark.slow
def test_expression_knows_algebra():
    pytest.importorskip("math_verify")
    assert REWARDS["expression"]("", R("x*(x+1)"), "x^2+x") == 1
    assert REWARDS["expression"]("", R("x*(x+2)"), "x^2+x") == 0
    assert REWARDS["expression"]("", "<think>never ends", "x") == 0
