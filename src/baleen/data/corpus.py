"""Documents from files, folders and installed packages."""

from __future__ import annotations

import errno
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from baleen.config import UserError
from baleen.data.document import Document, Message, NotText, decode_text
from baleen.data.packages import package_files, read_package

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
PACKED_SUFFIXES = (".gz", ".zst")
ROLES = ("system", "user", "assistant")
# ShareGPT's names of the roles, under the column `conversations`.
FOREIGN_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def read_documents(sources: Iterable[str], format: str, counts: Counter[str] | None = None) -> Iterator[Document]:
    """Every document of every source, in a fixed order.

    A source is a file (.txt, .md, .jsonl, .parquet, each also .gz or .zst), a folder (all of those below it, sorted by
    path) or `package:NAME`. Text files are one document each; a row of jsonl or parquet has the key `text`, or
    `messages` [{role, content}], or `conversations` [{from, value}]; where it has both, `format` says which counts.

    A file that was named and is empty or binary is an error. Inside a folder such files are passed over, and so are
    those of other kinds; `counts` says how many ("files_read", "files_binary", "files_empty", "files_other").
    Raises UserError for a missing source, a broken row, or, with format "chat", a document that is no conversation.
    """
    counts = Counter() if counts is None else counts
    sources = tuple(sources)
    if not sources:
        raise UserError("no text to read: name files, folders or package:NAME in data.sources, or with --data")
    for source in sources:
        if source.startswith("package:"):
            documents = read_package(source.removeprefix("package:"), counts)
        else:
            documents = (d for path, named in _files(source, counts) for d in _read_file(path, named, format, counts))
        found = False
        for document in documents:
            if format == "chat" and document.messages is None:
                raise UserError(
                    f"{document.source} is plain text, but data.format is 'chat': give jsonl or parquet with "
                    "messages=[{role, content}], or set data.format to 'text'"
                )
            found = True
            yield document
        if not found:
            raise UserError(f"{source} holds no text: Baleen reads {', '.join(SUFFIXES)}, each also .gz or .zst")


def source_files(source: str) -> list[Path]:
    """The files behind a source, sorted by path: what a cache must watch. Raises UserError if there is no source."""
    if source.startswith("package:"):
        return package_files(source.removeprefix("package:"))
    return [path for path, _ in _files(source, Counter())]


def _files(source: str, counts: Counter[str]) -> Iterator[tuple[Path, bool]]:
    """(path, whether the user named this very file)."""
    if not source:
        raise UserError("a source of text is empty: name a file or a folder ('.' for this one), or write package:NAME")
    root = Path(source).expanduser()
    if root.is_file():
        if _kind(root) is None:
            raise UserError(f"{root}: Baleen reads {', '.join(SUFFIXES)}, each also .gz or .zst")
        yield root, True
    elif root.is_dir():
        for path in sorted(root.rglob("*"), key=lambda p: p.as_posix()):
            inside = path.relative_to(root)  # the root itself was asked for, wherever it lies
            hidden = any(part.startswith(".") for part in inside.parts)
            if hidden or not path.is_file() or any(_is_ours(root / folder) for folder in inside.parents[:-1]):
                continue
            if _kind(path) is None:
                counts["files_other"] += 1
            else:
                yield path, False
    else:
        raise UserError(f"{source} is neither a file nor a folder: name one, or write package:NAME")


def _is_ours(folder: Path) -> bool:
    """A run directory or a ledger: what Baleen writes below a folder of text is not text to learn from."""
    return (folder / "run_id").is_file() or (folder.name == "ledger" and any(folder.glob("*-????????.jsonl")))


