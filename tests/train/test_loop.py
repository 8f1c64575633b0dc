"""Whole runs of ten steps: resuming, stopping, refusing, and what they leave behind."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from baleen.config import UserError
from baleen.data.document import Document, Message
from baleen.parallel.worker import Alone
from baleen.train import checkpoint, loop, rundir
from baleen.train.checkpoint import load_newest
from baleen.train.display import Display
from baleen.train.loop import train
from baleen.train.rundir import Metrics, open_run, read_metrics
from baleen.train.trainer import Trainer, environment, max_violation

NOT_REPEATED = ("seconds", "tokens_per_second", "usd")


class Listener(Display):
    """Keeps what is said, and the warnings."""

    def __init__(self):
        super().__init__(quiet=True)
        self.said: list[str] = []
        self.warnings: list[str] = []

    def say(self, message):
        self.said.append(message)

    def warn(self, message):
        self.warnings.append(message)


def run(recipe, folder, **options):
    """(summary, warnings)"""
    listener = Listener()
    return train(recipe, folder, display=listener, **options), listener.warnings


def curves(folder):
    """The rows of metrics.jsonl without what a clock says; strict JSON only."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    return [{key: value for key, value in row.items() if key not in NOT_REPEATED} for row in rows]


def last_checkpoint(folder):
    newest = load_newest(folder / "checkpoints", pytest.fail)
    assert newest is not None
    return newest


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


FULL = {"optimizer": "muon", "ema_decay": 0.9, "micro_batch_size": 3, "checkpoint_every": 3, "eval_every": 4}
RAMP = {"batch_tokens": ((0, 0.5), ("50%", 1.0)), "lr": ((0, 0.0), ("30%", 1.0), ("100%", 0.1, "cosine"))}


@pytest.mark.parametrize(
    "train_keys, model_keys",
    [(FULL, {}), ({"checkpoint_every": 4}, {"tie_word_embeddings": True, "num_nextn_predict_layers": 0})],
    ids=["muon, EMA, accumulation, MTP", "AdamW, tied embeddings"],
)
def test_resumed_equals_straight_bit_for_bit(tiny_recipe, tmp_path, train_keys, model_keys):
    recipe = tiny_recipe(train=train_keys, model=model_keys, schedule=RAMP)
    torch.manual_seed(0)
    straight, _ = run(recipe, tmp_path / "straight")
    for steps in (1, 5, 6, None):
        torch.manual_seed(steps - 1 if steps else 99)  # a process that did other things with its random numbers
        broken, warnings = run(recipe, tmp_path / "broken", resume=steps != 1, max_steps=steps)
        assert warnings == []
    assert straight["step"] > 10 and straight["status"] == "done"  # the ramp makes more steps of fewer sequences
    again, _ = run(recipe, tmp_path / "broken", resume=True)  # as after a kill behind the last step
    for key in ("weights_sha256", "heldout_bpb", "loss", "max_violation_pooled"):
        assert again[key] == broken[key] == straight[key]
    assert curves(tmp_path / "broken") == curves(tmp_path / "straight")
    assert [row["step"] for row in curves(tmp_path / "broken")] == list(range(1, straight["step"] + 1))
    a, b = last_checkpoint(tmp_path / "straight"), last_checkpoint(tmp_path / "broken")
    assert a.tensors.keys() == b.tensors.keys() and ("ema" in a.tensors) == ("ema_decay" in train_keys)
    for name, tensors in a.tensors.items():
        assert tensors.keys() == b.tensors[name].keys() and tensors
        assert all(tensor.equal(b.tensors[name][key]) for key, tensor in tensors.items())
    assert a.state["loader"] == b.state["loader"] and a.state["rng"] == b.state["rng"]


def test_another_seed_is_another_run(tiny_recipe, tmp_path):
    shas = {run(tiny_recipe(train={"seed": s}), tmp_path / str(s), max_steps=2)[0]["weights_sha256"] for s in (0, 1)}
    assert len(shas) == 2


