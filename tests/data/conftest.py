import pytest
from hypothesis import settings

from baleen.data.corpus import read_documents
from baleen.data.tokenizer import Tokenizer, train_tokenizer

# The same examples every time, and no verdict on a machine that is busy.
settings.register_profile("baleen", deadline=None, derandomize=True)
settings.load_profile("baleen")


@pytest.fixture(scope="session")
def docs_texts() -> list[str]:
    return [document.text for document in read_documents(["package:python-docs"], "text")]


@pytest.fixture(scope="session")
def tokenizer(docs_texts) -> Tokenizer:
    return train_tokenizer(docs_texts, 600)
