"""The stages of a recipe on a network so small that a step takes a blink: what they leave, and how they resume."""

import json
import os
import signal
import tomllib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_stages import MODEL, SFT, tiny_recipe
from typer.testing import CliRunner

from baleen.align import grpo as grpo_module
from baleen.align import pipeline as pipeline_module
from baleen.align.pipeline import align
from baleen.align.recipe import AlignRecipe, for_command
from baleen.align.rollout import Answer, Group, Score, punish_overlong
from baleen.align.sft import chat_of, conversations, packed_rows
from baleen.align.tasks import Question
from baleen.cli import app
from baleen.config import ModelConfig, UserError
from baleen.data.tokenizer_training import train_tokenizer
from baleen.eval.report import hacked_reward, write_report
from baleen.interop.huggingface import save_model
from baleen.interop.load import load
from baleen.model.transformer import Transformer
from baleen.train import checkpoint
from baleen.train.checkpoint import NotSaved
from baleen.train.display import Display
from baleen.train.loop import weights_sha256
from baleen.train.rundir import Metrics, read_metrics
from baleen.train.trainer import Trainer

RL = {
    "kind": "rl", "steps": 4, "questions": 3, "group_size": 4, "minibatches": 2, "lr": 1e-3, "kl_coef": 0.01,
    "reference_every": 2, "eval_every": 2, "eval_questions": 5, "checkpoint_every": 1, "sampling": {"max_tokens": 8},
    "rewards": [{"name": "length"}, {"name": "accuracy"}],
}  # fmt: skip
LIMITS = {"questions": 6, "samples": 4, "sampling": {"max_tokens": 8}}
GYM = {"name": "reasoning_gym", "task": "chain_sum"}


def run(recipe, path, **keys):
    return align(recipe, path, display=Display(quiet=True), **keys)


def sha(path):
    return weights_sha256(load(path).model.state_dict())


def test_sft_then_rl_leaves_a_model_metrics_and_a_ledger(tmp_path):
    summary = run(tiny_recipe(SFT, RL), tmp_path / "run")
    assert summary["status"] == "done" and summary["stages_done"] == 2
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["stage"] for row in rows] == ["sft"] * (len(rows) - 4) + ["rl"] * 4
    last = rows[-1]
    for key in ("reward", "accuracy", "answer_tokens", "entropy", "kl", "degenerate_groups", "heldout_accuracy"):
        assert last[key] is not None, key
    assert last["logprob_gap"] < 1e-4  # rollout and training are the same model
    assert sha(tmp_path / "run") == sha(tmp_path / "run/stages/2-rl") != sha(tmp_path / "run/stages/1-sft")
    ledger = [json.loads(x) for x in next((tmp_path / "ledger").glob("*.jsonl")).read_text().splitlines()]
    ends = {row["stage"]: row for row in ledger if row["event"] == "end"}
    assert set(ends) == {"sft", "rl", "export"}
    parts = ends["rl"]["productive_device_seconds_by_part"]
    assert set(parts) == {"rollout", "reward", "update"} and all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) == pytest.approx(ends["rl"]["productive_device_seconds"])
    assert ends["rl"]["tokens"] == last["tokens"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"kl_coef": 0.0, "minibatches": 1}, marks=pytest.mark.slow),
        pytest.param({"dynamic_sampling": 1}, marks=pytest.mark.slow),
    ],
)
def test_resumed_equals_straight_bit_for_bit(tmp_path, changes):
    pipeline = tiny_recipe(SFT, RL | changes)
    run(pipeline, tmp_path / "straight")
    stopped = run(pipeline, tmp_path / "resumed", max_steps=6)
    assert stopped["status"] == "stopped"
    run(pipeline, tmp_path / "resumed", resume=True)
    assert sha(tmp_path / "straight") == sha(tmp_path / "resumed")
    keys = ("step", "reward", "loss", "kl", "answer_tokens")
    straight, resumed = ([[row.get(k) for k in keys] for row in read_metrics(tmp_path / n)] for n in
                         ("straight", "resumed"))  # fmt: skip
    assert straight == resumed


