"""Every recipe that ships loads; what a run writes down as its recipe is the recipe; what is not one is refused."""

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from baleen.align.recipe import AlignRecipe, load_align_recipe
from baleen.config import ModelConfig, UserError
from baleen.recipe import Recipe, cost_of, load_recipe, read_recipe, recipe_lines, recipe_names, run_of
from baleen.train.continued_recipe import ContinuedRecipe

CONTINUED = ("extend-1k", "extend-4k", "smollm2-heal", "smollm2-mtp")
STAGED = ("distill", "r1", "r1-zero", "reason", "smollm2-reason")
SHIPPED = [name for name in recipe_names() if name not in CONTINUED + STAGED]


def written_and_read(recipe: Recipe, tmp_path) -> Recipe:
    file = tmp_path / "recipe.toml"
    file.write_text(recipe.to_toml(), encoding="utf-8")
    return load_recipe(file)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_and_go_round(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert written_and_read(recipe, tmp_path) == recipe


def test_a_key_that_is_off_is_not_told(tmp_path):
    """The evidence's rows are known by the text of their recipes."""
    assert "mla_scale_lora" not in load_recipe("cpu-s").to_toml()
    recipe = load_recipe("cpu-s", ["model.mla_scale_lora=true"])
    assert recipe.model.mla_scale_lora and written_and_read(recipe, tmp_path) == recipe


@pytest.mark.parametrize("name", CONTINUED)
def test_recipes_with_a_base_are_for_only(name, tmp_path):
    recipe = read_recipe(ContinuedRecipe, name)
    file = tmp_path / "recipe.toml"
    file.write_text(recipe.to_toml(), encoding="utf-8")
    assert read_recipe(ContinuedRecipe, file) == recipe and cost_of(tmp_path) == recipe.cost
    with pytest.raises(UserError, match="--only"):
        load_recipe(name)


def test_a_runs_models_are_of_the_run(tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "other").mkdir()
    assert run_of(run) is run_of(run / "model") is None
    (run / "recipe.toml").write_text("[cost]\nproject = 'sea'\n")
    for path in (run, run / "model", run / "model-ema"):
        assert run_of(path) == run and cost_of(path).project == "sea"
    assert run_of(run / "other") is run_of(tmp_path) is run_of(tmp_path / "smollm2") is None
    monkeypatch.chdir(run / "model")
    assert run_of(Path()) == run


@pytest.mark.parametrize("key", ["stages.9.lr", "stages.9.nonsense", "stages.0", "stages.foo.bar.baz", "stages.-1.lr"])
def test_a_stage_that_is_not_there_is_refused(key):
    with pytest.raises(UserError, match=r"--set 'stages"):
        load_align_recipe("r1-zero", [f"{key}=7"])


@pytest.mark.parametrize("name", STAGED)
def test_recipes_of_stages_go_round_and_are_not_for_train(name, tmp_path):
    recipe = load_align_recipe(name)
    file = tmp_path / "recipe.toml"
    file.write_text(recipe.to_toml(), encoding="utf-8")
    assert read_recipe(AlignRecipe, file) == recipe and cost_of(tmp_path) == recipe.cost
    assert load_align_recipe(name, ["stages.0.tasks=[]"]).stages[0].tasks == ()
    with pytest.raises(UserError, match="recipe of stages: run it with"):
        load_recipe(name)


@pytest.mark.parametrize("kind", [AlignRecipe, ContinuedRecipe])
@pytest.mark.parametrize("name", SHIPPED)
def test_recipes_of_a_new_model_are_for_train(name, kind):
    with pytest.raises(UserError, match=f"^recipe {name} is a recipe for `baleen train` without --only"):
        read_recipe(kind, name)


def test_a_recipe_is_told_by_what_it_holds_before_any_override():
    with pytest.raises(UserError, match="unknown key 'stages'"):
        load_recipe("cpu-s", ["stages.0.lr=1"])
    with pytest.raises(UserError, match="run it with `baleen train`, and --only mtp"):
        load_align_recipe("smollm2-mtp")


def test_each_recipe_says_in_a_line_what_it_is_for():
    lines = recipe_lines()
    assert list(lines) == recipe_names()
    assert lines["cpu-m"] == "194M parameters, 30M of them active: an evening on two cores"
    assert all(20 < len(line) < 120 and "[" not in line for line in lines.values())


def test_there_are_recipes():
    assert {"cpu-s", "cpu-m", "v3-671b"} <= set(SHIPPED)


def test_v3_is_v3():
    assert load_recipe("v3-671b").model == ModelConfig()


YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    "model",
    [
        {"q_lora_rank": None},
        {"rope_scaling": YARN},
        {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        {"rope_scaling": {**YARN, "mscale": 0.707}},
        {"rms_norm_eps": 1e-300, "rope_theta": 1e29, "initializer_range": 0.1 + 0.2},
    ],
)
def test_null_and_floats_go_round(model, tmp_path):
    recipe = Recipe(model=ModelConfig.model_validate(model), train=load_recipe("v3-671b").train)
    assert written_and_read(recipe, tmp_path) == recipe


def test_strings_and_knots_go_round(tmp_path):
    recipe = load_recipe("cpu-s").model_dump()
    recipe["name"] = 'a "quoted" näme\nof two lines'
    recipe["data"]["sources"] = ("C:\\texts", "package:chitchat", "a'b")
    recipe["schedule"]["lr"] = ((0, 0.0), ("2.5%", 1.0), (700, 1.0), ("100%", 0.1, "cosine"))
    recipe = Recipe.model_validate(recipe)
    assert written_and_read(recipe, tmp_path) == recipe


def test_overrides_reach_their_keys():
    recipe = load_recipe("cpu-s", ["train.lr=0.5", "model.q_lora_rank=0", 'data.sources=["x"]', "cost.project=whales"])
    assert (recipe.train.lr, recipe.model.q_lora_rank, recipe.data.sources) == (0.5, None, ("x",))
    assert recipe.cost.project == "whales"


@pytest.mark.parametrize("name", ["no-such", "no-such.toml", ""])
def test_an_unknown_recipe_lists_the_known(name):
    with pytest.raises(UserError, match="cpu-m, cpu-s"):
        load_recipe(name)


@pytest.mark.parametrize("content", [b"[train", b"\xff\xfe\x00", b"x = " + b"1" * 5000])
def test_a_file_that_is_not_toml(tmp_path, content):
    file = tmp_path / "r.toml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"r\.toml is not valid TOML"):
        load_recipe(file)


KEYS = [f"{name}.{key}" for name in ("model", "data", "train", "schedule", "cost") for key in ("lr", "seed", "x")]
for section, field in Recipe.model_fields.items():
    KEYS += [f"{section}.{key}" for key in getattr(field.annotation, "model_fields", {})]
VALUES = st.one_of(
    st.integers().map(str), st.floats().map(str), st.text(max_size=12),
    st.sampled_from(["0", "[]", "{}", '[["50%", 1.0]]', "[[0, 1.0], [5]]", "inf", "1979-05-27", "9" * 5000, "[" * 50]),
)  # fmt: skip


@settings(max_examples=1000, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(KEYS) | st.text(max_size=8), VALUES), min_size=1, max_size=3))
@example([("train.seq_len", "1")])
@example([("model", "3"), ("model.vocab_size", "5")])
@example([("schedule.lr", '[["5", 1.0]]')])
def test_any_override_makes_a_recipe_or_is_refused(tmp_path_factory, overrides):
    try:
        recipe = load_recipe("cpu-s", [f"{key}={value}" for key, value in overrides])
    except UserError as error:
        assert re.fullmatch(r"\S.+", str(error))  # one line
    else:
        file = tmp_path_factory.getbasetemp() / "recipe.toml"
        file.write_text(recipe.to_toml(), encoding="utf-8", newline="")
        assert load_recipe(file) == recipe


