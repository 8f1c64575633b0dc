"""The published bubble and memory formulas, read off simulated timelines. The formulas live here and nowhere else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baleen.config import UserError
from baleen.cost.schedule import SCHEDULES, Op, interleaved_1f1b, schedule
from baleen.cost.simulator import Durations, ImpossibleOrder, execute

seconds = st.floats(0.2, 3.0)


@st.composite
def pipelines(draw):
    ranks = draw(st.integers(1, 5)) * 2
    rounds = draw(st.integers(2, 4))
    return ranks, ranks * rounds


def bubble(name, ranks, microbatches, **durations):
    """The largest bubble of a rank; formulas are about that rank."""
    return max(execute(schedule(name, ranks, microbatches), Durations(**durations)).bubble_seconds)


@settings(deadline=None, max_examples=60)
@given(pipelines(), seconds, seconds, st.floats(0.0, 1.0))
def test_1f1b_and_gpipe_bubble(pipeline, F, B, share):
    pp, microbatches = pipeline
    for name in ("1f1b", "gpipe"):
        timeline = execute(schedule(name, pp, microbatches), Durations(F, B, share * B))
        assert timeline.bubble_seconds == pytest.approx([(pp - 1) * (F + B)] * pp, rel=1e-3)


@pytest.mark.parametrize("name", ["1f1b", "zb1p"])
def test_fewer_microbatches_than_ranks(name):
    timeline = execute(schedule(name, 8, 3), Durations(1.0, 2.0, 1.0))
    assert max(timeline.peak_activations) == 3
    assert timeline.busy_seconds == pytest.approx([9.0] * 8)


@settings(deadline=None, max_examples=60)
@given(pipelines(), seconds, seconds, st.integers(1, 4))
def test_interleaving_divides_the_bubble(pipeline, F, B, stages_per_rank):
    pp, microbatches = pipeline
    timeline = execute(
        interleaved_1f1b(pp, microbatches, stages_per_rank), Durations(F / stages_per_rank, B / stages_per_rank, 0.0)
    )
    assert timeline.bubble_seconds == pytest.approx([(pp - 1) * (F + B) / stages_per_rank] * pp, rel=1e-3)
    assert timeline.stages_held == [stages_per_rank] * pp


@settings(deadline=None, max_examples=60)
@given(pipelines(), seconds, seconds, st.floats(0.01, 1.0))
def test_zb1p_bubble(pipeline, F, input_grad, share):
    """Holds where a weight gradient is no longer than a forward or an input gradient."""
    pp, microbatches = pipeline
    W = share * min(F, input_grad)
    B = input_grad + W
    timeline = execute(schedule("zb1p", pp, microbatches), Durations(F, B, W))
    assert timeline.bubble_seconds == pytest.approx([(pp - 1) * (F + B - 2 * W)] * pp, rel=1e-3, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(pipelines(), seconds, st.floats(0.01, 1.0), st.floats(0.0, 1.0))
def test_dualpipe_bubble(pipeline, F, share, gain):
    """Holds where F equals the input gradient, W is at most F, and a pair takes between B and F + B."""
    pp, microbatches = pipeline
    W = share * F
    B = F + W
    pair = B + gain * F
    expected = (pp / 2 - 1) * (pair + B - 3 * W)
    times = {"forward": F, "backward": B, "weight": W, "overlap": pair / (F + B)}
    assert bubble("dualpipe", pp, microbatches, **times) == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert bubble("dualpipev", pp // 2, microbatches, **times) == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_the_formula_of_dualpipe_fails_where_its_assumptions_do():
    """The simulator is no formula in disguise: with W longer than F the bubble is larger than published."""
    F, B, W = 1.0, 2.5, 1.5
    assert bubble("dualpipe", 8, 32, forward=F, backward=B, weight=W) > 1.2 * (8 / 2 - 1) * (F + B + B - 3 * W)


@settings(deadline=None, max_examples=30)
@given(pipelines())
def test_what_a_rank_keeps(pipeline):
    pp, microbatches = pipeline
    times = Durations(1.0, 2.0, 1.0)
    kept = {name: execute(schedule(name, pp, microbatches), times) for name in SCHEDULES if name != "dualpipev"}
    kept["dualpipev"] = execute(schedule("dualpipev", pp // 2, microbatches), times)
    assert kept["gpipe"].peak_activations == [microbatches] * pp
    assert kept["1f1b"].peak_activations == list(range(pp, 0, -1))
    assert kept["zb1p"].peak_activations == [pp] * pp
    assert kept["dualpipe"].peak_activations == [pp + 1] * pp
    assert kept["dualpipev"].peak_activations == [pp + 1] * (pp // 2)
    assert {name: set(t.stages_held) for name, t in kept.items()} == {
        "gpipe": {1}, "1f1b": {1}, "zb1p": {1}, "interleaved": {2}, "dualpipe": {2}, "dualpipev": {2}
    }  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(SCHEDULES)), pipelines(), st.data())
def test_every_timeline_keeps_the_rules(name, pipeline, data):
    """With a time for each stage and a latency: nothing runs before what it needs, and nothing runs twice at once."""
    ranks, microbatches = pipeline
    order = schedule(name, ranks, microbatches)
    stages = 1 + max(op.stage for actions in order for action in actions for op in action)
    per_stage = st.lists(seconds, min_size=stages, max_size=stages)
    forward, weight, rest = data.draw(per_stage), data.draw(per_stage), data.draw(per_stage)
    latency = data.draw(st.floats(0.0, 0.5))
    backward = [w + i for w, i in zip(weight, rest, strict=True)]
    timeline = execute(order, Durations(forward, backward, weight, 0.9, latency))
    at = {
        op: (span.start, span.end, rank)
        for rank, spans in enumerate(timeline.spans) for span in spans for op in span.action
    }  # fmt: skip
    assert len(at) == sum(len(action) for actions in order for action in actions)
    for spans in timeline.spans:
        assert all(a.end <= b.start for a, b in zip(spans, spans[1:], strict=False))
    for op, (start, _, rank) in at.items():
        needs = {"F": [Op("F", op.stage - 1, op.microbatch)], "W": [Op("I", op.stage, op.microbatch)]}.get(
            op.kind, [Op("F", op.stage, op.microbatch), *(Op(k, op.stage + 1, op.microbatch) for k in ("B", "I"))]
        )
        for need in needs:
            if need in at:
                assert start >= at[need][1] + (latency if at[need][2] != rank else 0.0) - 1e-12


def test_latency_lengthens_the_step_only_by_the_way_there_and_back():
    """GPipe has one wave forward and one back; on a single rank nothing travels."""
    for ranks in (1, 4):
        plain = execute(schedule("gpipe", ranks, 8), Durations(1.0, 2.0, 1.0))
        late = execute(schedule("gpipe", ranks, 8), Durations(1.0, 2.0, 1.0, latency=0.125))
        assert late.seconds - plain.seconds == pytest.approx(2 * (ranks - 1) * 0.125)


def test_phases_of_a_rank_add_up_to_the_step():
    timeline = execute(schedule("dualpipe", 8, 40), Durations(1.0, 1.9, 0.8, overlap=0.9))
    for rank in range(8):
        kinds = timeline.seconds_by_kind(rank)
        assert sum(kinds.values()) == pytest.approx(timeline.seconds)
        assert kinds["F&B"] > kinds["F"] > 0 and kinds["W"] > 0


@pytest.mark.parametrize(
    ("order", "fault"),
    [
        ([], "no operation"),
        ([[(Op("F", 0, 0),)]], "needs F and B"),
        ([[(Op("F", 0, 0),), (Op("I", 0, 0),)]], "needs F and B"),
        ([[(Op("F", 0, 0),), (Op("B", 0, 0),), (Op("B", 0, 0),)]], "twice"),
        ([[(Op("B", 0, 0),), (Op("F", 0, 0),)]], "rank 0 waits for F0 of stage 0"),
        ([[(Op("F", 0, 0), Op("F", 0, 1)), (Op("B", 0, 0),), (Op("B", 0, 1),)]], "only an F and a B"),
        ([[(Op("F", 0, 0),)], [(Op("B", 0, 0),)]], "changes ranks"),
        ([[(Op("F", 1, 0),), (Op("B", 1, 0),)]], "nothing in stage 0"),
        (
            [
                [(Op("F", 0, 0),), (Op("B", 0, 0),), (Op("F", 0, 1),), (Op("B", 0, 1),)],
                [(Op("F", 1, 1),), (Op("B", 1, 1),), (Op("F", 1, 0),), (Op("B", 1, 0),)],
            ],
            "deadlocks",
        ),
    ],
)
def test_impossible_orders_are_named(order, fault):
    with pytest.raises(ImpossibleOrder, match=fault):
        execute(order, Durations(1.0, 2.0, 1.0))


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "cure"),
    [
        ("2f2b", 4, 8, "dualpipev"),
        ("1f1b", 8, 0, "at least 1"),
        ("1f1b", 0, 4, "at least 1"),
        ("interleaved", 4, 10, "8 or 12"),
        ("dualpipe", 5, 20, "4 or 6"),
        ("dualpipe", 4, 9, "8 or 10"),
        ("dualpipe", 4, 6, "at least 8"),
        ("dualpipev", 4, 7, "at least 8"),
    ],
)
def test_bad_counts_name_the_nearest_good_ones(name, ranks, microbatches, cure):
    with pytest.raises(UserError, match=cure):
        schedule(name, ranks, microbatches)


def test_bad_durations():
    with pytest.raises(UserError, match="0 or more"):
        Durations(-1.0, 2.0, 1.0)
    with pytest.raises(UserError, match="longer than the backward"):
        Durations(1.0, 2.0, 2.5)
    with pytest.raises(UserError, match="overlap"):
        Durations(1.0, 2.0, 1.0, overlap=1.5)
