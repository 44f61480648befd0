"""Data on its way into a trainer: files, formats, orders, batches, and the place at which to go on."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc

import pytest
from typer.testing import CliRunner

from pytest_ranks.errors import BadInputError
from pytest_ranks.models import byte_tokenizer
from pytest_ranks.reference.cli import app
from pytest_ranks.reference.data import JsonlDataset

EOS = 258
GOOD = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
# Qwen's and many others' form, which does not say itself what is trained.
PLAIN_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "😀 yes 😀"},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "No"},
]


def write(path, *records):
    lines = (one if isinstance(one, str) else json.dumps(one) for one in records)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def trained(sample, tokenizer):
    """Return the text of what is trained, a piece for each run of labels."""
    pieces, run = [], []
    for token, label in zip(sample["input_ids"], [*sample["labels"]], strict=True):
        assert label in (-100, token)
        if label != -100:
            run.append(token)
        elif run:
            pieces.append(tokenizer.decode(run))
            run = []
    return [*pieces, *([tokenizer.decode(run)] if run else [])]


class TestJsonlDataset:
    def test_init_knows_lengths_counts_and_the_largest_id(self, tmp_path):
        dataset = JsonlDataset(
            write(tmp_path / "a.jsonl", GOOD, "", {"input_ids": [9], "labels": [9]})
        )
        assert len(dataset) == 2
        assert (dataset.lengths, dataset.counted, dataset.largest_id) == ([3, 1], [2, 0], 9)
        assert dataset.name(1).endswith("a.jsonl, line 3")

    def test_getitem_reads_its_own_line(self, tmp_path):
        records = [
            {"input_ids": [n] * (n + 1), "labels": [n] * (n + 1), "note": "é" * n}
            for n in range(50)
        ]
        dataset = JsonlDataset(write(tmp_path / "a.jsonl", *records))
        for index in (49, 0, 25, 25, -1):
            expected = {k: records[index][k] for k in ("input_ids", "labels")}
            assert {k: list(v) for k, v in dataset[index].items()} == expected
        with pytest.raises(IndexError):
            dataset[50]

    def test_last_line_needs_no_end_and_other_systems_line_ends_are_read(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_bytes(b"\r\n".join(json.dumps(GOOD).encode() for _ in range(3)))
        dataset = JsonlDataset(path)
        assert [list(dataset[index]["input_ids"]) for index in range(3)] == [[1, 2, 3]] * 3

    def test_missing_loss_counted_tokens_are_counted_without_the_first_label(self, tmp_path):
        """Three unmasked labels are two predictions; what a file says of itself is not believed."""
        record = {
            "input_ids": [1, 2, 3],
            "labels": [1, 2, 3],
            "num_loss_counted_tokens": 3,
            "len": 7,
        }
        dataset = JsonlDataset(write(tmp_path / "a.jsonl", record))
        assert (dataset.counted, dataset.lengths) == ([2], [3])

    def test_samples_stay_on_the_disk(self, tmp_path):
        ids = [123456] * 5000
        path = write(tmp_path / "a.jsonl", *[{"input_ids": ids, "labels": ids}] * 60)
        tracemalloc.start()
        try:
            dataset = JsonlDataset(path)
            kept, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert path.stat().st_size > 4_500_000
        assert kept < 100_000
        assert most < 1_500_000  # one line at a time
        assert len(pickle.dumps(dataset)) < 5_000

    def test_a_copy_for_another_process_reads_the_same(self, tmp_path, monkeypatch):
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "a.jsonl", GOOD)
        dataset = JsonlDataset("a.jsonl")
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert pickle.loads(pickle.dumps(dataset))[0] == dataset[0]

    @pytest.mark.parametrize("way", ["shorter", "written anew", "replaced"])
    def test_a_file_that_changes_in_use_is_told(self, tmp_path, way):
        path = write(tmp_path / "a.jsonl", GOOD, GOOD)
        dataset = JsonlDataset(path)
        dataset[0]
        if way == "shorter":
            os.truncate(path, 10)
        elif way == "written anew":
            write(path, GOOD, GOOD)
            os.utime(path, ns=(1, 1))
        else:
            write(tmp_path / "b.jsonl", GOOD, GOOD).replace(path)
        for one in (dataset, pickle.loads(pickle.dumps(dataset))):
            with pytest.raises(BadInputError, match=r"a\.jsonl was changed while it is in use: fo"):
                one[1]
        path.unlink()
        with pytest.raises(BadInputError, match=r"a\.jsonl cannot be read: No such file"):
            dataset[1]


class TestFormats:
    def test_text_is_trained_whole_and_ends_once(self, tmp_path):
        tokenizer = byte_tokenizer()
        path = write(tmp_path / "a.jsonl", {"text": "hé"}, {"text": "a<eos>"})
        dataset = JsonlDataset(path, tokenizer=tokenizer)
        assert list(dataset[0]["input_ids"]) == [*"hé".encode(), EOS] == list(dataset[0]["labels"])
        assert list(dataset[1]["input_ids"]) == [97, EOS]
        assert dataset.counted == [3, 1]

    @pytest.mark.parametrize("adds", [False, True])
    def test_a_prompt_is_not_trained_its_completion_is(self, tmp_path, adds):
        tokenizer = byte_tokenizer(add_bos=adds, add_eos=adds)
        record = {"prompt": "ab", "completion": "cd"}
        sample = JsonlDataset(write(tmp_path / "a.jsonl", record), tokenizer=tokenizer)[0]
        start = [257] if adds else []
        assert list(sample["input_ids"]) == [*start, 97, 98, 99, 100, EOS]
        assert list(sample["labels"]) == [*[-100] * len(start), -100, -100, 99, 100, EOS]

    def test_a_tokenizer_without_an_end_adds_none(self, tmp_path):
        tokenizer = byte_tokenizer()
        tokenizer.eos_token = None
        dataset = JsonlDataset(write(tmp_path / "a.jsonl", {"text": "ab"}), tokenizer=tokenizer)
        assert list(dataset[0]["input_ids"]) == [97, 98]

    @pytest.mark.parametrize(
        ("extra", "data_format"),
        [
            ({"text": "t"}, "text"),
            ({"text": "t", "prompt": "p", "completion": "c"}, "prompt_completion"),
            ({"prompt": "p", "messages": CONVERSATION}, "messages"),
            ({"messages": CONVERSATION, **GOOD}, "tokens"),
        ],
    )
    def test_of_several_formats_on_a_line_the_most_precise_is_read(
        self, tmp_path, extra, data_format
    ):
        path = write(tmp_path / "a.jsonl", extra)
        assert JsonlDataset(path, tokenizer=byte_tokenizer()).data_format == data_format


class TestChatTemplates:
    def read(self, tmp_path, tokenizer, messages=CONVERSATION, **more):
        path = write(tmp_path / "chat.jsonl", {"messages": messages, **more})
        return JsonlDataset(path, tokenizer=tokenizer)[0]

    def test_every_assistant_turn_is_trained_to_its_end_and_nothing_else(self, tmp_path):
        tokenizer = byte_tokenizer()
        sample = self.read(tmp_path, tokenizer)
        assert trained(sample, tokenizer) == ["😀 yes 😀<eos>", "No<eos>"]
        rendered = tokenizer.apply_chat_template(CONVERSATION, return_dict=True)
        assert list(sample["input_ids"]) == rendered["input_ids"]

    def test_a_template_without_generation_tags_gives_the_same_mask(self, tmp_path):
        """What comes behind the end of a turn, here a line break, is asked of nobody."""
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = PLAIN_TEMPLATE
        sample = self.read(tmp_path, tokenizer)
        assert trained(sample, tokenizer) == ["😀 yes 😀<eos>", "No<eos>"]
        rendered = tokenizer.apply_chat_template(CONVERSATION, return_dict=True)
        assert list(sample["input_ids"]) == rendered["input_ids"]

    def test_the_end_is_trained_also_where_it_is_the_padding_token(self, tmp_path):
        tokenizer = byte_tokenizer(pad_equals_eos=True)
        sample = self.read(tmp_path, tokenizer)
        assert trained(sample, tokenizer) == ["😀 yes 😀<eos>", "No<eos>"]

    def test_two_turns_of_the_assistant_in_a_row(self, tmp_path):
        tokenizer = byte_tokenizer()
        turns = [*CONVERSATION[:3], {"role": "assistant", "content": "and more"}]
        sample = self.read(tmp_path, tokenizer, turns)
        assert trained(sample, tokenizer) == ["😀 yes 😀<eos>", "and more<eos>"]

    def test_a_turn_that_calls_a_tool_needs_no_text_and_the_template_sees_the_tools(self, tmp_path):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = (
            "{{ tools[0].name }}{% for m in messages %}<|{{ m.role }}|>"
            "{% if m.role == 'assistant' %}{% generation %}"
            "{{ m.content or m.tool_calls[0].name }}<eos>{% endgeneration %}"
            "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        )
        turns = [
            {"role": "user", "content": "time?"},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]},
            {"role": "tool", "content": "12:00"},
            {"role": "assistant", "content": "noon"},
        ]
        sample = self.read(tmp_path, tokenizer, turns, tools=[{"name": "clock"}])
        assert trained(sample, tokenizer) == ["clock<eos>", "noon<eos>"]
        assert tokenizer.decode(sample["input_ids"]).startswith("clock<|user|>time?")

    @pytest.mark.parametrize(
        ("template", "messages", "text"),
        [
            (
                None,
                CONVERSATION,
                "'messages' needs a chat template, and the tokenizer has none; set "
                "tokenizer.chat_template and save it, or give 'prompt' and 'completion'.",
            ),
            (
                # what some do with the thoughts of earlier turns
                "{% for m in messages %}<|{{ m.role }}|>{% if loop.last %}*{% endif %}"
                "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
                CONVERSATION,
                "the chat template renders what is before messages[2] or up to it in another way "
                "than in the whole conversation, so that the turn cannot be found; use a template "
                "with {% generation %} tags.",
            ),
            (
                "{% for m in messages %}{% if loop.last %}{% generation %}{{ m.content }}"
                "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
                CONVERSATION,
                "the chat template's generation tags mark 1 turns, found 2 of the role 'assistant' "
                "in 'messages'; correct the template.",
            ),
            (
                "{{ raise_exception('No system role.') }}",
                CONVERSATION,
                "the chat template cannot render 'messages' (No system role).",
            ),
            (
                PLAIN_TEMPLATE,
                CONVERSATION[2:3],
                "messages[0] is an assistant turn; a chat template without generation tags needs "
                "another before it.",
            ),
            (
                "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
                "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
                CONVERSATION,
                "assistant turn 1 of 'messages' has no token of its own after the chat template; "
                "leave the turn out.",
            ),
        ],
    )
    def test_a_template_that_cannot_say_what_is_trained_is_refused(
        self, tmp_path, template, messages, text
    ):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        with pytest.raises(BadInputError) as caught:
            self.read(tmp_path, tokenizer, messages)
        assert str(caught.value) == f"{tmp_path / 'chat.jsonl'}, line 1: {text}"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny model of 320 tokens and 64 positions, and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "model"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=320, max_position_embeddings=64, **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def turns(*given):
    return {"messages": [{"role": role, "content": text} for role, text in given]}


BAD_LINES = {
    "broken JSON": (
        '{"input_ids": [1, 2',
        "line 2: not JSON (Expecting ',' delimiter, column 20); expected one object a line.",
    ),
    "too deep": ("[" * 100_000, "line 2: not JSON that can be read (maximum recursion depth"),
    "a number too long": (
        '{"input_ids": [1, ' + "9" * 5000 + '], "labels": [1, 2]}',
        "line 2: not JSON that can be read (Exceeds the limit (4300 digits)",
    ),
    "no object": ("[1]", "line 2: expected an object with 'input_ids' and 'labels', found list."),
    "wrong type": (
        {"input_ids": [1, "2"], "labels": [1, 2]},
        "line 2: input_ids[1] is '2'; expected a token id: a whole number of at least 0.",
    ),
    "not a number": (
        '{"input_ids": [1, NaN], "labels": [1, 2]}',
        "line 2: input_ids[1] is nan; expected a token id: a whole number of at least 0.",
    ),
    "wrong label": (
        {"input_ids": [1, 2], "labels": [1, -1]},
        "line 2: labels[1] is -1; expected a token id: a whole number of at least 0 or -100.",
    ),
    "missing field": (
        {"input_ids": [1], "label": [1]},
        "line 2: the field 'labels' is missing; found 'input_ids', 'label'. Did you mean 'label'?",
    ),
    "labels of another length": (
        {"input_ids": [1, 2], "labels": [1]},
        "line 2: 2 input_ids and 1 labels; expected as many labels as ids (unshifted, -100 where "
        "nothing is trained).",
    ),
    "outside the vocabulary": (
        {"input_ids": [1, 2, 320], "labels": [1, 2, 320]},
        "line 2: input_ids[2] is 320, the model knows 0 to 319; use the tokenizer that the model "
        "was made for.",
    ),
    "a label outside the vocabulary": (
        {"input_ids": [1, 2], "labels": [1, 999]},
        "line 2: labels[1] is 999, the model knows 0 to 319; use the tokenizer that the model was "
        "made for.",
    ),
    "longer than the model": (
        {"input_ids": [1] * 65, "labels": [1] * 65},
        "line 2 has 65 tokens, more than the 64 positions of the model; shorten or leave out the "
        "sample, or raise max_position_embeddings in the model's config.json if it can go further.",
    ),
    "another format": (
        {"text": "a"},
        "line 2: the field 'input_ids' is missing; found 'text'. The file's first sample (line 1) "
        "has 'input_ids' and 'labels'; a file holds one format.",
    ),
}
BAD_TEXTS = {
    "no text": ({"text": 3}, "line 1: 'text' is 3; expected text."),
    "empty text": ({"text": ""}, "line 1: 'text' is empty; leave it out."),
    "empty completion": (
        {"prompt": "a", "completion": ""},
        "line 1: 'completion' is empty; leave it out.",
    ),
    "no completion": (
        {"prompt": "a", "completions": "b"},
        "line 1: the field 'completion' is missing; found 'prompt', 'completions'. "
        "Did you mean 'completions'?",
    ),
    "no list": ({"messages": "a"}, "line 1: 'messages' is 'a'; expected a list of turns."),
    "no turn": (
        {"messages": ["a"]},
        "line 1: messages[0] is 'a'; expected an object with 'role' and 'content'.",
    ),
    "no conversation": (
        {"messages": []},
        "line 1: 'messages' has no turn of the role 'assistant': nothing of it would be trained; "
        "leave the sample out.",
    ),
    "unknown role": (
        turns(("user", "a"), ("asistant", "b")),
        "line 1: messages[1]: 'role' is 'asistant'; expected one of system, developer, user, "
        "assistant, tool. Did you mean 'assistant'?",
    ),
    "empty turn": (
        turns(("user", "a"), ("assistant", "")),
        "line 1: messages[1]: 'content' is empty; leave it out.",
    ),
    "a turn of no text": (
        turns(("user", ["a"]), ("assistant", "b")),
        "line 1: messages[0]: 'content' is ['a']; expected text.",
    ),
}


class TestBadInput:
    """Through the command line: one sentence, exit status 2, and no step."""

    @pytest.fixture
    def refused(self, model_folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

        def run(data="data.jsonl", *options, model=model_folder):
            given = [str(model), data, "--out-dir", "out", "--device", "cpu", *map(str, options)]
            result = CliRunner().invoke(app, given)
            assert result.exit_code == 2, result.output
            assert "Traceback" not in result.output
            assert not (tmp_path / "out" / "metrics.jsonl").exists()
            (text,) = [one for one in result.stderr.splitlines() if one.startswith("error: ")]
            return text.removeprefix("error: ")

        return run

    @pytest.mark.parametrize("case", BAD_LINES)
    def test_a_bad_line_is_named_with_file_line_and_field(self, refused, tmp_path, case):
        line, text = BAD_LINES[case]
        write(tmp_path / "data.jsonl", GOOD, line)
        found = refused()
        assert found == f"data.jsonl, {text}" or (
            text[-1] != "." and found.startswith(f"data.jsonl, {text}")
        )

    @pytest.mark.parametrize("case", BAD_TEXTS)
    def test_a_bad_text_is_named_with_file_line_and_field(self, refused, tmp_path, case):
        record, text = BAD_TEXTS[case]
        write(tmp_path / "data.jsonl", record)
        assert refused() == f"data.jsonl, {text}"

    def test_evaluation_data_is_checked_as_strictly(self, refused, tmp_path):
        write(tmp_path / "data.jsonl", GOOD)
        write(tmp_path / "eval.jsonl", GOOD, {"input_ids": [320], "labels": [320]})
        found = refused("data.jsonl", "--eval-data", "eval.jsonl")
        assert found.startswith("eval.jsonl, line 2: input_ids[0] is 320, the model knows 0 to 319")

    def test_nothing_but_masked_labels(self, refused, tmp_path):
        write(tmp_path / "data.jsonl", *[{"input_ids": [5, 6], "labels": [5, -100]}] * 2)
        assert refused() == (
            "data.jsonl has no label to train on: all are -100, or each sample's first; give "
            "labels equal to the ids where they are to be learnt."
        )

    def test_a_sample_longer_than_the_limit(self, refused, tmp_path):
        write(tmp_path / "data.jsonl", GOOD, "", {"input_ids": [1] * 9, "labels": [1] * 9})
        for limit in ("--max-tokens-per-rank", "--pack-length"):
            assert refused("data.jsonl", limit, 8) == (
                "data.jsonl, line 3 has 9 tokens, more than the 8 that a packed row may hold; "
                "raise the limit, or shorten or leave out the sample."
            )

    def test_a_file_without_samples_a_folder_and_no_file(self, refused, tmp_path):
        for content in ("", "\n \n"):
            (tmp_path / "data.jsonl").write_text(content)
            assert refused() == (
                'data.jsonl holds no samples; expected one {"input_ids": [...], "labels": [...]} '
                "a line."
            )
        (tmp_path / "folder.jsonl").mkdir()
        assert refused("folder.jsonl") == "folder.jsonl cannot be read: Is a directory."
        assert refused("none.jsonl") == "none.jsonl cannot be read: No such file or directory."

    def test_a_file_that_is_no_text(self, refused, tmp_path):
        (tmp_path / "data.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe\n")
        assert refused() == "data.jsonl, line 2 is not UTF-8 text (invalid start byte)."

    def test_text_without_a_tokenizer(self, refused, tmp_path, model_folder):
        (tmp_path / "bare").mkdir()
        for name in ("config.json", "model.safetensors"):
            (tmp_path / "bare" / name).symlink_to(model_folder / name)
        write(tmp_path / "data.jsonl", {"text": "a"})
        assert refused(model=tmp_path / "bare") == (
            "data.jsonl, line 1: 'text' needs a tokenizer, and the model folder has none; save one "
            "there, or give 'input_ids' and 'labels'."
        )

    def test_a_tokenizer_that_does_not_know_the_text(
        self, refused, tmp_path, model_folder, monkeypatch
    ):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        (tmp_path / "other").mkdir()
        for name in ("config.json", "model.safetensors"):
            (tmp_path / "other" / name).symlink_to(model_folder / name)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
        tokenizer.save_pretrained(tmp_path / "other")
        write(tmp_path / "data.jsonl", {"text": "one two six"}, {"text": "three four two"})
        assert refused(model=tmp_path / "other") == (
            "data.jsonl, line 2: 'text': 2 of 3 tokens are '<unk>', unknown to the tokenizer; use "
            "the one that the data was made for."
        )
