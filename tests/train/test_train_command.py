"""`baleen train`: what it prints at its end stays in the run."""

import json

from typer.testing import CliRunner

from baleen.cli import app
from baleen.eval.report import write_report


def test_the_results_stay_in_the_run_and_reach_its_report(tiny_recipe, tmp_path):
    recipe, run = tmp_path / "tiny.toml", tmp_path / "run"
    recipe.write_text(tiny_recipe().to_toml(), encoding="utf-8")
    done = CliRunner().invoke(app, ["train", str(recipe), "--run", str(run), "--max-steps", "1", "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert json.loads((run / "train.json").read_text(encoding="utf-8")) == printed
    assert f"{printed['heldout_bpb']:.3f} of the model at the end" in write_report(run).read_text(encoding="utf-8")
