"""One way in: runs and Hugging Face directories, and a plain word for everything else."""

import pytest
import torch

from baleen.config import UserError
from baleen.data.tokenizer_training import train_tokenizer
from baleen.interop.huggingface import save_model
from baleen.interop.load import load


@pytest.mark.parametrize("inside", ["", "model"])
def test_runs_and_model_directories(tmp_path, tiny_model, same, inside):
    model, tokenizer = tiny_model(vocab_size=290), train_tokenizer(["the whale and the krill " * 20], 290)
    save_model(model, tmp_path / "run" / inside, tokenizer=tokenizer)
    loaded = load(tmp_path / "run", dtype=torch.float32)
    assert loaded.path == tmp_path / "run" / inside and not loaded.model.training
    assert same(loaded.model, model)
    assert loaded.tokenizer.encode("the krill") == tokenizer.encode("the krill")


def test_what_is_not_a_model_is_named(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    for path, words in [("weights.pt", "pickle"), ("nowhere", "neither"), (".", "config.json")]:
        with pytest.raises(UserError, match=words):
            load(tmp_path / path)
