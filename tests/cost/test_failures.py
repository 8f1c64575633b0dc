from dataclasses import replace

import pytest

from baleen.config import UserError
from baleen.cost.failures import (
    expected_goodput,
    failures_report,
    load_reliability,
    simulate_run,
    young_daly_seconds,
)

DAY = 86400.0
# Spares without end, as Daly's formula assumes.
PLENTY = replace(load_reliability(), spare_share=10.0, repair_hours=0.0)


def test_the_rate_is_that_of_llama_3():
    assert load_reliability().failures_per_gpu_hour == pytest.approx(419 / (54 * 24 * 16384), rel=1e-4)
    assert load_reliability().mtbf_seconds(16384) / 3600 == pytest.approx(54 * 24 / 419, rel=1e-4)


@pytest.mark.parametrize("gpus", [2048, 16384, 100_000])
def test_simulation_meets_the_closed_form(gpus):
    """Enough days for about 3,000 failures: the standard error of the lost time is then below 3 %."""
    days = 3000 * PLENTY.mtbf_seconds(gpus) / DAY
    outcome = simulate_run(gpus, days * DAY, PLENTY)
    expected = expected_goodput(gpus, PLENTY)
    assert outcome.waiting == 0
    assert 1 - outcome.goodput == pytest.approx(1 - expected, rel=0.05)
    assert outcome.failures == pytest.approx(outcome.wall / PLENTY.mtbf_seconds(gpus), rel=0.06)


def test_young_and_daly_is_the_best_interval_of_the_simulation():
    gpus, checkpoint = 16384, 30.0
    reliability = replace(PLENTY, checkpoint_seconds=checkpoint)
    best = young_daly_seconds(checkpoint, reliability.mtbf_seconds(gpus))
    goodput = {
        factor: simulate_run(gpus, 300 * DAY, reliability, interval_seconds=factor * best).goodput
        for factor in (0.25, 0.5, 1.0, 2.0, 4.0)
    }
    assert max(goodput, key=goodput.__getitem__) == 1.0
    assert goodput[0.25] < goodput[0.5] and goodput[4.0] < goodput[2.0]


def test_wall_time_is_the_sum_of_its_parts():
    outcome = simulate_run(100_000, 10 * DAY, load_reliability())
    assert outcome.work == pytest.approx(10 * DAY)
    assert min(outcome.checkpoints, outcome.lost, outcome.restarts) > 0
    assert outcome.goodput == pytest.approx(10 * DAY / outcome.wall)


def test_without_spares_the_job_waits_for_the_repair():
    none = replace(load_reliability(), spare_share=0.0, repair_hours=2.0)
    outcome = simulate_run(16384, 10 * DAY, none)
    assert outcome.waiting == pytest.approx(outcome.failures * 2 * 3600)


def test_more_gpus_are_less_productive_each():
    shares = [expected_goodput(gpus, PLENTY) for gpus in (8, 2048, 16384, 100_000)]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.998 and shares[-1] < 0.75


def test_llama_3_kept_more_than_90_percent():
    """Reported beside the rate (arXiv 2407.21783 §3.3.4); restart and checkpoint times are from another paper."""
    assert 0.90 < expected_goodput(16384, load_reliability()) < 0.95


def test_seed_repeats():
    assert simulate_run(16384, DAY, PLENTY, seed=3) == simulate_run(16384, DAY, PLENTY, seed=3)
    assert simulate_run(16384, DAY, PLENTY, seed=3) != simulate_run(16384, DAY, PLENTY, seed=4)


def test_report_takes_overrides():
    report = failures_report(16384, 54, ["restart_seconds=0"])
    assert report["days"]["restarts"] == 0 and report["days"]["work"] == pytest.approx(54)
    assert report["factors"]["restart_seconds"]["source"] == "set by hand"


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        (lambda: load_reliability(["restart=3"]), "did you mean 'restart_seconds'"),
        (lambda: load_reliability(["checkpoint_seconds=0"]), "above 0"),
        (lambda: failures_report(0, 1), "at least 1"),
        (lambda: failures_report(8, -1), "above 0"),
        (lambda: simulate_run(8, 0, PLENTY), "more than 0"),
        (lambda: simulate_run(10**8, DAY, PLENTY), "fail every"),
    ],
)
def test_bad_input(call, fault):
    with pytest.raises(UserError, match=fault):
        call()