def _kind(path: Path) -> str | None:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def _read_file(path: Path, named: bool, format: str, counts: Counter[str]) -> Iterator[Document]:
    kind = _kind(path)
    try:
        if kind == ".parquet":
            yield from _read_parquet(path, format)
        elif kind == ".jsonl":
            yield from _read_jsonl(path, format)
        else:
            with _opened(path) as file:
                text = decode_text(file.read(), str(path))
            if not text.strip():
                raise NotText("files_empty", f"{path} is empty: give a file with text in it")
            yield Document(text, str(path))
        counts["files_read"] += 1
    except NotText as fault:
        if named:
            raise
        counts[fault.count] += 1


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed. A broken or unreadable file is a UserError wherever in it that shows."""
    broken: tuple[type[Exception], ...] = (gzip.BadGzipFile, zlib.error, EOFError)
    try:
        if path.suffix.lower() == ".gz":
            file: Any = gzip.GzipFile(path)
        elif path.suffix.lower() == ".zst":
            zstandard = _extra("zstandard", path)
            broken = (*broken, zstandard.ZstdError)
            file = io.BufferedReader(_ZstdFile(path, zstandard))
        else:
            file = path.open("rb")
        with file:
            yield file
    except broken as error:
        raise UserError(f"{path} cannot be decompressed ({error}): copy it again") from None
    except OSError as error:  # pyarrow raises it for damaged pages as well
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{path} cannot be read ({_one_line(error)}): copy it again, or make it readable") from None


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes; unlike zstandard's own reader it does not take a file cut short for a whole one."""

    def __init__(self, path: Path, zstandard: Any) -> None:
        self._zstandard = zstandard
        self._file = path.open("rb")
        self._frame: Any = None
        self._packed, self._unpacked = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._file.read(1 << 17)
            if not self._packed:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("it ends in the middle")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            self._unpacked = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _read_jsonl(path: Path, format: str) -> Iterator[Document]:
    empty = True
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                text = decode_text(line, where).strip()
            except NotText as fault:
                if empty:
                    raise  # no jsonl at all
                raise UserError(f"{fault} (the rows before it are good ones)") from None
            if not text:
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:  # also a number of too many digits
                raise UserError(f"{where} is not valid JSON ({error}): write one object a line") from None
            empty = False
            yield _row_document(row, where, format)
    if empty:
        raise NotText("files_empty", f"{path} is empty: give a file with text in it")


def _read_parquet(path: Path, format: str) -> Iterator[Document]:
    parquet = _extra("pyarrow.parquet", path)
    from pyarrow import ArrowException

    with _opened(path) as packed:
        # Parquet is read from its end, so a compressed one must be unpacked whole.
        file = packed if path.suffix.lower() == ".parquet" else io.BytesIO(packed.read())
        try:
            table = parquet.ParquetFile(file)
            columns = [c for c in ("text", "messages", "conversations") if c in table.schema_arrow.names]
            columns.sort(key=lambda column: (column == "text") != (format == "text"))  # only the first is read
            if not columns:
                raise UserError(
                    f"{path} has columns {table.schema_arrow.names}: it needs text, messages or conversations"
                )
            row_number = 0
            for batch in table.iter_batches(batch_size=1024, columns=columns[:1]):
                for row in batch.to_pylist():
                    row_number += 1
                    yield _row_document(row, f"{path}:{row_number}", format)
        except (ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a readable parquet file: {_one_line(error)}") from None


def _row_document(row: Any, where: str, format: str) -> Document:
    text = row.get("text") if isinstance(row, dict) else None
    turns = row.get("messages", row.get("conversations")) if isinstance(row, dict) else None
    if isinstance(text, str) and (format == "text" or not isinstance(turns, list)):
        return Document(_whole(text), where)
    if not isinstance(turns, list):
        keys = f"keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise UserError(f"{where} has {keys}: it needs text (a string), or messages=[{{role, content}}]")
    return Document.of_messages([_message(turn, where) for turn in turns], where)


def _message(turn: Any, where: str) -> Message:
    turn = turn if isinstance(turn, dict) else {}
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    role = FOREIGN_ROLES.get(role, role) if isinstance(role, str) else None
    if role not in ROLES or not isinstance(content, str):
        raise UserError(f"{where}: a message needs a role ({', '.join(ROLES)}) and a content of type string")
    return Message(role, _whole(content))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _whole(text: str) -> str:
    """JSON can spell half a surrogate pair, which has no UTF-8: it becomes a question mark."""
    return text.encode(errors="replace").decode()


def _extra(module: str, path: Path) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"{path} needs {package}: pip install 'baleen-lm[data]'") from None