def test_a_run_killed_in_the_middle_of_a_rollout_does_that_step_again(tmp_path, monkeypatch):
    pipeline = tiny_recipe(SFT, RL)
    run(pipeline, tmp_path / "straight")
    true_sample, calls = grpo_module.sample, []

    def killed(*args, **keys):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return true_sample(*args, **keys)

    monkeypatch.setattr(grpo_module, "sample", killed)
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, tmp_path / "killed")
    monkeypatch.setattr(grpo_module, "sample", true_sample)
    run(pipeline, tmp_path / "killed", resume=True)
    assert sha(tmp_path / "straight") == sha(tmp_path / "killed")


def test_long_answers_are_punished_on_a_line(tmp_path):
    """DAPO's equation 13 with at most 10 tokens and a buffer of 4: nothing up to 6, a quarter for each one more."""
    lengths = (1, 6, 7, 8, 10, 3)  # the last is cut off by the context
    answers = tuple(Answer((1,), (5,) * n, (0.0,) * n, "", n in (3, 10)) for n in lengths)
    scores = (Score({"accuracy": 1.0}, 2.0, 1.0),) * len(answers)
    group = Group(Question("1+1=", "2", "number", (), "2"), answers, scores)
    assert punish_overlong(group, 10, 0) is group
    punished = punish_overlong(group, 10, 4).scores
    assert [score.rewards["overlong"] for score in punished] == [0, 0, -0.25, -0.5, -1, -1]
    assert [score.total for score in punished] == [2, 2, 1.75, 1.5, 1, 1]
    assert all(score.correct == score.rewards["accuracy"] == 1 for score in punished)
    run(tiny_recipe(SFT, RL | {"overlong_buffer": 5, "steps": 1}), tmp_path / "run")
    row = read_metrics(tmp_path / "run")[-1]
    assert -1 <= row["reward_overlong"] < 0
    assert row["reward"] == pytest.approx(row["reward_accuracy"] + row["reward_length"] + row["reward_overlong"])


def test_micro_batches_change_no_update(tmp_path):
    """One answer a forward, each as long as it is, or all at once."""
    told = []
    for size in (1, 8192):
        rl = RL | {"steps": 1, "minibatches": 1, "micro_batch_tokens": size, "warmup_steps": 3}
        run(tiny_recipe(SFT, rl), tmp_path / f"run{size}")
        told.append(read_metrics(tmp_path / f"run{size}")[-1])
    for key in ("loss", "grad_norm", "entropy", "kl", "clipped", "logprob_gap"):
        assert told[0][key] == pytest.approx(told[1][key], rel=1e-4, abs=1e-7), key
    assert told[0]["grad_norm"] > 0 and told[0]["lr"] == pytest.approx(RL["lr"] / 4)


@pytest.fixture(scope="module")
def usual_policy(tmp_path_factory):
    path = tmp_path_factory.mktemp("usual") / "run"
    run(tiny_recipe(SFT, RL | {"steps": 2}), path)
    return sha(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "dr_grpo"},
        {"loss_type": "dapo"},
        {"importance_level": "sequence"},
        {"scale_rewards": "none"},
        {"inner_epochs": 2},
        {"warmup_steps": 1},
        {"clip_eps": 1e-4},
        {"clip_eps_high": 1e-4},
        {"clip_norm": 1e-3},
    ],
    ids=str,
)
def test_a_variant_reaches_the_update(tmp_path, usual_policy, changes):
    run(tiny_recipe(SFT, RL | {"steps": 2} | changes), tmp_path / "run")
    assert sha(tmp_path / "run") != usual_policy