@pytest.mark.parametrize(
    "override, nearest",
    [
        ("train.weight_decy=1", "'weight_decay'"),
        ("train.token=5", "'tokens'"),
        ("model.n_expert_per_tok=5", "'num_experts_per_tok'"),
        ("model.rope_scaling.factr=2", "'factor'"),
        ("modle.vocab_size=5", "'model'"),
        ("data.source=[]", "'sources'"),
        ("schedule.bias_speed=[]", "'bias_update_speed'"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(override, nearest):
    with pytest.raises(UserError, match="unknown key") as caught:
        load_recipe("cpu-s", [override])
    assert str(caught.value).endswith(f"did you mean {nearest}?")


@pytest.mark.parametrize(
    "override, said",
    [
        ("foo=1", "unknown key 'foo'; there are name, model, data, train, schedule, parallel, cost"),
        ("cost.zzz=1", "unknown key 'cost.zzz'; there are project, purpose, usd_per_device_hour"),
        ("train.zzz=1", "unknown key 'train.zzz'"),  # too many to be listed
    ],
)
def test_an_unknown_key_that_nothing_is_near(override, said):
    with pytest.raises(UserError) as caught:
        load_recipe("cpu-s", [override])
    assert str(caught.value) == f"recipe cpu-s: {said}"


@pytest.mark.parametrize(
    "override, said",
    [
        ("stages.1.lrr=1", "unknown key 'stages.1.lrr'; did you mean 'lr'?"),
        ("stages.1.hasti=1", "unknown key 'stages.1.hasti'"),  # of an sft stage
        ("stages.0.hasti=1", "unknown key 'stages.0.hasti'; did you mean 'hasty'?"),
        ("stages.1.lr=-1", "stages.1.lr: Input should be greater than 0"),
        ("stages.1.sampling.topp=1", "unknown key 'stages.1.sampling.topp'; did you mean 'top_p'?"),
    ],
)
def test_a_stage_knows_the_keys_of_its_own_kind(override, said):
    assert [stage.kind for stage in load_align_recipe("reason").stages[:2]] == ["sft", "rl"]
    with pytest.raises(UserError) as caught:
        load_align_recipe("reason", [override])
    assert str(caught.value) == f"recipe reason: {said}"


def test_a_union_without_tags_knows_its_models_by_name():
    override = "context.rope_scaling={factr = 2.0, factor = 2.0, original_max_position_embeddings = 64}"
    with pytest.raises(UserError, match=r"unknown key 'context.rope_scaling.factr'; did you mean 'factor'"):
        read_recipe(ContinuedRecipe, "extend-1k", [override])


def test_a_misspelt_key_is_named_before_the_one_it_leaves_out(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text(load_recipe("cpu-s").to_toml().replace("tokens = 2000000", "tokns = 2000000"))
    with pytest.raises(UserError, match=r"unknown key 'train.tokns'; did you mean 'tokens'"):
        load_recipe(file)


@pytest.mark.parametrize(
    "override, said",
    [
        ("train.seq_len=2048", "longer than model.max_position_embeddings (1024)"),
        ("train.batch_tokens=1000", "take 1024"),
        ("train.seq_len=1", "at least 2 tokens"),
        ("train.lr=-1", "train.lr"),
        ("train.optimizer=sgd", "train.optimizer"),
        ("train.lr", "write section.key=value"),
        ("train.lr.x=1", "lr is a value, not a section"),
        ("schedule.lr=[]", "needs at least one knot"),
    ],
)
def test_impossible_recipes_say_why(override, said):
    with pytest.raises(UserError) as caught:
        load_recipe("cpu-s", [override])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_sources_replace_the_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("chitchat", (), ["a", "package:b"]).data.sources == (str(tmp_path / "a"), "package:b")
    assert load_recipe("chitchat", (), ["a"]).data.format == "text"
    assert load_recipe("chitchat", ["data.format=chat"], ["a"]).data.format == "chat"
    assert load_recipe("chitchat", (), ["package:chitchat-dataset"]) == load_recipe("chitchat")


@pytest.mark.parametrize(
    "fault", ["train.seed=-1", f"train.seed={2**63}", "train.betas=[0.9,1.0]", "schedule.lr=[[0,-1.0]]"]
)
def test_what_would_fail_later_is_refused_at_once(fault):
    with pytest.raises(UserError, match=fault.partition("=")[0].replace(".", r"\.")):
        load_recipe("cpu-s", [fault])
