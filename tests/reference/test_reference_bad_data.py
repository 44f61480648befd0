"""Every file that cannot be trained on is named, with line and field, before the first step."""

from __future__ import annotations

import gzip
import json
import os
import re

import pytest
from typer.testing import CliRunner

from pytest_ranks.models import byte_tokenizer
from pytest_ranks.reference.cli import app

GOOD = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}


def write(path, *records):
    lines = (one if isinstance(one, str) else json.dumps(one) for one in records)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


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
    "an id of more than four bytes": (
        {"input_ids": [1, 2**31], "labels": [1, 2]},
        "line 2: input_ids[1] is 2147483648; expected a token id: a whole number of at most "
        "2147483647.",
    ),
    "a long value": (
        {"input_ids": [1, "x" * 5_000_000], "labels": [1, 2]},
        f"line 2: input_ids[1] is '{'x' * 79}... (5000002 characters); expected a token id: a whole "
        "number of at least 0.",
    ),
    "a key twice": (
        '{"input_ids": [1, 2], "labels": [1, 2], "labels": [-100, 2]}',
        "line 2: not JSON that can be read (the key 'labels' is there twice); expected one object "
        "a line.",
    ),
    "many fields": (
        {f"field{n}": n for n in range(20)},
        "line 2: the field 'input_ids' is missing; found 'field0', 'field1', 'field2', 'field3', "
        "'field4', 'field5', 'field6', 'field7' and 12 more.",
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
    "half a surrogate pair": (
        {"text": "a\ud800b"},
        "line 1: 'text' has half a surrogate pair, '\\ud800', at character 1: no tokenizer takes "
        "it; correct what wrote it.",
    ),
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
    "a turn that another trainer would weigh": (
        {"messages": [{"role": "assistant", "content": "b", "weight": 0}]},
        "line 1: messages[0]: 'weight' is 0, and every assistant turn is trained alike; leave the "
        "field out, or give 'input_ids' and 'labels'.",
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

    def test_a_file_of_another_kind(self, refused, tmp_path):
        (tmp_path / "data.jsonl").write_bytes(gzip.compress(json.dumps(GOOD).encode()))
        assert refused() == (
            "data.jsonl is a gzip file; expected lines of UTF-8 text: unpack or convert it."
        )
        os.mkfifo(tmp_path / "pipe")
        assert refused("pipe") == (
            "pipe is a pipe or a device, and lines are drawn from their place in a file; write it "
            "to the disk first."
        )

    def test_other_data_than_the_run_that_is_resumed(self, refused, tmp_path, model_folder):
        write(tmp_path / "data.jsonl", GOOD, {"input_ids": [4, 5], "labels": [4, 5]})
        given = [str(model_folder), "data.jsonl", "--out-dir", "first", "--device", "cpu"]
        result = CliRunner().invoke(app, [*given, "--max-steps", "1", "--checkpoint-every", "1"])
        assert result.exit_code == 0, result.output
        write(tmp_path / "data.jsonl", {"input_ids": [4, 5], "labels": [4, 5]}, GOOD)
        found = refused("data.jsonl", "--max-steps", 2, "--resume-from", "first")
        assert re.fullmatch(
            r"first/checkpoint-1\.pt was trained with data='2-[0-9a-f]{8}', this run has "
            r"data='2-[0-9a-f]{8}'; use the same value, or start without resume_from\.",
            found,
        )

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


def test_blocks_are_cut_from_the_command_line(model_folder, tmp_path, monkeypatch):
    """Five documents of seven tokens in blocks of ten: four blocks, 31 targets."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data.jsonl", *[{"text": "abcdef"}] * 5)
    given = [str(model_folder), "data.jsonl", "--device", "cpu", "--block-length"]
    result = CliRunner().invoke(app, [*given, "10", "--out-dir", "out", "--micro-batch", "4"])
    assert result.exit_code == 0, result.output
    assert "1 steps, 31 trained tokens" in result.output
    result = CliRunner().invoke(app, [*given, "65", "--out-dir", "more"])
    assert result.exit_code == 2
    assert "error: --block-length=65 is more than the 64 positions of the model." in result.stderr
