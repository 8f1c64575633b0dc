"""The peak memory of real training steps against what is counted for them."""

import json
import subprocess
import sys

import pytest

from baleen.cost.architecture import from_model_config
from baleen.cost.layout import Layout
from baleen.cost.memory import rank_memory
from baleen.recipe import Recipe, load_recipe

SMALL = ("model.num_hidden_layers=2", "model.vocab_size=512", "train.batch_tokens=256")


def measured(recipe: Recipe) -> float:
    """What a process of its own grew by."""
    asked = json.dumps({"recipes": [recipe.model_dump(mode="json")], "steps": 1})
    command = [sys.executable, "-m", "baleen.train.probe"]
    done = subprocess.run(command, input=asked, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)[0]["peak_bytes"]


def counted(recipe: Recipe) -> float:
    """Weights, gradients, optimizer state and activations."""
    train = recipe.train
    layout = Layout(devices=1, zero=0, recompute="none", micro_batch=train.batch_tokens // train.seq_len)
    storage = "autocast" if train.precision == "bf16" else train.precision
    arch = from_model_config(recipe.model)
    return rank_memory(arch, layout, seq_len=train.seq_len, micro_batches=1, precision=storage).total


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("name", "precision"), [("cpu-s", "fp32"), ("cpu-s", "bf16"), ("cpu-m", "fp32")])
def test_peak_memory_is_what_is_counted(name, precision):
    """Within 20 %, beside what the libraries take for themselves: what a step of next to nothing takes. (In bf16 cpu-m
    would take a quarter of an hour on a CPU that does not multiply it.)"""
    whole, small = (load_recipe(name, (f"train.precision={precision}", *sets)) for sets in ((), SMALL))
    libraries = measured(small) - counted(small)
    assert counted(whole) + libraries == pytest.approx(measured(whole), rel=0.2)
