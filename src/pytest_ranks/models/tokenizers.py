"""A byte-level tokenizer made in code: any UTF-8 text, no file, no hub.

The id of a byte is its value, so a test reads ids without a table: `"A"` is 65. Special tokens
follow from 256 on, then reserved ones fill the vocabulary, so that `len(tokenizer)` is a model's
`vocab_size`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_ranks.errors import BadInputError, UnavailableError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTES = 256
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
PAD_ID, BOS_ID, EOS_ID = BYTES, BYTES + 1, BYTES + 2
FIRST_RESERVED_ID = BYTES + len(SPECIAL_TOKENS)

# 5 * 64: splits evenly over 2, 4, 8 .. 64 tensor-parallel ranks, and leaves reserved ids for the
# placeholder tokens (image, audio ...) that some families' configs ask for.
VOCAB_SIZE = 320

# Every turn ends in the end-of-sequence token, as in Llama 2 and Mistral: a collator that masks by
# `pad_token_id` then loses every turn's end as soon as pad and eos are one token.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ '<|assistant|>' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{%- elif message['role'] in ['system', 'user', 'tool'] -%}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{%- else -%}"
    "{{ raise_exception('unknown role ' + message['role'] + ': "
    "expected system, user, assistant or tool') }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def byte_tokenizer(
    *,
    vocab_size: int = VOCAB_SIZE,
    pad_equals_eos: bool = False,
    add_bos: bool = False,
    add_eos: bool = False,
) -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer with special tokens, role tokens and a chat template.

    Args:
        vocab_size: number of ids; at least 263 (256 bytes and 7 special tokens), the rest reserved.
        pad_equals_eos: use the end-of-sequence token for padding too, as GPT-2 users do.
        add_bos: put `<bos>` before every encoded text.
        add_eos: put `<eos>` after every encoded text.

    Returns:
        A `PreTrainedTokenizerFast`; `decode(encode(text)) == text` for any text.

    Raises:
        BadInputError: vocab_size is not an integer or is too small.
        UnavailableError: transformers is not installed.
    """
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool):
        raise BadInputError(f"vocab_size is {vocab_size!r}: expected an integer")
    if vocab_size < FIRST_RESERVED_ID:
        raise BadInputError(
            f"vocab_size is {vocab_size}: the byte tokenizer has {BYTES} bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens, use {FIRST_RESERVED_ID} or more"
        )
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise UnavailableError(
            f"byte_tokenizer needs transformers ({error}): pip install 'pytest-ranks[models]'"
        ) from error

    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_backend(vocab_size, add_bos=add_bos, add_eos=add_eos),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>" if pad_equals_eos else "<pad>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,  # a decode that tidies spaces is not a round trip
    )


def _byte_level_backend(vocab_size: int, *, add_bos: bool, add_eos: bool) -> object:
    """Return a `tokenizers.Tokenizer` with one token a byte and no merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = _letters_of_bytes()
    vocabulary = {letter: byte for byte, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    reserved = [f"<|reserved_{i}|>" for i in range(vocab_size - FIRST_RESERVED_ID)]
    backend.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token in (*SPECIAL_TOKENS, *reserved)
        ]
    )
    if add_bos or add_eos:
        before, after = ("<bos> " if add_bos else ""), (" <eos>" if add_eos else "")
        backend.post_processor = processors.TemplateProcessing(
            single=f"{before}$A{after}",
            pair=f"{before}$A{after} {before}$B:1{after}",
            special_tokens=[("<bos>", BOS_ID), ("<eos>", EOS_ID)],
        )
    return backend


def _letters_of_bytes() -> list[str]:
    """Return the printable letter that stands for each byte, by byte.

    The table of GPT-2 (`bytes_to_unicode` in openai/gpt-2, src/encoder.py), which the ByteLevel
    pre-tokenizer applies: printable Latin-1 stands for itself, the rest is moved to 256 and up.
    """
    itself = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)}
    itself |= set(range(ord("®"), ord("ÿ") + 1))
    moved = (chr(code) for code in range(BYTES, 2 * BYTES))
    return [chr(byte) if byte in itself else next(moved) for byte in range(BYTES)]
