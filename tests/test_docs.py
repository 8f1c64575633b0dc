"""Every place that the documentation names exists."""

import ast
import re
from pathlib import Path

import pytest

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
