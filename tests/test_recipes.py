"""Every recipe that ships loads, and what a run writes down as its recipe is the recipe."""

import pytest

from baleen.align.recipe import AlignRecipe, load_align_recipe
from baleen.config import ModelConfig, Recipe, UserError, load_recipe, read_recipe, recipe_names
from baleen.train.continued_recipe import ContinuedRecipe

CONTINUED = ("extend-1k", "extend-4k", "smollm2-heal", "smollm2-mtp")
STAGED = ("distill", "r1", "r1-zero", "reason")
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


@pytest.mark.parametrize("name", CONTINUED)
def test_recipes_with_a_base_are_for_only(name, tmp_path):
    recipe = read_recipe(ContinuedRecipe, name)
    file = tmp_path / "recipe.toml"
    file.write_text(recipe.to_toml(), encoding="utf-8")
    assert read_recipe(ContinuedRecipe, file) == recipe
    with pytest.raises(UserError, match="--only"):
        load_recipe(name)


@pytest.mark.parametrize("name", STAGED)
def test_recipes_of_stages_go_round_and_are_not_for_train(name, tmp_path):
    recipe = load_align_recipe(name)
    file = tmp_path / "recipe.toml"
    file.write_text(recipe.to_toml(), encoding="utf-8")
    assert read_recipe(AlignRecipe, file) == recipe
    assert load_align_recipe(name, ["stages.0.tasks=[]"]).stages[0].tasks == ()
    with pytest.raises(UserError, match="recipe of stages: run it with"):
        load_recipe(name)


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
        {"rms_norm_eps": 1e-300, "rope_theta": 1e30, "initializer_range": 0.1 + 0.2},
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
