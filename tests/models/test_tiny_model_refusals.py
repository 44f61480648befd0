"""Bad requests for a tiny model, each answered with one sentence that says what to do."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from pytest_ranks.errors import BadInputError, UnavailableError
from pytest_ranks.models import tiny_model


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"family": "lama"},
            "family is 'lama': expected a causal language model type of transformers. Did you mean "
            "'llama'? pytest_ranks.models.causal_lm_families() lists all ",
        ),
        ({"family": "Qwen3"}, "Did you mean 'qwen3'?"),
        ({"family": "t5"}, "family is 't5': expected a causal language model type"),
        ({"family": None}, "family is None: expected a causal language model type"),
        ({"seed": "0"}, "seed is '0': expected an integer from 0 to 2**64 - 1"),
        ({"seed": 1.0}, "seed is 1.0: expected an integer"),
        ({"seed": True}, "seed is True: expected an integer"),
        ({"seed": -1}, "seed is -1: expected an integer from 0"),
        (
            {"hiden_size": 32},
            "hiden_size is no config field of 'llama'. Did you mean 'hidden_size'? "
            "Fields of LlamaConfig can be overridden",
        ),
        ({"family": "gpt2", "n_embed": 32}, "Did you mean 'n_embd'?"),
        ({"transformers_version": "5"}, "transformers_version is no config field of 'llama'"),
        ({"dtype": "bfloat16"}, "dtype is no config field of 'llama'"),
        (
            {"num_attention_heads": 3},
            "'llama' with 3 attention heads and width 64: the heads must divide the width; "
            "use a multiple of 3, or give head_dim",
        ),
        (
            {"family": "gpt2", "n_head": 5},
            "'gpt2' with 5 attention heads and width 64: the heads must divide the width; "
            "use a multiple of 5",
        ),
        (
            {"hidden_size": 100},
            "'llama' with heads of size 25: rotary embeddings need an even size "
            "(width 100, 4 attention heads)",
        ),
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads=3 with 4 attention heads: "
            "the key and value heads must divide the attention heads",
        ),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0: expected an integer of 1 or more"),
        ({"hidden_size": "64"}, "Field 'hidden_size' expected int, got str (value: '64')"),
        ({"vocab_size": 100}, "vocab_size is 100: the byte tokenizer has 256 bytes"),
        ({"pad_token_id": 0}, "pad_token_id=0: the byte tokenizer's is 256 or 258, its <eos>"),
        ({"eos_token_id": 2}, "eos_token_id=2: the byte tokenizer's is 258"),
        (
            {"rms_norm_eps": "small"},
            "'llama' cannot be built with rms_norm_eps='small': ",
        ),
        (
            {"attn_implementation": "flush"},
            "'llama' cannot be built with attn_implementation='flush': ",
        ),
        (
            {"family": "xlstm", "tie_word_embeddings": True},
            "tie_word_embeddings=True has no effect on 'xlstm': its embeddings are never tied",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_request(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(BadInputError) as caught:
        tiny_model(**arguments)
    assert text in str(caught.value)


def test_a_family_that_is_no_text_model() -> None:
    with pytest.raises(UnavailableError) as caught:
        tiny_model("musicgen")
    assert str(caught.value) == (
        "'musicgen' is no text model that stands alone: its decoder is trained on audio codes"
    )


@pytest.mark.skipif(find_spec("timm") is not None, reason="needs timm absent, found it installed")
def test_a_family_whose_package_is_missing() -> None:
    with pytest.raises(UnavailableError) as caught:
        tiny_model("gemma3n")
    assert str(caught.value).startswith("'gemma3n' cannot be built here: ")
    assert "timm" in str(caught.value)


def test_without_transformers() -> None:
    program = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'")

sys.meta_path.insert(0, Absent())
import pytest_ranks.models as models
from pytest_ranks.errors import UnavailableError

for ask in (models.tiny_model, models.causal_lm_families, models.byte_tokenizer):
    try:
        ask()
    except UnavailableError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines() == [
        "tiny models need transformers (No module named 'transformers'): "
        "pip install 'pytest-ranks[models]'"
    ] * 2 + [
        "byte_tokenizer needs transformers (No module named 'transformers'): "
        "pip install 'pytest-ranks[models]'"
    ]


def test_no_network_and_no_import_before_use() -> None:
    program = """
import socket, sys

def refuse(*_):
    raise SystemExit("a socket was opened")

socket.socket.connect = socket.getaddrinfo = refuse
import pytest_ranks.models
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
model = pytest_ranks.models.tiny_model("qwen3")
model.save(sys.argv[1])
print("built")
"""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", program, folder],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    assert (done.returncode, done.stdout) == (0, "built\n"), done.stderr


def test_unknown_name_in_the_package() -> None:
    import pytest_ranks.models

    with pytest.raises(AttributeError, match="has no attribute 'tiny_modle'"):
        _ = pytest_ranks.models.tiny_modle
    assert "tiny_model" in dir(pytest_ranks.models)
