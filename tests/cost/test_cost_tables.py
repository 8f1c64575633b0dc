"""What schedules and failures look like to a user."""

import io

import pytest
from rich.console import Console

from baleen.config import UserError
from baleen.cost.failures import failures_report
from baleen.cost.failures_table import failures_view
from baleen.cost.figures import energy, mass, quantity, share, signed_share, usd
from baleen.cost.schedule import SCHEDULES
from baleen.cost.schedules_table import run_schedules, schedule_svg, schedules_dict, schedules_view
from baleen.cost.simulator import Durations


def text_of(view) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(view)
    return console.export_text()


def test_schedules_are_compared_on_the_same_network():
    timelines = run_schedules("all", 4, 8, Durations(1.0, 2.0, 1.0))
    out = schedules_dict(timelines)
    assert list(out["schedules"]) == list(SCHEDULES) and out["left_out"] == []
    for name, timeline in timelines.items():
        assert timeline.busy_seconds == pytest.approx([24.0] * 4), name  # 8 micro-batches of 3 s, however they are cut
    figures = out["schedules"]
    assert figures["1f1b"]["bubble_seconds"] == pytest.approx([3 * 3] * 4)
    assert figures["zb1p"]["bubble_seconds"][0] == pytest.approx(3 * (1 + 2 - 2))
    assert max(figures["dualpipe"]["peak_activations"]) == 4 + 1
    assert max(figures["dualpipev"]["peak_activations"]) == pytest.approx((2 * 4 + 1) / 2)
    text = text_of(schedules_view(timelines))
    assert all(f"\n{name}" in text for name in SCHEDULES) and "rank   3 |" in text


def test_what_cannot_run_is_left_out_and_named():
    timelines = run_schedules("all", 3, 6, Durations(1.0, 2.0, 1.0))
    assert "dualpipe" in schedules_dict(timelines)["left_out"]
    assert "cannot run these counts: dualpipe" in text_of(schedules_view(timelines))
    with pytest.raises(UserError, match="DualPipe folds"):
        run_schedules("dualpipe", 3, 6, Durations(1.0, 2.0, 1.0))
    with pytest.raises(UserError, match="no pipeline schedule"):
        run_schedules("tripipe", 3, 6, Durations(1.0, 2.0, 1.0))
    with pytest.raises(UserError, match="at least 1"):
        run_schedules("all", 0, 6, Durations(1.0, 2.0, 1.0))
    with pytest.raises(UserError, match="take at most 12,500"):
        run_schedules("all", 8, 10**6, Durations(1.0, 2.0, 1.0))


def test_a_chart_is_of_one_schedule():
    assert schedule_svg(run_schedules("1f1b", 2, 2, Durations(1.0, 2.0, 1.0))).startswith("<svg")
    with pytest.raises(UserError, match="--schedule"):
        schedule_svg(run_schedules("all", 2, 2, Durations(1.0, 2.0, 1.0)))


def test_failures_add_up_to_the_days_they_took():
    report = failures_report(256, 5.0)
    days = report["days"]
    parts = sum(days[name] for name in ("work", "checkpoints", "lost", "restarts", "waiting"))
    assert days["wall"] == pytest.approx(parts)
    assert "goodput, simulated" in text_of(failures_view(report))


@pytest.mark.parametrize(("days", "interval"), [(1e7, None), (30, 1e-3), (30, -5), (30, 0), (float("nan"), None)])
def test_what_would_never_end_is_refused(days, interval):
    with pytest.raises(UserError, match="days|--interval"):
        failures_report(2048, days, interval_seconds=interval)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (usd(5.576e6), "$5.576M"), (usd(87072), "$87,072"), (usd(12.3456), "$12.35"), (usd(0.04), "$0.040"),
        (usd(0.00213), "$0.0021"), (usd(0), "$0.00"), (quantity(2.102e9), "2.102B"), (quantity(147e3), "147,000"),
        (quantity(999.96e6), "1,000M"), (quantity(61.5), "61.5"), (share(0.0013), "0.13 %"), (share(0.992), "99.2 %"),
        (signed_share(0), "exact"), (signed_share(-0.33), "-33 %"), (signed_share(0.0018), "+0.18 %"),
        (signed_share(-0.9999), "-100 %"),
        (signed_share(1.5), "+150 %"), (energy(9.17e12), "2.547 GWh"), (energy(168.4), "0.04678 Wh"),
        (energy(3.6e7), "10 kWh"), (mass(3.6e-5), "0.036 g"), (mass(674.1), "674.1 kg"), (mass(2.5e8), "250,000 t"),
    ],
)  # fmt: skip
def test_figures_for_people(text, expected):
    assert text == expected