@pytest.mark.parametrize(("further", "rounds", "useful"), [(0, 1, 1), (1, 2, 2), (5, 3, 3)])
def test_dynamic_sampling_replaces_groups_without_variance(monkeypatch, further, rounds, useful):
    """Of what a rollout draws one group has variance, so each fills one place and asks anew for the others."""
    asked_for, scored = [], []

    def drawn(model, tokenizer, asked, group_size, sampling, *, seed, system):
        asked_for.append((len(asked), seed))
        answer = Answer((1,), (5, 6), (0.0, 0.0), "", False)
        return [Group(question, (answer,) * group_size) for question in asked]

    def judged(judge, rewards, group):
        totals = [0.0, 1.0] if scored.count(asked_for[-1]) == 0 else [1.0, 1.0]
        scored.append(asked_for[-1])
        return replace(group, scores=tuple(Score({}, total, total) for total in totals))

    monkeypatch.setattr(grpo_module, "sample", drawn)
    monkeypatch.setattr(grpo_module, "score", judged)
    monkeypatch.setattr(grpo_module, "that_fit", lambda model, tokenizer, questions, system: questions)
    practised = [{"name": "chain_sum", "terms": [6, 7]}]
    recipe = tiny_recipe(SFT, RL | {"questions": 3, "group_size": 2, "dynamic_sampling": further}, tasks=practised)
    work = SimpleNamespace(model=None, tokenizer=None, recipe=recipe, tasks=lambda own: recipe.tasks)
    progress = grpo_module.Progress()
    groups, degenerate = grpo_module.collect(work, recipe.stages[1], None, progress)
    assert [count for count, _ in asked_for] == [3, 2, 1][:rounds]
    assert len({seed for _, seed in asked_for}) == rounds  # other questions each time
    assert [group.has_variance for group in groups] == [True] * useful + [False] * (3 - useful)
    assert len({group.question.prompt for group in groups}) == 3
    drawn_groups = sum([3, 2, 1][:rounds])
    assert degenerate == (drawn_groups - useful) / drawn_groups  # those thrown away count
    assert progress.tokens == 2 * 2 * drawn_groups


def test_groups_that_differ_in_length_alone_are_replaced(monkeypatch):
    """Both answers are right and one is too long: for dynamic sampling nothing is to be learnt there."""
    answers = tuple(Answer((1,), (5,) * n, (0.0,) * n, "", False) for n in (1, 8))
    monkeypatch.setattr(grpo_module, "sample", lambda m, t, asked, *_, **__: [Group(q, answers) for q in asked])
    right = (Score({}, 1.0, 1.0),) * 2
    monkeypatch.setattr(grpo_module, "score", lambda judge, rewards, group: replace(group, scores=right))
    monkeypatch.setattr(grpo_module, "that_fit", lambda model, tokenizer, questions, system: questions)
    rl = RL | {"questions": 2, "group_size": 2, "dynamic_sampling": 1, "overlong_buffer": 4}
    recipe = tiny_recipe(SFT, rl, tasks=[{"name": "chain_sum", "terms": [6, 7]}])
    work = SimpleNamespace(model=None, tokenizer=None, recipe=recipe, tasks=lambda own: recipe.tasks)
    groups, degenerate = grpo_module.collect(work, recipe.stages[1], None, grpo_module.Progress())
    assert degenerate == 1
    assert [[score.total for score in group.scores] for group in groups] == [[1, 0], [1, 0]]


def test_constants_of_an_upcycled_base_stay(tmp_path):
    """Coordinates of a latent whose norm weight is 0, and their bias."""
    model = Transformer(ModelConfig.model_validate(MODEL | {"attention_bias": True}))
    model.init_weights(0)
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        attention.kv_a_layernorm.weight[6:] = 0
        attention.kv_a_proj_with_mqa.bias[6:8] = torch.tensor([5.0, 13.0])
    save_model(model, tmp_path / "base", tokenizer=train_tokenizer(["1+2=3 "] * 9, 276))
    run(tiny_recipe(SFT, RL | {"steps": 1}, model=None, base=str(tmp_path / "base")), tmp_path / "run")
    for stage in ("1-sft", "2-rl"):
        before, attention = attention, load(tmp_path / "run/stages" / stage).model.model.layers[1].self_attn
        assert attention.kv_a_layernorm.weight[6:].tolist() == [0, 0]
        assert attention.kv_a_proj_with_mqa.bias[6:8].tolist() == [5, 13]
        assert not (before.kv_a_layernorm.weight[:6] == attention.kv_a_layernorm.weight[:6]).any()


