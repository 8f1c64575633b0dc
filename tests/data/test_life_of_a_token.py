import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def names(path):
    """Every function, class and Class.method of a module."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef))


def test_every_place_it_names_is_there():
    places = re.findall(r"`([\w/]+\.py):([\w.]+)`", (ROOT / "docs" / "life-of-a-token.md").read_text())
    assert len(places) > 20
    for path, name in places:
        assert name in names(ROOT / "src" / "baleen" / path), f"{path}:{name}"
