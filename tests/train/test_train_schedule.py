"""V3's schedules at every breakpoint, and what knots mean."""

import math

import pytest

from baleen.config import UserError
from baleen.model.moe import Gate
from baleen.parallel.worker import Alone
from baleen.recipe import Recipe, load_recipe
from baleen.train.display import Display
from baleen.train.loop import train
from baleen.train.optimizer import Optimizer
from baleen.train.schedule import Curve, Schedules
from baleen.train.trainer import Counters, Trainer

T, G = 10**12, 10**9


@pytest.fixture(scope="module")
def v3():
    return Schedules(load_recipe("v3-671b"))


@pytest.mark.parametrize(
    "tokens, lr",
    [
        (0, 0.0),
        (1000 * 3072 * 4096, 1.1e-4),
        (2000 * 3072 * 4096, 2.2e-4),  # 2K steps of warm-up
        (5 * T, 2.2e-4),
        (10 * T, 2.2e-4),
        (10 * T + 2.15 * T, 2.2e-5 + (2.2e-4 - 2.2e-5) / 2),  # half of the cosine
        (10 * T + 4.3 * T / 3, 2.2e-5 + (2.2e-4 - 2.2e-5) * 0.75),  # cos 60° = 1/2
        (14.3 * T, 2.2e-5),
        (14.6 * T, 2.2e-5),
        (14.633 * T - 1, 2.2e-5),
        (14.633 * T, 7.3e-6),
        (14.8 * T, 7.3e-6),
    ],
)
def test_learning_rate_of_v3(v3, tokens, lr):
    assert v3.lr(tokens) == pytest.approx(lr, rel=1e-9, abs=1e-15)


def test_batch_of_v3(v3):
    """As published (3,072 to 15,360), but never less than fills our pipeline."""
    assert [v3.batch_sequences(t) for t in (0, 469 * G, 14.8 * T)] == [4096, 15360, 15360]
    for tokens in (40 * G, 150 * G, 469 * G / 2):
        assert v3.batch_sequences(tokens) == round(3072 + (15360 - 3072) * tokens / (469 * G))
    sizes = [v3.batch_sequences(t) for t in range(0, 470 * G, 10 * G)]
    assert sizes == sorted(sizes)


def test_gamma_and_lambda_of_v3(v3):
    assert [v3.bias_update_speed(t) for t in (0, 14.3 * T - 1, 14.3 * T, 14.8 * T)] == [0.001, 0.001, 0.0, 0.0]
    assert [v3.mtp_loss_weight(t) for t in (0, 10 * T - 1)] == [0.3, 0.3]
    assert v3.mtp_loss_weight(10 * T) == v3.mtp_loss_weight(14.8 * T) == pytest.approx(0.1, rel=1e-12)


def test_curve_is_constant_beyond_its_ends_and_linear_between():
    curve = Curve([(10, 1.0), (20, 3.0)], 100)
    assert [curve(t) for t in (0, 10, 15, 20, 1000)] == [1.0, 1.0, 2.0, 3.0, 3.0]


def test_two_knots_at_one_place_jump():
    curve = Curve([(0, 1.0), (50, 1.0), (50, 0.25), (100, 0.0)], 100)
    assert [curve(t) for t in (49, 50, 75)] == [1.0, 0.25, 0.125]


def test_shares_of_the_run_mix_with_tokens():
    curve = Curve([(0, 0.0), ("10%", 1.0), (600, 1.0), ("100%", 0.0)], 1000)
    assert [curve(t) for t in (50, 100, 600, 800, 1000)] == [0.5, 1.0, 1.0, 0.5, 0.0]


def test_cosine_is_flat_at_both_ends():
    curve = Curve([(0, 1.0), (100, 0.0, "cosine")], 100)
    assert [curve(t) for t in (0, 50, 100)] == pytest.approx([1.0, 0.5, 0.0])
    assert curve(25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert 1 - curve(1) < 0.001 and curve(99) < 0.001


@pytest.mark.parametrize("when", ["60", "x%", "101%", "-1%", "nan%", ""])
def test_a_knot_nowhere_is_a_users_mistake(tmp_path, when):
    file = tmp_path / "r.toml"
    file.write_text(load_recipe("cpu-s").to_toml())
    with pytest.raises(UserError, match="a knot stands at"):
        load_recipe(file, [f'schedule.lr=[["{when}", 1.0]]'])


def test_a_schedule_multiplies_its_base_value(tiny_recipe):
    half = ((0, 0.5),)
    recipe = tiny_recipe(
        train={"lr": 0.2, "bias_update_speed": 0.02, "mtp_loss_weight": 0.4, "batch_tokens": 64},
        schedule={"lr": half, "bias_update_speed": half, "mtp_loss_weight": half, "batch_tokens": half},
    )
    schedules = Schedules(recipe)
    values = schedules.lr(0), schedules.bias_update_speed(0), schedules.mtp_loss_weight(0), schedules.batch_sequences(0)
    assert values == pytest.approx((0.1, 0.01, 0.2, 2))


def test_a_batch_holds_at_least_one_sequence(tiny_recipe):
    assert Schedules(tiny_recipe(schedule={"batch_tokens": ((0, 0.001),)})).batch_sequences(0) == 1


def position(recipe: Recipe, **counters) -> tuple[float, bool]:
    trainer = Trainer.__new__(Trainer)
    trainer.recipe, trainer.counters = recipe, Counters(**counters)
    return trainer.position, trainer.done


def test_minutes_are_a_clock_that_may_end_the_schedule_first(tiny_recipe):
    recipe = tiny_recipe(train={"tokens": 1000, "minutes": 2.0})
    assert position(recipe, tokens=100, wall_seconds=60.0) == (500.0, False)
    assert position(recipe, tokens=700, wall_seconds=60.0) == (700, False)
    assert position(recipe, tokens=100, wall_seconds=120.0) == (1000.0, True)
    assert position(tiny_recipe(train={"tokens": 1000}), tokens=100, wall_seconds=1e9) == (100, False)
    assert position(recipe, tokens=1000, wall_seconds=1.0)[1]


def test_every_schedule_reaches_its_step_and_so_does_the_clip(tiny_recipe, tmp_path, monkeypatch):
    asked: dict[str, list[float]] = {}

    def note(owner, method, word, value):
        real, said = getattr(owner, method), asked.setdefault(word, [])
        monkeypatch.setattr(owner, method, lambda *given: (said.append(value(given)), real(*given))[1])

    note(Optimizer, "step", "lr", lambda given: given[1])
    note(Alone, "accumulate", "mtp_loss_weight", lambda given: given[2].mtp_loss_weight)
    note(Gate, "update_bias", "bias_update_speed", lambda given: given[2])
    note(Alone, "clip_gradients", "clip_norm", lambda given: given[1])
    base = {"lr": 3e-3, "mtp_loss_weight": 0.4, "bias_update_speed": 0.02}
    curve = ((0, 0.25), (320, 1.0), (640, 0.5))
    recipe = tiny_recipe(train={**base, "clip_norm": 0.125}, schedule=dict.fromkeys(base, curve))
    train(recipe, tmp_path / "run", display=Display(quiet=True))
    factors = [min(0.25 + 0.75 * t / 320, 1.5 - t / 640) for t in range(0, 640, 64)]
    asked["bias_update_speed"] = asked["bias_update_speed"][::2]  # of two gates
    for word, value in base.items():
        assert asked[word] == pytest.approx([value * factor for factor in factors]), word
    assert asked["clip_norm"] == [0.125] * 10
