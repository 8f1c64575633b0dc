"""Text that installed Python packages carry, read without running any of their code."""

from __future__ import annotations

import ast
import json
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from baleen.config import UserError
from baleen.data.document import Document, Message, NotText, decode_text

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
EMAIL = re.compile(r"[\w.+-]@[\w-]+\.\w")
WORD = re.compile(r"[a-z]+")
# fmt: off
PROFANE = frozenset({
    "fuck", "fucks", "fucked", "fucker", "fuckers", "fucking", "motherfucker", "motherfuckers", "motherfucking", "shit",
    "shits", "shitty", "bullshit", "bitch", "bitches", "bitchy", "cunt", "cunts", "nigger", "niggers", "faggot",
    "faggots", "whore", "whores", "slut", "sluts", "asshole", "assholes", "porn", "pornography", "pornographic",
    "retard", "retards", "retarded",
})
# fmt: on


def read_package(name: str, counts: Counter[str]) -> Iterator[Document]:
    """The documents of `package:NAME`.

    chitchat-dataset: its conversations; python-docs: the language reference in `pydoc_data`; stdlib: the standard
    library's sources; any other distribution: its .txt, .md, .rst and .py files. Raises UserError if not installed.
    """
    files = package_files(name)
    if name == "chitchat-dataset":
        yield from _conversations(files[0], counts)
    elif name == "python-docs":
        yield from _topics(files[0])
    else:
        for path in files:
            try:
                text = decode_text(path.read_bytes(), str(path))
            except NotText as fault:
                counts[fault.count] += 1
                continue
            if not text.strip():
                counts["files_empty"] += 1
                continue
            yield Document(text, str(path))
            counts["files_read"] += 1


def package_files(name: str) -> list[Path]:
    """The files that `read_package` reads, sorted by path."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    if not name:
        raise UserError("package: names no package: write package:NAME")
    if name == "python-docs":
        topics = stdlib / "pydoc_data" / "topics.py"
        if not topics.is_file():
            raise UserError(f"package:python-docs reads {topics}, which this Python lacks: install all of its library")
        return [topics]
    if name == "stdlib":
        roots = [stdlib / f"{module}.py" for module in sys.stdlib_module_names]
        folders = [stdlib / module for module in sys.stdlib_module_names if (stdlib / module).is_dir()]
        return sorted([p for p in roots if p.is_file()] + [p for folder in folders for p in folder.rglob("*.py")])
    try:
        files = [Path(str(f.locate())) for f in metadata.files(name) or ()]
    except metadata.PackageNotFoundError:
        install = "'baleen-lm[demo]'" if name == "chitchat-dataset" else name
        raise UserError(f"package:{name} is not installed: pip install {install}") from None
    if name == "chitchat-dataset":
        found = [f for f in files if f.name == "dataset.json" and f.is_file()]
        if not found:
            raise UserError("package:chitchat-dataset has no dataset.json: pip install --force-reinstall it")
        return found
    return sorted(f for f in files if f.suffix in TEXT_SUFFIXES and f.is_file())


def _conversations(path: Path, counts: Counter[str]) -> Iterator[Document]:
    """Two-person conversations; who speaks first is the user. One sender's consecutive lines are one turn."""
    for key, conversation in json.loads(path.read_text(encoding="utf-8")).items():
        turns: list[tuple[str, list[str]]] = []
        for line in (line for group in conversation["messages"] for line in group):
            text = line["text"].strip()
            if not PROFANE.isdisjoint(WORD.findall(text.lower())):
                counts["lines_profane"] += 1
            elif EMAIL.search(text):
                counts["lines_with_email"] += 1
            elif not text:
                continue
            elif turns and turns[-1][0] == line["sender"]:
                turns[-1][1].append(text)
            else:
                turns.append((line["sender"], [text]))
        if len({sender for sender, _ in turns}) != 2:
            counts["conversations_not_of_two"] += 1
            continue
        roles = ("user", "assistant")
        messages = (Message(roles[i % 2], "\n".join(lines)) for i, (_, lines) in enumerate(turns))
        yield Document.of_messages(messages, f"package:chitchat-dataset:{key}")


def _topics(path: Path) -> Iterator[Document]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            for topic, text in ast.literal_eval(statement.value).items():
                yield Document(text, f"package:python-docs:{topic}")