def test_ema_is_the_average_of_the_weights(tiny_recipe, tmp_path):
    recipe = tiny_recipe(train={"ema_decay": 0.2, "checkpoint_every": 1, "keep_checkpoints": 20})
    run(recipe, tmp_path / "run", max_steps=3)
    saved = [checkpoint.load(tmp_path / "run" / "checkpoints", step).tensors for step in (1, 2, 3)]
    for name, average in saved[2]["ema"].items():
        expected = saved[0]["ema"][name]
        for step in (1, 2):
            decay = min(0.2, (1 + step) / (10 + step))  # 2/11, then 0.2
            expected = decay * expected + (1 - decay) * saved[step]["model"][name]
        torch.testing.assert_close(average, expected)
    assert (tmp_path / "run" / "model-ema" / "config.json").is_file()


def test_gradient_accumulation_equals_the_whole_batch(tiny_recipe, tmp_path):
    """Four sequences at once, as 3 and 1, and one by one."""
    losses = []
    for size in (0, 3, 1):
        run(tiny_recipe(train={"micro_batch_size": size}), tmp_path / str(size), max_steps=3)
        losses.append([row["loss"] for row in curves(tmp_path / str(size))])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_rows_past_the_checkpoint_are_dropped(tiny_recipe, tmp_path):
    recipe = tiny_recipe(train={"checkpoint_every": 2, "keep_checkpoints": 9})
    run(recipe, tmp_path / "run")
    whole = curves(tmp_path / "run")
    for step in (8, 10):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step}")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')  # torn by a kill
    run(recipe, tmp_path / "run", resume=True, max_steps=7)
    assert curves(tmp_path / "run") == whole[:7]
    run(recipe, tmp_path / "run", resume=True)
    assert curves(tmp_path / "run") == whole


def test_metrics_rewrite_nothing_but_the_tail(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in range(1, 4):
        metrics.write({"step": step, "loss": 1 / step, "grad_norm": math.inf})
    metrics.close()
    Metrics(tmp_path, 2).close()
    kept = [{"step": 1, "loss": 1.0, "grad_norm": None}, {"step": 2, "loss": 0.5, "grad_norm": None}]
    assert read_metrics(tmp_path) == kept
    assert not list(tmp_path.glob(".*aside"))


def test_a_kill_between_checkpoint_and_the_next_step_loses_no_row(tiny_recipe, tmp_path, monkeypatch):
    recipe = tiny_recipe(train={"checkpoint_every": 4})
    run(recipe, tmp_path / "straight")
    with monkeypatch.context() as patch:
        original = checkpoint.save

        def save_and_die(*args, **kwargs):
            original(*args, **kwargs)
            raise KeyboardInterrupt

        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "killed")
    assert checkpoint.saved_steps(tmp_path / "killed" / "checkpoints") == [4]
    run(recipe, tmp_path / "killed", resume=True)
    assert curves(tmp_path / "killed") == curves(tmp_path / "straight")


def test_a_model_that_ends_elsewhere_than_its_tokenizer_is_refused(tiny_recipe, tmp_path):
    with pytest.raises(UserError, match="set model.eos_token_id=1"):
        run(tiny_recipe(model={"eos_token_id": 5}), tmp_path / "run", max_steps=1)


# --- run directories that are refused


def test_an_existing_run_wants_resume(tiny_recipe, tmp_path):
    run(tiny_recipe(), tmp_path / "run", max_steps=1)
    before = tree(tmp_path)
    with pytest.raises(UserError, match="already holds this run: add --resume"):
        run(tiny_recipe(), tmp_path / "run")
    assert tree(tmp_path) == before


def test_two_processes_do_not_resume_the_same_run(tiny_recipe, tmp_path):
    recipe = tiny_recipe()
    run(recipe, tmp_path / "run", max_steps=1)
    before = tree(tmp_path)
    with open_run(tmp_path / "run", recipe, resume=True):
        with pytest.raises(UserError, match="another process is at work"):
            run(recipe, tmp_path / "run", resume=True, max_steps=2)
        assert tree(tmp_path) == before
    assert run(recipe, tmp_path / "run", resume=True, max_steps=2)[0]["step"] == 2


