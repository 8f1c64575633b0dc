import pytest

from baleen.data.corpus import read_documents
from baleen.data.tokenizer import Tokenizer
from baleen.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="session")
def docs_texts() -> list[str]:
    return [document.text for document in read_documents(["package:python-docs"], "text")]


@pytest.fixture(scope="session")
def tokenizer(docs_texts) -> Tokenizer:
    return train_tokenizer(docs_texts, 600)
