"""CONTRIBUTING's table of who may import whom, held against every import statement in the package."""

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import baleen

ROOT = Path(baleen.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

INFER = {"config", "recipe", "model", "data", "cost", "interop"}
TRAIN = INFER | {"infer", "eval", "parallel"}
ALLOWED = {
    "config": set(),
    "recipe": {"config"},
    "recipes": set(),
    "model": {"config"},
    "data": {"config", "recipe"},
    "cost": {"config", "recipe"},
    "interop": {"config", "model", "data", "cost"},
    "parallel": {"config", "recipe", "model", "cost"},
    "infer": INFER,
    "eval": INFER | {"infer"},
    "train": TRAIN,
    "align": TRAIN | {"train"},
    "serve": INFER | {"infer"},
}
ROOMS = set(ALLOWED)
# At the top of the house: they see every room, lazily.
COMMANDS = {"__main__", "demo"} | {path.stem for path in ROOT.glob("cli*.py")}
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}


def parts_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def room_of(path: Path) -> str:
    return (parts_of(path) or ("baleen",))[0]


def imports_of(tree: ast.AST, path: Path):
    """(dotted module, the node) of every import below `tree`; `from baleen import x` counts as baleen.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # relative
                package = ("baleen", *parts_of(path))
                package = package if path.name == "__init__.py" else package[:-1]
                base = package[: len(package) - node.level + 1]
                module = ".".join((*base, module) if module else base)
            if module.split(".")[0] == "baleen":
                for alias in node.names:
                    joined = ROOT.joinpath(*module.split(".")[1:], alias.name)
                    is_module = joined.is_dir() or joined.with_suffix(".py").is_file()
                    yield (f"{module}.{alias.name}" if is_module else module), node
            else:
                yield module, node


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def our_imports(path: Path) -> set[str]:
    return {name for name, _ in imports_of(parsed(path), path) if name.split(".")[0] == "baleen"}


def at_import_time(tree: ast.Module):
    """The statements that run when the module is imported: not function bodies, not `if TYPE_CHECKING`."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        yield node
        waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.excepthandler)]


def imported_at_once(path: Path) -> set[str]:
    simple = (node for node in at_import_time(parsed(path)) if isinstance(node, ast.Import | ast.ImportFrom))
    return {name for node in simple for name, _ in imports_of(node, path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    room = room_of(path)
    rooms = {(name.split(".") + [""])[1] for name in our_imports(path)} - {""}
    if room in COMMANDS:
        assert rooms <= ROOMS | COMMANDS
        return
    assert room in ROOMS | {"baleen"}, f"{room} is a room that nobody knows"
    assert rooms - {room} <= ALLOWED.get(room, set()), f"{path.relative_to(ROOT)} imports {sorted(rooms - {room})}"


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in COMMANDS], ids=lambda path: path.name)
def test_commands_see_the_rooms_lazily(path):
    if path.stem == "demo":  # itself imported only when it is called
        return
    ours = {name for name in imported_at_once(path) if name.split(".")[0] == "baleen"}
    assert all(re.fullmatch(r"baleen(\.cli\w*(\.\w+)*)?", name) for name in ours), sorted(ours)


def test_modules_make_no_circle():
    modules = {".".join(("baleen", *parts_of(path))): path for path in FILES}
    graph = {name: imported_at_once(path) & set(modules) - {name} for name, path in modules.items()}
    while graph:
        leaves = {name for name, below in graph.items() if not below & set(graph)}
        assert leaves, f"these import each other in a circle: {sorted(graph)}"
        graph = {name: below for name, below in graph.items() if name not in leaves}


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "model"], ids=lambda path: path.name)
def test_the_model_knows_nothing_of_processes(path):
    tree = parsed(path)
    assert not [name for name, _ in imports_of(tree, path) if name.startswith("torch.distributed")]
    assert "torch.distributed" not in {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "torch"
        for alias in node.names
        if alias.name == "distributed"
    ]


def test_vocabulary_and_cost_know_no_torch():
    checked = 0
    for path in FILES:
        if room_of(path) in ("config", "recipe", "cost"):
            checked += 1
            tree = parsed(path)
            torch = [name for name, _ in imports_of(tree, path) if name.split(".")[0] in ("torch", "transformers")]
            assert not torch, f"{path.relative_to(ROOT)} imports {torch}"
    assert checked > 10


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_is_loaded(path):
    tree = parsed(path)
    assert not [name for name, _ in imports_of(tree, path) if name.split(".")[0] in PICKLES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "torch.jit.load", "pd.read_pickle", "pandas.read_pickle")
            assert not any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            assert "load" not in {alias.name for alias in node.names}


def test_help_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", "-m", "baleen", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "Usage" in result.stdout
    loaded = {line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert {"baleen.cli", "typer"} <= loaded  # else the list was not read
    heavy = {name.split(".")[0] for name in loaded} & {"torch", "numpy", "pydantic", "transformers", "plotly", "pandas"}
    assert not heavy


@pytest.mark.slow
def test_help_is_there_at_once():
    """The one promise that is made in seconds: best of five, for the machine may be busy."""

    def seconds():
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "baleen", "--help"], capture_output=True, timeout=120, check=True)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) < 0.4