@pytest.mark.parametrize("resume", [False, True])
def test_the_run_of_another_recipe_is_refused(tiny_recipe, tmp_path, resume):
    run(tiny_recipe(), tmp_path / "run", max_steps=1)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"belongs to another recipe \(its train.lr differs"):
        run(tiny_recipe(train={"lr": 1e-4}), tmp_path / "run", resume=resume)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_directory_that_is_no_run_is_refused(tiny_recipe, tmp_path, resume):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("my only copy")
    (tmp_path / "file").write_text("a file")
    before = tree(tmp_path)
    for name in ("run", "file"):
        with pytest.raises(UserError, match="is not a run"):
            run(tiny_recipe(), tmp_path / name, resume=resume)
    assert tree(tmp_path) == before


def test_a_users_own_recipe_file_is_not_overwritten(tiny_recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text(tiny_recipe(train={"lr": 1e-4}).to_toml())
    before = tree(tmp_path)
    with pytest.raises(UserError, match="belongs to another recipe"):
        run(tiny_recipe(), tmp_path / "run")
    assert tree(tmp_path) == before


def test_a_users_own_tokenizer_beside_the_recipe_is_not_removed(tiny_recipe, tmp_path):
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    (tmp_path / "run" / "recipe.toml").write_text(tiny_recipe().to_toml())
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_text("my only copy")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="holds tokenizer, which is no run's"):
        run(tiny_recipe(), tmp_path / "run")
    assert tree(tmp_path) == before


def test_resume_without_a_run_begins_one(tiny_recipe, tmp_path):
    assert run(tiny_recipe(), tmp_path / "run", resume=True, max_steps=1)[0]["step"] == 1


def test_a_run_that_never_trained_leaves_its_directory_free(tiny_recipe, corpus, tmp_path):
    """Bad text is found after the directory was claimed: with other text the same command works."""
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="is empty"):
        run(tiny_recipe(data={"sources": (str(tmp_path / "empty.txt"),)}), tmp_path / "run")
    assert run(tiny_recipe(), tmp_path / "run", max_steps=1)[0]["step"] == 1


