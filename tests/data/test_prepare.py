import json
import multiprocessing
import os
from collections import Counter

import numpy as np
import pytest

from baleen.config import UserError
from baleen.data.clean import text_hash
from baleen.data.prepare import prepare
from baleen.recipe import DataConfig

TURNS = ["hello there", "how are you?", "fine, thanks", "what did you do today?", "I read a long book about whales"]


@pytest.fixture
def folder(tmp_path, docs_texts):
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(docs_texts[:40]):
        (tmp_path / "texts" / f"{number:02}.txt").write_text(text)
    return tmp_path / "texts"


@pytest.fixture
def chats(tmp_path):
    lines = []
    for number in range(60):
        turns = [TURNS[(number * 7 + i * (1 + number % 3)) % 5] + f" {number * 31 + i}" for i in range(2 + number % 4)]
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        lines.append(json.dumps({"messages": messages}))
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    return DataConfig(sources=(str(tmp_path / "chats.jsonl"),), format="chat", heldout_fraction=0.1)


def run(data, cache_dir, *, vocab_size=400, seq_len=32, seed=0, **options):
    return prepare(data, vocab_size=vocab_size, seq_len=seq_len, seed=seed, cache_dir=cache_dir, **options)


def documents_of(prepared):
    """The text of each training document, control tokens shown; the last one may lack the dropped tail."""
    tokens, ids = prepared.train.flat_tokens, prepared.train.flat_document_ids
    cuts = np.flatnonzero(np.diff(ids)) + 1
    return [prepared.tokenizer.decode(part.tolist(), skip_special=False) for part in np.split(tokens, cuts)]


def test_a_folder_becomes_rows_and_heldout_text(folder, tmp_path):
    words = []
    prepared = run(DataConfig(sources=(str(folder),)), tmp_path / "cache", progress=words.append)
    assert prepared.tokenizer.vocab_size == 400
    texts = documents_of(prepared)
    assert all(t.startswith("<|begin_of_sentence|>") for t in texts)
    assert all(t.endswith("<|end_of_sentence|>") for t in texts[:-1])
    train = [t.removeprefix("<|begin_of_sentence|>").removesuffix("<|end_of_sentence|>") for t in texts]
    heldout = [d.text for d in prepared.heldout]
    whole = "".join(p.read_text() for p in sorted(folder.iterdir()))
    assert len(heldout) >= 1 and all(t in whole for t in [*train, *heldout])
    assert not {text_hash(t) for t in train} & {text_hash(t) for t in heldout}
    stats = prepared.stats
    assert stats["files_read"] == 40
    assert stats["documents_train"] == len(train) and stats["documents_heldout"] == len(heldout)
    assert stats["bytes_heldout"] == sum(len(t.encode()) for t in heldout)
    assert stats["documents_read"] == (
        stats["documents_train"] + stats["documents_heldout"] + stats.get("documents_duplicate", 0)
    )
    assert 0 <= stats["tokens_train"] - 1 - len(prepared.train) * 32 < 32
    assert words[0] == "reading and cleaning the text"


def test_a_second_call_reads_nothing_and_gives_the_same(folder, tmp_path):
    data, cache = DataConfig(sources=(str(folder),)), tmp_path / "cache"
    first, words = run(data, cache), []
    second = run(data, cache, progress=words.append)
    assert words == []
    assert np.array_equal(first.train.flat_tokens, second.train.flat_tokens)
    assert first.heldout == second.heldout and first.stats == second.stats
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint
    built_again = run(data, tmp_path / "other")
    assert np.array_equal(first.train.flat_tokens, built_again.train.flat_tokens)
    for change in ({"seq_len": 16}, {"vocab_size": 401}, {"seed": 1}):
        run(data, cache, progress=words.append, **change)
    (folder / "00.txt").write_text("other words")
    run(data, cache, progress=words.append)
    assert words.count("reading and cleaning the text") == 4
    assert len([p for p in cache.iterdir() if not p.name.startswith(".")]) == 5


def test_chats_are_rendered_by_the_template(chats, tmp_path):
    prepared = run(chats, tmp_path / "cache", vocab_size=300)
    for text in documents_of(prepared)[:-1]:
        assert text.startswith("<|begin_of_sentence|><|user|>") and text.endswith("<|end_of_sentence|>")
        assert text.count("<|end_of_sentence|>") >= text.count("<|assistant|>") >= 1
    assert all(d.messages and d.text == "".join(m.content + "\n" for m in d.messages) for d in prepared.heldout)
    assert prepared.train.loss_mask is None


