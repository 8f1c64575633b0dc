"""The notebook: claims are runnable, rows are those of the recipe as it is, and the page is made of them."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def notebook(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "evidence"))
    import notebook

    return notebook


def claim_of(notebook, **keys):
    arms = {"plain": ["train.lr=1e-3"], "new": ["train.lr=2e-3"]}
    return notebook.Claim.model_validate({"says": "s", "paper": "p", "recipe": "chitchat", "arms": arms, **keys})


def write_rows(notebook, claim, folder, values):
    rows = [
        {"arm": arm, "seed": seed, "hash": claim.hash_of(arm, seed), "value": value, "device_hours": 0.5}
        for (arm, seed), value in values.items()
    ]
    (folder / "rows").mkdir(exist_ok=True)
    (folder / "rows" / "c.json").write_text(json.dumps(rows))


def test_every_claim_has_arms_that_differ(notebook):
    for claim in notebook.load_claims().values():
        assert len({claim.hash_of(arm, seed) for arm in claim.arms for seed in claim.seeds}) == 2 * len(claim.seeds)


def test_the_page_is_that_of_the_rows(notebook):
    assert (ROOT / "docs/evidence.md").read_text() == notebook.page(notebook.load_claims())


def test_interval_is_students(notebook):
    mean, half = notebook.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / 3**0.5)


@pytest.mark.parametrize(
    ("expects", "mean", "half", "says"),
    [
        ("lower", -2.0, 1.0, "holds"),
        ("lower", 2.0, 1.0, "does not hold"),
        ("lower", -1.0, 2.0, "can't be seen at this size"),
        ("within", 0.5, 0.4, "holds"),
        ("within", -2.0, 0.5, "does not hold"),
        ("within", 0.5, 0.6, "can't be seen at this size"),
    ],
)
def test_verdicts(notebook, expects, mean, half, says):
    assert notebook.verdict(claim_of(notebook, expects=expects, margin=1.0), mean, half) == says


def test_stale_rows_do_not_count(notebook, tmp_path):
    claim = claim_of(notebook, seeds=[0, 1])
    write_rows(notebook, claim, tmp_path, {(arm, seed): 1.0 for arm in claim.arms for seed in claim.seeds})
    assert len(notebook.read_rows("c", claim, tmp_path)) == 4
    changed = claim_of(notebook, seeds=[0, 1], overrides=["train.tokens=4096"])
    assert not notebook.read_rows("c", changed, tmp_path)
    assert len(notebook.read_rows("c", claim.model_copy(update={"says": "other words"}), tmp_path)) == 4


def test_an_incomplete_claim_has_no_number(notebook, tmp_path):
    claim = claim_of(notebook, seeds=[0, 1], not_run="too long")
    assert "|  | too long |" in notebook.page({"c": claim}, tmp_path)
    write_rows(notebook, claim, tmp_path, {("plain", 0): 1.0, ("new", 0): 0.5, ("plain", 1): 1.0})
    assert "|  | 3 of 4 rows are there |" in notebook.page({"c": claim}, tmp_path)
    write_rows(notebook, claim, tmp_path, {("plain", 0): 1.0, ("new", 0): 0.5, ("plain", 1): 2.0, ("new", 1): 1.0})
    assert "-50.00% ± 0.00%, 2 seeds | holds |" in notebook.page({"c": claim}, tmp_path)


def test_only_what_is_missing_is_run(notebook, tmp_path, monkeypatch):
    claim, ran = claim_of(notebook, seeds=[0, 1]), []

    def run(name, claim, arm, seed, runs):
        ran.append((arm, seed))
        if len(ran) == 3:
            raise KeyboardInterrupt
        return {"arm": arm, "seed": seed, "hash": claim.hash_of(arm, seed), "value": 1.0, "device_hours": 0.1}

    monkeypatch.setattr(notebook, "run_row", run)
    with pytest.raises(KeyboardInterrupt):
        notebook.run_missing("c", claim, tmp_path, tmp_path)
    notebook.run_missing("c", claim, tmp_path, tmp_path)
    assert ran == [("plain", 0), ("new", 0), ("plain", 1), ("plain", 1), ("new", 1)]
    assert len(notebook.read_rows("c", claim, tmp_path)) == 4