def test_only_the_assistants_words_are_learnt_and_each_conversation_by_itself():
    tokenizer = train_tokenizer(["1+2=3 "] * 9, 276)
    chats = [chat_of(Question(q, a, "number", (), a), a, "Be brief.") for q, a in (("1+2=", "3"), ("2+2=", "4"))]
    packed = packed_rows(chats, tokenizer, 64)
    learnt = packed.flat_tokens[packed.flat_loss_mask == 1].tolist()
    assert tokenizer.decode(learnt, skip_special=False) == "3<|end_of_sentence|>4<|end_of_sentence|>"
    recipe = tiny_recipe(SFT)
    assert recipe.training(recipe.model, recipe.stages[0]).train.document_mask
    resolved = tomllib.loads(recipe.to_toml())  # which says what is done
    assert resolved["stages"][0]["train"]["document_mask"] and AlignRecipe.model_validate(resolved) == recipe


@pytest.mark.parametrize("messages", [[], [{"role": "user", "content": "1+2="}]], ids=["none", "of the user alone"])
def test_conversations_without_words_of_an_assistant_are_refused(tmp_path, messages):
    run(tiny_recipe(SFT), tmp_path / "base")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    sft = SFT | {"worked": 0, "sources": [str(tmp_path / "chats.jsonl")]}
    with pytest.raises(UserError, match="no conversation has words of an assistant"):
        run(tiny_recipe(sft, base=str(tmp_path / "base"), model=None), tmp_path / "run")


@pytest.mark.parametrize("seed", [2**62, 2**63 - 1])
def test_the_largest_seeds_are_taken(tmp_path, seed):
    run(tiny_recipe(SFT, RL | {"steps": 1, "seed": seed}), tmp_path / "run")
    assert read_metrics(tmp_path / "run")[-1]["stage"] == "rl"


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_the_curves_are_closed_when_a_step_fails(tmp_path, monkeypatch, stage):
    def fails(*_):
        raise RuntimeError("broken")

    closed = []
    monkeypatch.setattr(Metrics, "close", lambda self: closed.append(self))
    monkeypatch.setattr(*{"sft": (Trainer, "step"), "rl": (grpo_module, "collect")}[stage], fails)
    with pytest.raises(RuntimeError, match="broken"):
        run(tiny_recipe(SFT, RL), tmp_path / "run")
    assert len(closed) == {"sft": 1, "rl": 2}[stage]


def test_the_stages_of_r1_in_one_recipe(tmp_path, monkeypatch):
    """Cold start, RL, rejection sampling, SFT from the base on what was kept and more, RL again."""
    begun, true_tune = [], pipeline_module.fine_tune

    def watched(work, *given):
        begun.append(weights_sha256(work.model.state_dict()))
        return true_tune(work, *given)

    monkeypatch.setattr(pipeline_module, "fine_tune", watched)
    everything_is_right = tmp_path / "kind.py"
    everything_is_right.write_text("def one(prompt, completion, answer):\n    return 1.0\n")
    sample = {"kind": "sample", **LIMITS}
    second = {**SFT, "start": "base", "worked": 10, "sampled": False}
    rl = RL | {"steps": 1, "rewards": [{"name": f"{everything_is_right}:one"}, {"name": "length", "weight": 0.5}]}
    pipeline = tiny_recipe(SFT, rl, sample, second, rl)
    assert run(pipeline, tmp_path / "run")["stages_done"] == 5
    assert (tmp_path / "run/stages/3-sample/sampled.jsonl").is_file()
    assert run(pipeline, tmp_path / "run", resume=True)["status"] == "done"  # nothing is left to do
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["reward"] == pytest.approx(1 + 0.5 * rows[-1]["reward_length"])
    assert len(begun) == 2 and begun[0] == begun[1]  # both of the untrained base


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_a_share_of_the_worked_solutions_is_hasty(share):
    pipeline = tiny_recipe(SFT | {"worked": 400, "hasty": share}, tasks=[{"name": "chain_sum", "terms": [4, 4]}])
    work = SimpleNamespace(recipe=pipeline, tasks=lambda own: own or pipeline.tasks)
    first, again = (conversations(work, pipeline.stages[0], []) for _ in range(2))
    assert first == again
    results = [chat[-1].content.count("=") for chat in first]
    assert set(results) <= {1, 3}
    assert abs(results.count(1) / 400 - share) < 0.08 * (0 < share < 1) + 1e-9