def test_a_run_that_ended_in_its_first_step_leaves_its_directory_free(tiny_recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(Trainer, "step", lambda self: 1 / 0)  # out of memory, say
        with pytest.raises(ZeroDivisionError):
            run(tiny_recipe(), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert run(tiny_recipe(train={"micro_batch_size": 2}), tmp_path / "run", max_steps=1)[0]["step"] == 1


def test_a_directory_that_refuses_the_recipe(tiny_recipe, tmp_path, monkeypatch):
    run(tiny_recipe(), tmp_path / "run", max_steps=1)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(rundir, "write_aside", refuse)
    with pytest.raises(UserError, match="cannot be written"):
        run(tiny_recipe(), tmp_path / "run", resume=True, max_steps=1)


# --- bad text


@pytest.mark.parametrize("wrong", [{"sources": ("/no/such/text",)}, {"format": "chat", "fim_rate": 0.1}])
def test_a_refused_recipe_leaves_neither_directory_nor_ledger(tiny_recipe, tmp_path, wrong):
    with pytest.raises(UserError, match="neither a file nor a folder|are for data.format 'text'"):
        run(tiny_recipe(data=wrong), tmp_path / "lab" / "run")
    assert not (tmp_path / "lab").exists()


@pytest.mark.parametrize("kind, fault", [("typo", "no tracker 'typo'"), ("wandb", "needs the package wandb")])
def test_a_refused_tracker_leaves_neither_directory_nor_ledger(tiny_recipe, tmp_path, monkeypatch, kind, fault):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=fault):
        run(tiny_recipe(), tmp_path / "lab" / "run", track=kind)
    assert not (tmp_path / "lab").exists()


def test_refused_text_leaves_no_run_at_a_tracker(tiny_recipe, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(loop, "check_tracker", lambda kind: None)
    monkeypatch.setattr(loop, "open_tracker", lambda *given: opened.append(given))
    (tmp_path / "text.txt").write_text("too short")
    with pytest.raises(UserError, match="too few to train on|fills only|fewer than"):
        run(tiny_recipe(data={"sources": (str(tmp_path / "text.txt"),)}), tmp_path / "run", track="wandb")
    assert not opened


@pytest.mark.parametrize(
    "content, cure",
    [(b"", "is empty"), (b"\x00\x01" * 500, "is binary"), (b"too short", "too few to train on|fills only|fewer than")],
)
def test_text_that_is_no_corpus(tiny_recipe, tmp_path, content, cure):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=cure) as caught:
        run(tiny_recipe(data={"sources": (str(file),)}), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_vocabulary_too_large_for_the_text(tiny_recipe, tmp_path):
    with pytest.raises(UserError, match=r"vocab_size is 5000, but the text fills only \d+"):
        run(tiny_recipe(model={"vocab_size": 5000}), tmp_path / "run")


def test_nothing_held_out_reports_no_bits_per_byte(tiny_recipe, tmp_path):
    recipe = tiny_recipe(data={"heldout_fraction": 0.0}, train={"eval_every": 1})
    summary, _ = run(recipe, tmp_path / "run", max_steps=2)
    assert summary["heldout_bpb"] is None
    assert all(row.get("heldout_bpb") is None for row in curves(tmp_path / "run"))


# --- trouble on the way


def test_a_checkpoint_of_another_corpus_is_refused(tiny_recipe, corpus, tmp_path):
    texts = tmp_path / "texts"
    shutil.copytree(corpus, texts)
    recipe = tiny_recipe(data={"sources": (str(texts),)})
    run(recipe, tmp_path / "run", max_steps=2)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for file in sorted(texts.iterdir())[:20]:
        file.write_text(file.read_text()[::-1])
    with pytest.raises(UserError, match="made on other text"):
        run(recipe, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


def test_a_torn_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(tiny_recipe, tmp_path):
    recipe = tiny_recipe(train={"checkpoint_every": 2})
    straight, _ = run(recipe, tmp_path / "straight")
    run(recipe, tmp_path / "torn", max_steps=4)
    file = tmp_path / "torn" / "checkpoints" / "step-4" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    summary, warnings = run(recipe, tmp_path / "torn", resume=True)
    assert len(warnings) == 1 and str(file) in warnings[0]
    assert summary["weights_sha256"] == straight["weights_sha256"]
    assert curves(tmp_path / "torn") == curves(tmp_path / "straight")


def test_a_full_disk_during_a_save_does_not_stop_the_run(tiny_recipe, tmp_path, monkeypatch):
    recipe = tiny_recipe(train={"checkpoint_every": 3})
    straight, _ = run(recipe, tmp_path / "straight")
    original, saves = checkpoint.safetensors.torch.save_file, []

    def full_once(tensors, file, **kwargs):
        if "aside-step" in str(file):
            saves.append(file)
            if file.parent.name.endswith("step-6"):
                raise OSError(28, "No space left on device")
        original(tensors, file, **kwargs)

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", full_once)
    summary, warnings = run(recipe, tmp_path / "full")
    assert len(warnings) == 1 and "step-6 could not be saved" in warnings[0] and saves
    assert summary["weights_sha256"] == straight["weights_sha256"]
    assert checkpoint.saved_steps(tmp_path / "full" / "checkpoints") == [9, 10]


def test_another_thread_count_warns(tiny_recipe, tmp_path):
    threads = torch.get_num_threads()
    run(tiny_recipe(), tmp_path / "run", max_steps=1)
    try:
        torch.set_num_threads(threads + 1)
        _, warnings = run(tiny_recipe(), tmp_path / "run", resume=True, max_steps=2)
    finally:
        torch.set_num_threads(threads)
    assert warnings == [f"this run may not repeat bit for bit: threads was {threads}, is {threads + 1}"]


def test_each_difference_of_the_environment_warns(tiny_recipe, tmp_path, monkeypatch):
    recipe = tiny_recipe()
    run(recipe, tmp_path / "run", max_steps=1)
    now = {**environment("fp32"), "layout": "one process"}
    assert now.keys() == {"threads", "torch", "cpu", "precision", "kernels", "code", "layout"}
    for key, value in now.items():
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_environment", lambda _, key=key: {**now, key: "another"})
            _, warnings = run(recipe, tmp_path / "run", resume=True, max_steps=1)
        assert warnings == [f"this run may not repeat bit for bit: {key} was {value}, is another"]


def test_a_gradient_that_is_not_finite_is_skipped_counted_and_told(tiny_recipe, tmp_path, monkeypatch):
    original = Alone.accumulate
    before_and_after = []

    def state(trainer):
        tensors = {**trainer.model.state_dict(), **trainer.optimizer.state_tensors(), **trainer.ema}
        return {name: tensor.clone() for name, tensor in tensors.items()}

    trainers = []
    init = Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", lambda self, *args: (init(self, *args), trainers.append(self))[0])

    def poisoned(worker, *args):
        totals, trainer = original(worker, *args), trainers[0]
        if trainer.counters.step == 2:
            before_and_after.append(state(trainer))
            trainer.model.lm_head.weight.grad[0, 0] = float("nan")
            totals = totals._replace(main=float("nan"), mtp=float("nan"))
        if trainer.counters.step == 3:
            before_and_after.append(state(trainer))
        return totals

    monkeypatch.setattr(Alone, "accumulate", poisoned)
    tracked = []
    tracker = SimpleNamespace(log=lambda step, numbers: tracked.append(numbers), close=lambda: None)
    monkeypatch.setattr(loop, "open_tracker", lambda *_: tracker)
    summary, warnings = run(tiny_recipe(train={"ema_decay": 0.5}), tmp_path / "run", max_steps=5)
    before, after = before_and_after
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    assert warnings == ["step 3: the gradient is not finite; the update is left out"]
    rows = curves(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1]
    assert (
        rows[2]["loss"] is None and rows[3]["loss"] > 0 and [row["tokens"] for row in rows] == [64, 128, 192, 256, 320]
    )
    assert last_checkpoint(tmp_path / "run").state["counters"]["skipped"] == 1
    assert ["loss" in numbers for numbers in tracked] == [True, True, False, True, True]
    json.dumps(tracked, allow_nan=False)
    json.dumps(summary, allow_nan=False)


# --- balance


def test_the_bias_moves_and_balances(tiny_recipe, tmp_path, monkeypatch):
    """From a router that sends every token to the same two experts, gamma alone brings max_violation down."""
    keys = {"tokens": 64 * 60, "lr": 1e-5, "balance_loss_weight": 0.0}
    violations = {}
    initialise = loop.Transformer.init_weights

    def lopsided(model, seed):
        initialise(model, seed)
        for gate in model.gates:
            gate.e_score_correction_bias.copy_(torch.tensor([0.2, 0.2, 0.0, 0.0]))

    monkeypatch.setattr(loop.Transformer, "init_weights", lopsided)
    for gamma in (0.0, 0.02):
        folder = tmp_path / str(gamma)
        run(tiny_recipe(train={**keys, "bias_update_speed": gamma}), folder)
        violations[gamma] = [row["max_violation"] for row in curves(folder)]
        biases = [t for n, t in last_checkpoint(folder).tensors["model"].items() if n.endswith("correction_bias")]
        moved = torch.stack(biases) - torch.tensor([0.2, 0.2, 0.0, 0.0])
        assert len(biases) == 2 and moved.any() == (gamma > 0)
        if gamma:  # every step moves every bias by gamma, or not at all
            torch.testing.assert_close(moved / gamma, (moved / gamma).round(), rtol=0, atol=1e-3)
    assert violations[0.02][0] == violations[0.0][0] > 0.9  # 1.0: every token on the same two of four experts
    assert sum(violations[0.02][-10:]) / 10 < 0.5 < 0.9 < sum(violations[0.0][-10:]) / 10


def test_max_violation_is_the_excess_of_the_fullest_expert():
    loads = [torch.tensor([4, 4, 4, 4]), torch.tensor([8, 4, 4, 0])]
    assert max_violation(loads) == 0.5
    assert max_violation([]) == 0.0


# --- what is left behind


def test_a_run_leaves_what_design_promises(tiny_recipe, tmp_path):
    summary, warnings = run(tiny_recipe(), tmp_path / "runs" / "mine")
    folder = tmp_path / "runs" / "mine"
    assert warnings == [] and summary["status"] == "done" and summary["tokens"] == 640
    assert {p.name for p in folder.iterdir()} >= {"recipe.toml", "metrics.jsonl", "model", "checkpoints", "run_id"}
    assert {p.name for p in (folder / "model").iterdir()} >= {"config.json", "tokenizer.json", "README.md"}
    assert len(list((tmp_path / "runs" / "ledger").glob("*.jsonl"))) == 1
    losses = [row["loss"] for row in curves(folder)]
    assert losses[-1] < losses[0]
    assert summary["loss"] == pytest.approx(sum(losses) / len(losses))


SAMPLED = {"model": {"max_position_embeddings": 128}, "train": {"sample_every_seconds": 1e-6}}


@pytest.mark.parametrize(
    "openings, prompt", [(["whale " * 200, "a short song"], "a short song"), (["whale " * 200], "")]
)
def test_a_sample_asks_what_its_context_holds(tiny_recipe, corpus, tmp_path, monkeypatch, openings, prompt):
    """Whatever conversations were held out, training goes on."""
    monkeypatch.setattr(loop, "FIRST_SAMPLE_SECONDS", 0.0)
    turns = [[{"role": "user", "content": file.read_text()}] for file in corpus.iterdir()]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    recipe = tiny_recipe(data={"sources": (str(chats),), "format": "chat"}, **SAMPLED)
    prepared = loop._prepare
    held_out = [Document.of_messages([Message("user", opening)], "") for opening in openings]
    monkeypatch.setattr(loop, "_prepare", lambda *given: replace(prepared(*given), heldout=held_out))
    run(recipe, tmp_path / "run", max_steps=2)
    samples = [row["sample"] for row in curves(tmp_path / "run") if "sample" in row]
    assert samples and all(sample.startswith(prompt) and "whale " * 9 not in sample for sample in samples)


def test_a_model_that_gives_no_numbers_has_no_sample_and_trains_on(tiny_recipe, tmp_path, monkeypatch):
    def spoilt(*given):
        raise UserError("the model's logits are no numbers")

    monkeypatch.setattr(loop, "FIRST_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(loop.Engine, "complete", spoilt)
    run(tiny_recipe(**SAMPLED), tmp_path / "run", max_steps=2)
    assert [row.keys() & {"sample"} for row in curves(tmp_path / "run")] == [set(), set()]


def test_the_exported_model_is_the_one_that_was_trained(tiny_recipe, tmp_path):
    from baleen.interop.load import load

    summary, _ = run(tiny_recipe(), tmp_path / "run", max_steps=2)
    assert (summary["status"], summary["step"]) == ("stopped", 2)  # of ten
    assert loop.weights_sha256(load(tmp_path / "run").model.state_dict()) == summary["weights_sha256"]


# --- signals

SCRIPT = """
import sys
from pathlib import Path
from baleen.recipe import load_recipe
from baleen.train.loop import train
print(train(load_recipe(sys.argv[1]), Path(sys.argv[2]), resume=True))
"""


def test_ctrl_c_ends_the_step_under_way_and_saves(tiny_recipe, tmp_path, monkeypatch):
    straight, _ = run(tiny_recipe(), tmp_path / "straight")
    step = Trainer.step

    def interrupted(trainer):
        if trainer.counters.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        before = signal.getsignal(signal.SIGINT)
        listener = Listener()
        summary = train(tiny_recipe(), tmp_path / "run", display=listener, go_on="ask again")
    assert (summary["status"], summary["step"]) == ("stopped", 4)
    assert listener.said[-1] == "stopped at step 4 and saved; ask again"
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "run" / "model").exists()
    resumed, _ = run(tiny_recipe(), tmp_path / "run", resume=True)
    assert resumed["weights_sha256"] == straight["weights_sha256"]
    assert curves(tmp_path / "run") == curves(tmp_path / "straight")


def test_sigterm_saves_and_exits_0_and_resume_equals_straight(tiny_recipe, tmp_path):
    recipe = tiny_recipe(train={"tokens": 64 * 400})
    file = tmp_path / "tiny.toml"
    file.write_text(recipe.to_toml())
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(file), str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    deadline = time.monotonic() + 60
    while len(read_metrics(tmp_path / "run")) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0 and "'status': 'stopped'" in out
    stopped_at = last_checkpoint(tmp_path / "run").step
    assert 3 <= stopped_at < 400
    assert [row["step"] for row in curves(tmp_path / "run")] == list(range(1, stopped_at + 1))
    more = stopped_at + 2
    resumed, warnings = run(recipe, tmp_path / "run", resume=True, max_steps=more)
    straight, _ = run(recipe, tmp_path / "straight", max_steps=more)
    assert warnings == []
    assert resumed["weights_sha256"] == straight["weights_sha256"]
    assert curves(tmp_path / "run") == curves(tmp_path / "straight")
