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