def test_rejection_sampling_keeps_only_right_answers(tmp_path, monkeypatch):
    from baleen.align import sampling as module

    true_sample = module.sample

    def sometimes_right(*args, **keys):
        groups = true_sample(*args, **keys)
        for number, group in enumerate(groups):
            right = f"<think>so</think><answer>{group.question.solution}</answer>"
            texts = [right if number % 2 == 0 else "<think>so</think><answer>no</answer>", group.question.solution]
            for answer, text in zip(group.answers, texts, strict=False):
                object.__setattr__(answer, "text", text)
                object.__setattr__(answer, "truncated", False)
        return groups

    monkeypatch.setattr(module, "sample", sometimes_right)
    run(tiny_recipe(SFT, {"kind": "sample", **LIMITS}, {**SFT, "worked": 0, "sampled": True}), tmp_path / "run")
    kept = (tmp_path / "run/stages/2-sample/sampled.jsonl").read_text().splitlines()
    assert len(kept) == 3
    assert all("<think>so</think>" in json.loads(line)["messages"][-1]["content"] for line in kept)


def test_sampling_stopped_between_two_parts_goes_on_there(tmp_path, monkeypatch):
    """SIGINT while a part is sampled: the part is kept, the next stage does not begin, and the answers are those of a
    run that was not stopped."""
    from baleen.align import sampling as module

    monkeypatch.setattr(module, "PART", 2)
    pipeline = tiny_recipe({**SFT, "train": SFT["train"] | {"tokens": 4096}}, {"kind": "sample", **LIMITS})
    monkeypatch.setattr(module, "kept", lambda group, judge, count: sorted(a.text for a in group.answers)[:count])
    run(pipeline, tmp_path / "straight")
    true_sample, asked = module.sample, []

    def interrupted(*args, **keys):
        asked.append(keys["first"])
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return true_sample(*args, **keys)

    monkeypatch.setattr(module, "sample", interrupted)
    assert run(pipeline, tmp_path / "stopped")["status"] == "stopped"
    assert not (tmp_path / "stopped/stages/2-sample/sampled.jsonl").exists()
    assert run(pipeline, tmp_path / "stopped", resume=True)["status"] == "done" and asked == [0, 2, 4]
    kept = [(tmp_path / f"{name}/stages/2-sample/sampled.jsonl").read_bytes() for name in ("straight", "stopped")]
    assert kept[0] == kept[1] != b""


