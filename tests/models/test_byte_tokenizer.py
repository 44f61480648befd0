"""The byte-level tokenizer: exact round trips, ids that can be read, masks of what is trained."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pytest_ranks.errors import BadInputError
from pytest_ranks.models import byte_tokenizer

TOKENIZER = byte_tokenizer()

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4 é"},
    {"role": "tool", "content": "ok"},
    {"role": "assistant", "content": "done"},
]


@given(st.text())
@example(" a  b\t\r\n\n ")
@example("don't , . ! it 's")  # what tidying of spaces would change
@example("<eos><bos> <|user|>x<|reserved_0|>")
@example("naïve 漢字 😀 \x00\x7f\u2581\ufeff e\u0301")
def test_any_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


@given(st.text(st.characters(blacklist_characters="<", codec="utf-8")))
def test_the_ids_of_text_are_its_bytes(text: str) -> None:
    assert TOKENIZER(text).input_ids == list(text.encode())


def test_special_tokens_follow_the_bytes() -> None:
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (
        256,
        257,
        258,
    )
    assert TOKENIZER("<pad><bos><eos>a<|user|>").input_ids == [256, 257, 258, 97, 260]
    assert TOKENIZER.decode([97, 258, 256], skip_special_tokens=True) == "a"


def test_the_vocabulary_is_filled_up() -> None:
    assert len(TOKENIZER) == 320
    assert len(byte_tokenizer(vocab_size=263)) == 263
    assert len(byte_tokenizer(vocab_size=1000)) == 1000
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(320))


def test_pad_may_be_eos() -> None:
    tokenizer = byte_tokenizer(pad_equals_eos=True)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 258
    padded = tokenizer(["a", "abc"], padding=True)
    assert padded["input_ids"] == [[97, 258, 258], [97, 98, 99]]
    assert padded["attention_mask"] == [[1, 0, 0], [1, 1, 1]]
    assert len(tokenizer) == len(TOKENIZER)


def test_bos_and_eos_on_request() -> None:
    assert TOKENIZER("a").input_ids == [97]
    assert byte_tokenizer(add_bos=True)("a").input_ids == [257, 97]
    assert byte_tokenizer(add_eos=True)("a").input_ids == [97, 258]
    both = byte_tokenizer(add_bos=True, add_eos=True)
    assert both("a").input_ids == [257, 97, 258]
    assert both("a", add_special_tokens=False).input_ids == [97]


def test_chat_template_text() -> None:
    text = TOKENIZER.apply_chat_template(CHAT, tokenize=False)
    assert text == (
        "<bos><|system|>Be brief.<eos><|user|>2+2?<eos><|assistant|>4 é<eos>"
        "<|tool|>ok<eos><|assistant|>done<eos>"
    )
    prompt = TOKENIZER.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<bos><|system|>Be brief.<eos><|user|>2+2?<eos><|assistant|>"


def test_assistant_mask_covers_answers_and_their_ends() -> None:
    encoded = TOKENIZER.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    trained = [token for token, is_answer in zip(ids, mask, strict=True) if is_answer]
    assert TOKENIZER.decode(trained) == "4 é<eos>done<eos>"


def test_unknown_role_is_refused() -> None:
    with pytest.raises(Exception, match=r"unknown role wizard: expected system, user, assistant"):
        TOKENIZER.apply_chat_template([{"role": "wizard", "content": "x"}], tokenize=False)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (262, "vocab_size is 262: the byte tokenizer has 256 bytes and 7 special tokens, use 263"),
        ("320", "vocab_size is '320': expected an integer"),
        (True, "vocab_size is True: expected an integer"),
    ],
)
def test_bad_vocabulary_size(size: object, text: str) -> None:
    with pytest.raises(BadInputError) as caught:
        byte_tokenizer(vocab_size=size)  # type: ignore[arg-type]
    assert text in str(caught.value)


def test_saved_and_loaded_it_is_the_same(tmp_path) -> None:
    from transformers import AutoTokenizer

    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "naïve  漢字 <eos>"
    assert again(text).input_ids == TOKENIZER(text).input_ids
    assert again.decode(again(text).input_ids) == text
    assert again.pad_token_id == 256
    assert again.apply_chat_template(CHAT) == TOKENIZER.apply_chat_template(CHAT)
