"""The conversations' text cut into short documents, so that prefix, suffix and middle of one stand in one row."""

from __future__ import annotations

import json
from pathlib import Path

from baleen.data.corpus import read_documents

CHARS = 600  # of a document: some 160 tokens


def write_passages(file: Path) -> None:
    """One JSON object a line; what is left of a conversation beyond whole passages is left out."""
    lines = []
    for document in read_documents(["package:chitchat-dataset"], "chat"):
        text = document.text
        lines += [json.dumps({"text": text[i : i + CHARS]}) for i in range(0, len(text) - CHARS + 1, CHARS)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