def test_a_stage_interrupted_in_its_last_step_is_the_last(tmp_path, monkeypatch):
    true_step = Trainer.step

    def step(trainer):
        result = true_step(trainer)
        if trainer.done:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(Trainer, "step", step)
    summary = run(tiny_recipe(SFT, RL), tmp_path / "run")
    assert (summary["status"], summary["stages_done"]) == ("stopped", 1)


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        ({**RL, "rewards": [{"name": "acuracy"}]}, "no reward 'acuracy'"),
        ({**RL, "eval_questions": 10**6}, "fewer than 1000000"),
        ({"kind": "sample", **LIMITS, "teacher": "nowhere"}, "nowhere is neither"),
    ],
)
def test_what_a_later_stage_would_stumble_over_is_told_before_anything_runs(tmp_path, stage, fault):
    with pytest.raises(UserError, match=fault):
        run(tiny_recipe(SFT, stage), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_finished_stage_wanted_may_be_gone(tmp_path):
    (tmp_path / "mine.py").write_text("def f(prompt, completion, answer):\n    return len(completion) / 10\n")
    reward = {"rewards": [{"name": f"{tmp_path}/mine.py:f"}]}
    recipe = tiny_recipe(SFT, {**RL, **reward}, {**RL, "steps": 2})
    steps = run(tiny_recipe(SFT, {**RL, **reward}), tmp_path / "probe")["step"]
    assert run(recipe, tmp_path / "run", max_steps=steps)["stages_done"] == 2
    (tmp_path / "mine.py").unlink()
    assert run(recipe, tmp_path / "run", resume=True)["stages_done"] == 3


def test_a_base_in_bf16_learns_in_fp32(tmp_path):
    run(tiny_recipe(SFT), tmp_path / "base")
    loaded = load(tmp_path / "base")
    save_model(loaded.model.bfloat16(), tmp_path / "narrow", tokenizer=loaded.tokenizer)
    rl = {**RL, "lr": 1e-6, "steps": 2}
    run(for_command("rl", tiny_recipe(rl), base=str(tmp_path / "narrow")), tmp_path / "run")
    before, after = (load(tmp_path / name).model.state_dict() for name in ("narrow", "run"))
    changed = sum(int((after[name] != weight.float()).sum()) for name, weight in before.items())
    assert changed > 0.5 * sum(weight.numel() for weight in before.values())


def test_a_question_that_fills_the_context_is_passed_over(tmp_path):
    short, tasks = MODEL | {"max_position_embeddings": 24}, [{"name": "chain_sum", "terms": [2, 14]}]
    few = {**SFT, "tasks": [{"name": "chain_sum", "terms": [2, 2]}]}
    with pytest.raises(UserError, match="longer than model.max_position_embeddings"):
        run(tiny_recipe(few, RL, model=short), tmp_path / "rows")
    few |= {"train": SFT["train"] | {"seq_len": 24, "batch_tokens": 120}}
    rl = {**RL, "tasks": tasks, "eval_questions": 20}
    assert run(tiny_recipe(few, rl, model=short), tmp_path / "run")["status"] == "done"
    rl["tasks"] = [{"name": "chain_sum", "terms": [14, 14]}]
    with pytest.raises(UserError, match="fill the model's context"):
        run(tiny_recipe(few, rl, model=short), tmp_path / "none")


def test_nothing_right_is_told_and_loses_nothing(tmp_path):
    pipeline = tiny_recipe(SFT, {"kind": "sample", **LIMITS}, {**SFT, "worked": 0, "sampled": True})
    with pytest.raises(UserError, match="no sampled answer was right"):
        run(pipeline, tmp_path / "run")
    assert load(tmp_path / "run/stages/1-sft").model


def test_distillation_learns_from_the_teacher_alone(tmp_path, monkeypatch):
    """The teacher's answers, all of them and nothing else, in a network of another width with words of its own."""
    from baleen.align import pipeline, sampling

    run(tiny_recipe(SFT), tmp_path / "teacher")
    samples = {"kind": "sample", **LIMITS}
    student = tiny_recipe(samples, {**SFT, "worked": 0, "sampled": True}, model=MODEL | {"hidden_size": 8})
    with pytest.raises(UserError, match="needs a teacher"):
        for_command("distill", student)
    student = for_command("distill", student, teacher=str(tmp_path / "teacher"))
    true_sample, true_tune, asked, learnt = sampling.sample, pipeline.fine_tune, [], []
    monkeypatch.setattr(sampling, "sample", lambda model, *a, **k: asked.append(model) or true_sample(model, *a, **k))
    monkeypatch.setattr(sampling, "kept", lambda group, judge, count: [answer.text for answer in group.answers][:count])
    monkeypatch.setattr(
        pipeline, "fine_tune", lambda work, stage, chats: learnt.extend(chats) or true_tune(work, stage, chats)
    )
    assert run(student, tmp_path / "student")["stages_done"] == 2
    assert {weights_sha256(model.state_dict()) for model in asked} == {sha(tmp_path / "teacher")}
    rows = (tmp_path / "student/stages/1-sample/sampled.jsonl").read_text().splitlines()
    said = [[turn["content"] for turn in json.loads(row)["messages"]] for row in rows]
    assert said == [[message.content for message in chat] for chat in learnt] and len(said) == LIMITS["questions"]
    assert load(tmp_path / "student").model.config.hidden_size == 8
    ledger = [json.loads(x) for f in (tmp_path / "ledger").glob("student*") for x in f.read_text().splitlines()]
    assert {row["stage"] for row in ledger} == {"distill", "export"}


def test_the_reference_is_the_policy_of_so_many_steps_ago(tmp_path, monkeypatch):
    replaced = []
    true_load = Transformer.load_state_dict

    def seen(self, state, *args, **keys):
        replaced.append(weights_sha256(state))
        return true_load(self, state, *args, **keys)

    rl = RL | {"steps": 5, "reference_every": 2, "eval_every": 0, "checkpoint_every": 0}
    run(tiny_recipe(SFT), tmp_path / "base")
    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "load_state_dict", seen)
        run(tiny_recipe(rl, base=str(tmp_path / "base"), model=None), tmp_path / "run")
    assert replaced[-3:][0] == sha(tmp_path / "base") and len(set(replaced[-3:])) == 3  # at steps 0, 2 and 4