def test_fim_and_split_pretokens_lose_nothing(folder, tmp_path):
    plain = run(DataConfig(sources=(str(folder),)), tmp_path / "cache")
    data = DataConfig(sources=(str(folder),), fim_rate=0.5, pretoken_split_rate=0.5)
    changed = run(data, tmp_path / "cache")
    originals, texts = documents_of(plain), documents_of(changed)
    assert len(originals) == len(texts)
    counts = Counter()
    for original, text in list(zip(originals, texts, strict=True))[:-1]:
        counts["fim"] += "<|fim_begin|>" in text
        text = text.removeprefix("<|begin_of_sentence|>").removesuffix("<|end_of_sentence|>")
        if "<|fim_begin|>" in text:
            prefix, rest = text.removeprefix("<|fim_begin|>").split("<|fim_hole|>")
            suffix, middle = rest.split("<|fim_end|>")
            text = prefix + middle + suffix
        assert f"<|begin_of_sentence|>{text}<|end_of_sentence|>" == original
    assert 0.2 < counts["fim"] / len(texts) < 0.8
    assert changed.stats["tokens_train"] > plain.stats["tokens_train"]


def test_one_long_file_is_cut_so_that_some_of_it_is_held_out(tmp_path, docs_texts):
    book = "\n\n".join(docs_texts)
    (tmp_path / "book.txt").write_text(book)
    prepared = run(DataConfig(sources=(str(tmp_path / "book.txt"),), fim_rate=0.0), tmp_path / "cache")
    heldout = sum(len(d.text) for d in prepared.heldout)
    assert 1 <= len(prepared.heldout) < 10 and all(d.text in book for d in prepared.heldout)
    assert sum(len(t) for t in documents_of(prepared)) + heldout > 0.98 * len(book)
    assert all(d.text.endswith("\n") for d in prepared.heldout)  # cut at the end of a paragraph


def test_a_given_tokenizer_is_kept(folder, tmp_path, tokenizer):
    data = DataConfig(sources=(str(folder),))
    prepared = run(data, tmp_path / "cache", vocab_size=1000, tokenizer=tokenizer)
    assert prepared.tokenizer is tokenizer
    with pytest.raises(UserError, match="set model.vocab_size to that or more"):
        run(data, tmp_path / "cache", vocab_size=500, tokenizer=tokenizer)


def test_settings_that_do_not_fit_the_text(folder, chats, tmp_path):
    cache = tmp_path / "cache"
    data = DataConfig(sources=(str(folder),))
    for fault, call in {
        "the text fills only": lambda: run(data, cache, vocab_size=10**6),
        "fewer than one sequence": lambda: run(data, cache, seq_len=10**6),
        "nothing is left of the text": lambda: run(data.model_copy(update={"min_chars": 10**6}), cache),
        "hold others out": lambda: run(data.model_copy(update={"heldout_fraction": 1.0}), cache),
        "are for data.format 'text'": lambda: run(chats.model_copy(update={"fim_rate": 0.1}), cache),
        "neither a file": lambda: run(DataConfig(sources=("nowhere",)), cache),
        "no text to read": lambda: run(DataConfig(), cache),
    }.items():
        with pytest.raises(UserError, match=fault):
            call()
    assert not cache.exists() or {p.name for p in cache.iterdir()} <= {".lock"}  # a failure leaves nothing


def test_nothing_held_out_if_so_wished(folder, tmp_path):
    prepared = run(DataConfig(sources=(str(folder),), heldout_fraction=0.0), tmp_path / "cache")
    assert prepared.heldout == [] and "documents_heldout" not in prepared.stats


def _build(data, cache, queue):
    words = []
    prepared = run(data, cache, progress=words.append)
    queue.put((os.getpid(), len(words), int(prepared.train.flat_tokens.sum())))


def test_of_many_processes_one_builds_and_a_killed_ones_rest_is_cleared(folder, tmp_path):
    cache = tmp_path / "cache"
    (cache / ".building").mkdir(parents=True)
    (cache / ".building" / "tokens.npy").write_bytes(b"half")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    data = DataConfig(sources=(str(folder),))
    processes = [context.Process(target=_build, args=(data, cache, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(words > 0 for _, words, _ in results) == [False, True]
    assert len({total for _, _, total in results}) == 1
    assert not (cache / ".building").exists()
