"""Every place that the documentation names exists."""

import ast
import re
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from baleen.cli import app
from baleen.recipe import read_recipe
from baleen.train.continued_recipe import ContinuedRecipe

ROOT = Path(__file__).parents[1]
PLACE = re.compile(r"`((?:tests/)?[a-z_]+(?:/[a-z_0-9]+)*\.py):([A-Za-z_.0-9]+)`")
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md"])


def names_of(file):
    """Functions and classes of a file, methods as Class.method."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_places_exist(page):
    for path, name in PLACE.findall(page.read_text()):
        file = ROOT / path if path.startswith("tests/") else ROOT / "src/baleen" / path
        assert file.is_file(), f"{page.name} names {path}"
        assert name in names_of(file), f"{page.name} names {path}:{name}"


def test_the_life_of_a_token_names_places():
    assert len(PLACE.findall((ROOT / "docs/life-of-a-token.md").read_text())) > 20


def test_the_paper_map_leads_from_every_equation():
    text = (ROOT / "docs/paper-map.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    named = " ".join(row[1] for row in rows)
    covered = set()
    for first, last in re.findall(r"\b(\d+)(?:-(\d+))?\b", named):
        covered |= set(range(int(first), int(last or first) + 1))
    assert set(range(1, 26)) <= covered
    assert len(PLACE.findall(text)) > 40


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def commands_of(text):
    """What is written as `baleen ...`, or as a line of code that begins so, without comments and brackets."""
    written = re.findall(r"`(baleen [^`]+)`|^(?: {4}|\$ )(baleen .+)", text, re.M)
    for words in (inline or line for inline, line in written):
        yield re.sub(r"\s#.*|[\[\]]|\.\.\.", "", words).split()


def refusal(command, words):
    """The kind of error with which the command refuses these words; empty for none."""
    try:
        command.make_context("baleen", list(words))
    except Exception as error:  # of the click that typer brings along
        return type(error).__name__
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_with_their_options(page):
    """Placeholders such as N are no numbers: what is asked is that there is such a command, option and place."""
    for _, *words in commands_of(page.read_text()):
        command, path = typer.main.get_command(app), ["baleen"]
        while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
            path.append(words.pop(0))
            command = command.commands.get(path[-1])
            assert command is not None, f"{page.name}: {' '.join(path)}"
        if not isinstance(command, TyperGroup):
            fault = refusal(command, words)
            assert fault in ("", "BadParameter", "MissingParameter", "BadOptionUsage"), f"{page.name}: {path} {words}"


def test_the_recipe_that_the_docs_show_is_one(tmp_path):
    (shown,) = re.findall(r"```toml\n(.+?)```", (ROOT / "docs/recipes.md").read_text(), re.S)
    (tmp_path / "answers.toml").write_text(shown)
    recipe = read_recipe(ContinuedRecipe, tmp_path / "answers.toml")
    assert (recipe.base, recipe.data.format) == ("runs/mine", "chat")


def test_a_command_that_is_not_there_is_seen():
    (words,) = commands_of("Try `baleen cost [--svg FILE]\n...` now")
    assert words == ["baleen", "cost", "--svg", "FILE"]
    assert refusal(typer.main.get_command(app).commands["recipes"], ["--nothing"]) == "NoSuchOption"