@pytest.mark.parametrize("body", ["raise ValueError('x')", "return float('nan')", "return float('inf')"])
def test_a_reward_that_fails_is_nothing_and_counted_and_the_run_goes_on(tmp_path, body):
    (tmp_path / "mine.py").write_text(f"def f(prompt, completion, answer):\n    {body}\n")
    rl = RL | {"steps": 1, "kl_coef": 0.0, "rewards": [{"name": f"{tmp_path}/mine.py:f"}]}
    run(tiny_recipe(SFT, rl), tmp_path / "run")
    row = read_metrics(tmp_path / "run")[-1]
    assert row["reward"] == 0 and row["reward_failures"] == 12 and row["degenerate_groups"] == 1
    # groups without variance teach nothing, and momentum is not let to move what it never learnt
    assert sha(tmp_path / "run") == sha(tmp_path / "run/stages/1-sft")


def test_truncated_answers_can_be_left_out_of_learning(tmp_path):
    (tmp_path / "mine.py").write_text("def f(prompt, completion, answer):\n    return sum(completion.encode()) % 5.0\n")
    rewards = [{"name": f"{tmp_path}/mine.py:f"}]
    rl = RL | {"steps": 1, "kl_coef": 0.0, "sampling": {"max_tokens": 1}, "rewards": rewards}
    for left_out in (False, True):
        run(tiny_recipe(SFT, rl | {"mask_truncated": left_out}), tmp_path / f"run{left_out}")
        row = read_metrics(tmp_path / f"run{left_out}")[-1]
        assert row["truncated"] == 1 and row["degenerate_groups"] < 1
        learnt = sha(tmp_path / f"run{left_out}") != sha(tmp_path / f"run{left_out}/stages/1-sft")
        assert learnt is not left_out


@pytest.mark.parametrize("speed", [0.0, 0.01])
def test_the_routers_bias_is_frozen_or_moves_by_choice(tmp_path, speed):
    run(tiny_recipe(SFT, RL | {"steps": 1, "bias_update_speed": speed}), tmp_path / "run")
    before, after = (load(tmp_path / f"run/stages/{n}").model.gates for n in ("1-sft", "2-rl"))
    moved = [not torch.equal(a.e_score_correction_bias, b.e_score_correction_bias)
             for a, b in zip(before, after, strict=True)]  # fmt: skip
    assert any(moved) is bool(speed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "give either base"),
        ({"tasks": ()}, "has no tasks"),
        ({"stages": [SFT | {"worked": 0}]}, "nothing to learn from"),
        ({"stages": [SFT | {"sampled": True}]}, "no sample stage comes before"),
        ({"stages": [SFT | {"hasty": 0.5, "worked": 0, "sources": ["chats.jsonl"]}]}, "share of the worked solutions"),
        ({"stages": [SFT | {"eval_samples": 4}]}, "every train.eval_every steps"),
        ({"stages": [SFT | {"train": SFT["train"] | {"document_mask": False}}]}, "each conversation by itself"),
        ({"tasks": [{"name": "chain_sum"}, GYM]}, "stage 1 .sft. wants worked solutions"),
        ({"stages": [SFT | {"tasks": [GYM]}]}, "stage 1 .sft. wants worked solutions"),
        ({"stages": [RL | {"sampling": {"top_p": 0.9}}]}, "sampling.top_p is 0.9"),
        ({"stages": [RL | {"minibatches": 5}]}, "does not divide"),
        ({"stages": [RL | {"overlong_buffer": 8}]}, "must be below sampling.max_tokens"),
        ({"stages": [RL | {"overlong_buffer": 4, "mask_truncated": True}]}, "choose one"),
        ({"stages": [RL | {"group_size": 1}]}, "greater than or equal to 2"),
    ],
)
def test_recipes_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_recipe(SFT, RL, **changes) if "stages" not in changes else tiny_recipe(*changes["stages"])


