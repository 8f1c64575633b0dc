import errno
import gzip
import json
import os
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from baleen.config import UserError
from baleen.data.corpus import read_documents, source_files
from baleen.data.document import Document, Message

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
MESSAGES = (Message("user", "hi"), Message("assistant", "hello"))


def texts(*sources, format="text", counts=None):
    return [d.text for d in read_documents([str(s) for s in sources], format, counts)]


def test_every_format_and_compression_gives_the_same_text(tmp_path):
    raw = {
        "a.txt": b"one\n",
        "a.md": b"one\n",
        "a.jsonl": json.dumps({"text": "one\n", "id": 3}).encode() + b"\n\n",
    }
    table = pa.table({"id": [3], "text": ["one\n"]})
    pq.write_table(table, tmp_path / "a.parquet")
    raw["a.parquet"] = (tmp_path / "a.parquet").read_bytes()
    for name, content in raw.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        (tmp_path / f"{name}.zst").write_bytes(zstandard.compress(content))
        for suffix in ("", ".gz", ".zst"):
            assert texts(tmp_path / f"{name}{suffix}") == ["one\n"], name + suffix
    counts = Counter()
    assert texts(tmp_path, counts=counts) == ["one\n"] * 12
    assert counts == {"files_read": 12}


def test_zstd_of_many_frames_and_blocks(tmp_path):
    frames = ["".join(f"{part} {i} " for i in range(100_000)) for part in ("one", "two")]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(zstandard.compress(f.encode()) for f in frames))
    assert texts(tmp_path / "a.txt.zst") == ["".join(frames)]


def test_a_folder_is_read_in_order_and_passes_over_what_is_no_text(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "z.txt").write_text("third")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.md").write_bytes(b"\xef\xbb\xbfsecond")  # a byte order mark
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "binary.txt").write_bytes(b"\x00\x01\x02")
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    counts = Counter()
    assert texts(tmp_path, counts=counts) == ["first", "second", "third"]
    assert counts == {"files_read": 3, "files_binary": 2, "files_empty": 2, "files_other": 1}
    assert [p.name for p in source_files(str(tmp_path))][:2] == ["a.txt", "b.md"]


def test_rows_behind_a_broken_one_are_not_lost_in_silence(tmp_path):
    """A jsonl that is none from its first line on is passed over in a folder; one that breaks off later is told."""
    (tmp_path / "none.jsonl").write_bytes(b"\x00\x01\n")
    (tmp_path / "some.jsonl").write_bytes(b'{"text": "x"}\n\xff\n{"text": "y"}\n')
    with pytest.raises(UserError, match=r"some\.jsonl:2 is not UTF-8"):
        texts(tmp_path)
    (tmp_path / "some.jsonl").unlink()
    (tmp_path / "a.txt").write_text("first")
    assert texts(tmp_path, counts=(counts := Counter())) == ["first"] and counts["files_binary"] == 1


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.txt", b"\x00\x01", "is binary"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.txt", b"", "is empty"),
        ("a.jsonl", b"\n", "is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl:2 is not valid JSON"),
        ("a.jsonl", b'{"body": "x"}', r"a\.jsonl:1 has keys \['body'\]"),
        ("a.jsonl", b"[1]", "it needs text"),
        ("a.jsonl", b'{"text": "x", "id": ' + b"9" * 5000 + b"}", r"a\.jsonl:1 is not valid JSON"),
        ("a.jsonl", b'{"messages": [{"role": "narrator", "content": "x"}]}', "needs a role"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": 3}]}', "type string"),
        ("a.parquet", b"PAR1 and no more", "not a readable parquet"),
        ("a.txt.gz", b"not gzip", "cannot be decompressed"),
        ("a.txt.gz", gzip.compress(b"words " * 100)[:-12], "cannot be decompressed"),
        ("a.jsonl.zst", b"not zstd", "cannot be decompressed"),
        ("a.txt.zst", zstandard.compress(b"words " * 100)[:-3], "cannot be decompressed"),
        ("a.pdf", b"%PDF", "Baleen reads"),
    ],
)
def test_a_bad_file_that_was_named_is_one_clear_sentence(tmp_path, name, content, fault):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=fault):
        texts(tmp_path / name)


