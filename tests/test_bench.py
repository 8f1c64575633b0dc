"""The benchmarks can be started, and README's table of speed is that of their rows. No second is asserted."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(path.stem for path in (ROOT / "bench").glob("*.py"))


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_name_that_a_program_takes_from_the_package_is_there(bench, program):
    bench(program)


def test_the_readme_has_the_table_of_the_rows(bench):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = json.loads((ROOT / "bench" / "results" / "speed.json").read_text())
    assert bench("table").with_table(readme, rows) == readme
    rows["train-S"]["baleen"]["tokens_per_second"] += 1
    assert bench("table").with_table(readme, rows) != readme


def test_what_is_not_a_number_is_no_agreement(bench):
    import torch

    class Contender:
        def __init__(self, value):
            self.logits = torch.full((1, 4), value)

        def prefill(self, prompts):
            return self.logits

    rounds = bench("rounds")
    nan, one = Contender(float("nan")), Contender(1.0)
    assert rounds.check({"baleen fp32": one, "transformers": one}, lambda c: [c.logits]) == {"transformers": 0.0}
    for made in ({"baleen fp32": one, "transformers": nan}, {"baleen fp32": nan, "transformers": one}):
        with pytest.raises(SystemExit, match="not finite|computes something else"):
            rounds.check(made, lambda c: [c.logits])


def test_one_row_that_is_no_number_hides_no_strangers(bench):
    import torch

    apart = bench("contenders").differences(torch.tensor([[float("nan")], [1.5], [1.0]]), torch.ones(3, 1))
    assert apart == [float("inf"), 0.5, 0.0]


def test_a_contestant_races_at_several_places(bench):
    quality = bench("quality")
    races = {("baleen", -1): [1.5, 1.0], ("dense muon", 0): [1.4, 1.1], ("dense muon", -2): [1.3, 0.9]}
    rows = []
    for (name, size), curve in races.items():
        points = [{"seconds": 10.0 * (i + 1), "bits_per_byte": bits} for i, bits in enumerate(curve)]
        place = {"name": name, "size": size, "lr": 4.8e-3}
        rows.append(place | {"bits_per_byte": curve[-1], "curve": points, "date": "2026-12-01"})
    result = quality.told({quality.label(row): row for row in rows}, {})
    ours, wide, narrow = "baleen,-1,0.0048", "dense muon,0,0.0048", "dense muon,-2,0.0048"
    assert quality.place(wide) == ("dense muon", 0, 4.8e-3)  # what is told can be typed
    assert (list(result["baleen"]), list(result["peers"])) == ([ours], [wide, narrow])
    assert result["ratios"][f"bits per byte: {ours} / {narrow}"] == 1.0 / 0.9
    assert result["reached_after_seconds"] == {f"{ours} reaches {wide}": 20.0, f"{ours} reaches {narrow}": None}
