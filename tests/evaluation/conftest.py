import pytest
from held_out_examples import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()