@pytest.mark.parametrize("damaged", ["footer", "page"])
def test_damage_within_a_parquet_file_names_it(tmp_path, damaged):
    table = pa.table({"text": [f"row {i}" for i in range(1000)]})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    start = 4 if damaged == "page" else len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    raw[start : start + 60] = bytes(60)
    (tmp_path / "a.parquet").write_bytes(raw)
    with pytest.raises(UserError, match=r"a\.parquet (is not a readable parquet file|cannot be read)") as caught:
        texts(tmp_path / "a.parquet")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.txt.zst", "a.parquet"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"words")

    def refuse(code):
        def opening(path, *_, **__):
            raise OSError(code, os.strerror(code), str(path))

        monkeypatch.setattr("pathlib.Path.open", opening)
        monkeypatch.setattr("gzip.GzipFile", opening)

    refuse(errno.EACCES)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match=rf"{name} cannot be read .*Permission denied"):
            texts(source)
    refuse(errno.ENOSPC)  # the command line has its own words for it
    with pytest.raises(OSError, match="No space left"):
        texts(tmp_path / name)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="neither a file nor a folder"):
        texts(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no text"):
        texts(tmp_path)
    with pytest.raises(UserError, match="pip install no-such-distribution"):
        texts("package:no-such-distribution")
    with pytest.raises(UserError, match="no text to read"):
        texts()


def test_conversations_in_every_spelling(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"conversations": SHAREGPT}))
    pq.write_table(pa.table({"messages": [CHAT]}), tmp_path / "b.parquet")
    documents = list(read_documents([str(tmp_path)], "chat"))
    assert [d.messages for d in documents] == [MESSAGES] * 3
    assert {d.text for d in documents} == {"hi\nhello\n"}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_of_rows_with_text_and_messages_the_format_takes_its_own(tmp_path, kind):
    row = {"text": "words", "messages": CHAT}
    if kind == "jsonl":
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
    else:
        pq.write_table(pa.table({name: [value] for name, value in row.items()}), tmp_path / "a.parquet")
    assert texts(tmp_path, format="text") == ["words"]
    assert [d.messages for d in read_documents([str(tmp_path)], "chat")] == [MESSAGES]


def test_chat_wants_conversations(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(UserError, match="plain text, but data.format is 'chat'"):
        texts(tmp_path, format="chat")


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}')
    assert texts(tmp_path) == ["a?b"]


def test_chitchat_is_two_person_alternating_and_filtered():
    counts = Counter()
    documents = list(read_documents(["package:chitchat-dataset"], "chat", counts))
    # 4,017 conversations of two; one of them is a profane line and its answer.
    assert len(documents) == 4016
    assert counts == {"conversations_not_of_two": 3152, "lines_profane": 18, "lines_with_email": 2}
    for document in documents:
        roles = [m.role for m in document.messages or ()]
        assert len(roles) >= 2 and roles == (["user", "assistant"] * len(roles))[: len(roles)]
    assert not any("@byu.edu" in d.text for d in documents)


def test_other_packages(docs_texts):
    assert len(docs_texts) > 70 and any('"assert" statement' in text for text in docs_texts)
    jinja = list(read_documents(["package:jinja2"], "text"))
    assert any(d.source.endswith("sandbox.py") for d in jinja)
    assert Document.of_messages(MESSAGES, "x").text == "hi\nhello\n"


def test_runs_and_ledgers_below_a_folder_are_not_its_text(tmp_path):
    (tmp_path / "mine.txt").write_text("text to learn from")
    for name in ("runs/mine/run_id", "runs/mine/metrics.jsonl", "runs/mine/model/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("not text to learn from")
    (tmp_path / "runs/ledger").mkdir()
    (tmp_path / "runs/ledger/mine-0123abcd.jsonl").write_text("{}")
    assert [document.text for document in read_documents([str(tmp_path)], "text")] == ["text to learn from"]


def test_a_folder_inside_a_run_may_be_asked_for(tmp_path):
    (tmp_path / "run_id").write_text("mine-0123abcd")
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "deep" / "a.txt").write_text("words")
    assert texts(tmp_path / "texts") == ["words"]