def test_a_conversation_longer_than_a_row_is_named(tmp_path):
    short = SFT | {"train": SFT["train"] | {"seq_len": 8}}
    with pytest.raises(UserError, match="raise train.seq_len"):
        run(tiny_recipe(short), tmp_path / "run")
    fewer = SFT | {"worked": 30}  # and so another tokenizer
    assert run(tiny_recipe(fewer), tmp_path / "run")["status"] == "done"  # the cure, in the same directory
    run(tiny_recipe(fewer), tmp_path / "straight")
    assert sha(tmp_path / "run") == sha(tmp_path / "straight")
    with pytest.raises(UserError, match="belongs to another recipe"):
        run(tiny_recipe(SFT), tmp_path / "run")


def test_a_full_disk_is_told_when_it_stops(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise NotSaved("no space left")

    monkeypatch.setattr(checkpoint, "save", full)
    align(tiny_recipe(SFT), tmp_path / "run", max_steps=2)
    assert "stopped and NOT saved; step 0 is the last that is; go on with --resume" in capsys.readouterr().err


def test_the_settings_that_a_base_answers_by_go_along(tmp_path):
    run(tiny_recipe(SFT), tmp_path / "base")
    file = tmp_path / "base/model/generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_sample": False}))
    run(tiny_recipe(SFT, RL | {"steps": 1}, base=str(tmp_path / "base"), model=None), tmp_path / "run")
    for name in ("stages/1-sft/model", "stages/2-rl/model", "model"):
        assert json.loads((tmp_path / f"run/{name}/generation_config.json").read_text())["do_sample"] is False


def test_commands_refuse_recipes_of_other_stages():
    with pytest.raises(UserError, match="has no rl stage, only sft"):
        for_command("rl", tiny_recipe(SFT))


@pytest.mark.slow
def test_a_reward_for_length_alone_is_hacked_and_the_report_shows_it(tmp_path):
    """Paid by the character, the network learns to ramble; the page says that accuracy did not follow."""
    pytest.importorskip("plotly")
    rl = RL | {
        "steps": 24, "questions": 4, "group_size": 8, "minibatches": 1, "lr": 1e-2, "kl_coef": 0.0,
        "eval_every": 8, "sampling": {"max_tokens": 24}, "rewards": [{"name": "length"}],
    }  # fmt: skip
    run(tiny_recipe(SFT, rl), tmp_path / "run")
    rows = [row for row in read_metrics(tmp_path / "run") if row["stage"] == "rl"]
    assert rows[-1]["reward"] > 1.3 * rows[0]["reward"]
    assert rows[-1]["heldout_accuracy"] == 0
    page = write_report(tmp_path / "run").read_text()
    assert "earned in some other way" in page
    assert "Length of answers" in page


def test_format_without_an_answer_is_paid_but_not_taken_for_accuracy():
    rows = [
        {"step": n, "reward": n / 10, "reward_format": n / 10, "accuracy": 0.0, "heldout_accuracy": 0.0}
        for n in range(1, 11)
    ]
    assert "the share of right answers did not" in hacked_reward(rows)[0]
    honest = [row | {"accuracy": row["reward"], "heldout_accuracy": row["reward"]} for row in rows]
    assert hacked_reward(honest) == []
    assert hacked_reward(rows[:1]) == []
    shorter = [row | {"reward_overlong": row["reward"] - 1} for row in rows]
    assert hacked_reward(shorter) == []


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        run(tiny_recipe(SFT), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_rl_command_stops_and_resumes(tmp_path):
    (tmp_path / "tiny.toml").write_text(tiny_recipe(SFT, RL).to_toml())
    command = ["rl", str(tmp_path / "tiny.toml"), "--run", str(tmp_path / "run"), "--json"]
    for more, status in ((["--max-steps", "2"], "stopped"), (["--resume"], "done")):
        done = CliRunner().invoke(app, [*command, *more])
        assert done.exit_code == 0 and json.loads(done.stdout)["status"] == status, done.output
