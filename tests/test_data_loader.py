"""Data on its way into a trainer: files, formats, orders, batches, and the place at which to go on."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import tracemalloc
from dataclasses import replace
from itertools import islice

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from pytest_ranks.errors import BadInputError
from pytest_ranks.models import byte_tokenizer
from pytest_ranks.models.ledger import LedgerTable
from pytest_ranks.observe.spies import watch
from pytest_ranks.reference.collate import MaxTokensPerRankCollator, collate
from pytest_ranks.reference.config import TrainConfig
from pytest_ranks.reference.data import JsonlDataset, count_targets
from pytest_ranks.reference.loader import data_loader
from pytest_ranks.reference.loss import counted_targets
from pytest_ranks.reference.packing import PACKERS
from pytest_ranks.reference.pretraining import Blocks
from pytest_ranks.reference.sampling import EpochSampler, InfiniteSampler, epoch_order
from pytest_ranks.reference.trainer import Trainer

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
    lines = (
        one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in records
    )
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

    def test_a_byte_order_mark_is_no_part_of_a_line(self, tmp_path):
        path = tmp_path / "a.jsonl"
        marked = b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n"
        path.write_bytes(marked + marked)  # two files in one
        dataset = JsonlDataset(path)
        assert [list(dataset[index]["input_ids"]) for index in range(2)] == [[1, 2, 3]] * 2

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
        ids = [123456] * 3000
        path = write(tmp_path / "a.jsonl", *[{"input_ids": ids, "labels": ids}] * 40)
        tracemalloc.start()
        try:
            dataset = JsonlDataset(path)
            kept, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert path.stat().st_size > 1_900_000
        assert kept < 60_000
        assert most < 900_000  # one line at a time
        assert len(pickle.dumps(dataset)) < 5_000

    def test_a_copy_for_another_process_reads_the_same(self, tmp_path, monkeypatch):
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "a.jsonl", GOOD)
        dataset = JsonlDataset("a.jsonl")
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert pickle.loads(pickle.dumps(dataset))[0] == dataset[0]

    def test_other_bytes_or_another_tokenizer_are_other_data(self, tmp_path):
        def fingerprint(*records, **options):
            path = write(tmp_path / "a.jsonl", *records)
            return JsonlDataset(path, tokenizer=byte_tokenizer(**options)).fingerprint

        found = fingerprint({"text": "ab"})
        assert found == fingerprint({"text": "ab"})
        assert found != fingerprint({"text": "ac"})
        assert found != fingerprint({"text": "ab"}, add_bos=True)

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

    def test_an_end_that_a_prompt_has_itself_stays(self, tmp_path):
        tokenizer = byte_tokenizer()
        path = write(tmp_path / "a.jsonl", {"prompt": "a<eos>", "completion": "b"})
        sample = JsonlDataset(path, tokenizer=tokenizer)[0]
        assert tokenizer.decode(sample["input_ids"]) == "a<eos>b<eos>"
        assert trained(sample, tokenizer) == ["b<eos>"]

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

    def test_an_end_within_a_turn_is_not_its_end(self, tmp_path):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = PLAIN_TEMPLATE
        turns = [*CONVERSATION[:2], {"role": "assistant", "content": "a<eos>b"}]
        assert trained(self.read(tmp_path, tokenizer, turns), tokenizer) == ["a<eos>b<eos>"]

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

    def test_a_tool_may_say_nothing(self, tmp_path):
        turns = [*CONVERSATION[:2], {"role": "tool", "content": ""}, CONVERSATION[2]]
        tokenizer = byte_tokenizer()
        assert trained(self.read(tmp_path, tokenizer, turns), tokenizer) == ["😀 yes 😀<eos>"]

    def test_arguments_of_a_tool_call_are_an_object_where_the_template_would_quote_a_text(
        self, tmp_path
    ):
        tokenizer = byte_tokenizer()
        shown = "m.content or m.tool_calls[0].function.arguments"
        for template, arguments, found in (
            (f"({shown}) | tojson", {"a": "é"}, '{"a": "é"}<eos>'),
            (shown, '{"a": "é"}', '{"a": "é"}<eos>'),
            (f"({shown}) | tojson", '{"a": "é"}', None),
        ):
            tokenizer.chat_template = (
                "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
                "{{ " + template + " }}<eos>{% endgeneration %}{% endif %}{% endfor %}"
            )
            call = {"role": "assistant", "tool_calls": [{"function": {"arguments": arguments}}]}
            if found is not None:
                assert trained(self.read(tmp_path, tokenizer, [call]), tokenizer) == [found]
                continue
            with pytest.raises(BadInputError) as caught:
                self.read(tmp_path, tokenizer, [call])
            assert str(caught.value).endswith(
                "line 1: messages[0]: 'arguments' of a tool call is a text, which the chat "
                "template quotes once more; give an object."
            )

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
                "{{ raise_exception('') }}",
                CONVERSATION,
                "the chat template cannot render 'messages' (TemplateError).",
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


def numbered(count):
    """Return samples that are known by their tokens: sample i is i + 2 times the id i."""
    return [{"input_ids": [i] * (i % 7 + 2), "labels": [i] * (i % 7 + 2)} for i in range(count)]


def drawn(micro_batches):
    """Return which of the numbered samples are in a rank's micro-batches, in order."""
    assert all(batch.input_ids.shape[0] == 1 for batch in micro_batches)
    starts = [
        int(token)
        for batch in micro_batches
        if batch.samples
        for token, position in zip(batch.input_ids[0], batch.position_ids[0], strict=True)
        if position == 0
    ]
    assert len(starts) == sum(batch.samples for batch in micro_batches)
    return starts


class TestEpochTracking:
    def test_an_epoch_is_a_permutation_of_its_seed_and_number(self):
        sampler = EpochSampler(50, seed=7)
        orders = []
        for epoch in range(3):
            sampler.set_epoch(epoch)
            orders.append(list(sampler))
            assert orders[-1] == epoch_order(50, seed=7, epoch=epoch)
            assert sorted(orders[-1]) == list(range(50))
        assert len({*map(tuple, orders)}) == 3
        assert list(EpochSampler(50, seed=8)) != orders[0]

    @given(size=st.integers(1, 40), cuts=st.lists(st.integers(0, 40), max_size=3))
    def test_interrupted_as_often_as_you_like_an_epoch_draws_each_index_once(self, size, cuts):
        """A second interruption counts from the epoch's start, not from the first."""
        found, state = [], EpochSampler(size, seed=1).state_dict()
        for cut in [*sorted(cuts), size]:
            sampler = EpochSampler(size, seed=1)
            sampler.load_state_dict(json.loads(json.dumps(state)))
            found += islice(sampler, max(0, min(cut, size) - len(found)))
            state = sampler.state_dict()
        assert found == list(EpochSampler(size, seed=1))

    def test_after_a_resumed_epoch_the_next_one_is_whole(self):
        sampler = EpochSampler(10, seed=1)
        sampler.set_epoch(3)
        list(islice(sampler, 4))
        resumed = EpochSampler(10, seed=1)
        resumed.load_state_dict(sampler.state_dict())
        resumed.set_epoch(3)  # as a loop over epochs does
        assert len(list(resumed)) == 6
        assert len(list(resumed)) == 10
        resumed.load_state_dict(sampler.state_dict())
        resumed.set_epoch(4)
        assert list(resumed) == epoch_order(10, seed=1, epoch=4)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"seed": 2}, "sampler with seed=1, this one has seed=2; use the same value"),
            ({"size": 9}, "sampler with size=10, this one has size=9; use the same value"),
            (
                {"shuffle": False},
                "sampler with shuffle=True, this one has shuffle=False; use the same value",
            ),
        ],
    )
    @pytest.mark.parametrize("kind", [EpochSampler, InfiniteSampler])
    def test_a_state_of_another_order_is_refused(self, kind, change, text):
        state = kind(10, seed=1).state_dict()
        with pytest.raises(BadInputError) as caught:
            kind(**{"size": 10, "seed": 1, **change}).load_state_dict(state)
        assert f"the state was saved by a {text}, or start anew." in str(caught.value)
        with pytest.raises(
            BadInputError, match="no state of a sampler: 'size' is missing; found n"
        ):
            kind(10).load_state_dict({})


class TestInfiniteSampler:
    def test_it_never_ends_and_each_cycle_is_a_permutation_of_its_own(self):
        sampler = InfiniteSampler(5, seed=3)
        found = list(islice(sampler, 25))
        cycles = [found[start : start + 5] for start in range(0, 25, 5)]
        assert cycles == [epoch_order(5, seed=3, epoch=epoch) for epoch in range(5)]
        assert len({*map(tuple, cycles)}) > 1
        assert not hasattr(sampler, "__len__")

    def test_same_seed_same_order_on_every_rank_and_its_own_for_another(self):
        def first(seed):
            return list(islice(InfiniteSampler(20, seed=seed), 40))

        assert first(1) == first(1) != first(2)

    @given(size=st.integers(1, 9), stops=st.lists(st.integers(0, 25), min_size=1, max_size=4))
    def test_it_goes_on_where_it_stopped_also_after_several_stops(self, size, stops):
        found, state = [], InfiniteSampler(size, seed=1).state_dict()
        for stop in stops:
            sampler = InfiniteSampler(size, seed=1)
            sampler.load_state_dict(state)
            found += islice(sampler, stop)
            state = sampler.state_dict()
            assert (state["drawn"], sampler.epoch) == (len(found), len(found) // size)
        assert found == list(islice(InfiniteSampler(size, seed=1), sum(stops)))


class TestMbCollateFn:
    """One packed row: documents one behind the other."""

    ROW = (
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},
        {"input_ids": [8, 9], "labels": [-100, 9]},
    )

    def test_samples_are_joined_and_positions_restart(self):
        batch = collate([self.ROW], pad_id=0, packed=True)
        assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
        assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
        assert batch.attention_mask is None
        assert batch.samples == 2

    def test_no_document_trains_the_end_of_the_one_before(self):
        row = [*self.ROW, {"input_ids": [3, 4], "labels": [3, 4]}]
        batch = collate([row], pad_id=0, packed=True)
        assert batch.labels.tolist() == [[-100, 6, 7, -100, 9, -100, 4]]
        assert int(counted_targets(batch.labels)) == sum(map(count_targets, row)) == 4

    def test_a_copy_on_another_device_knows_what_the_batch_knows(self):
        batch = replace(collate([[GOOD]], pad_id=0, packed=False), batch_targets=7)
        copy = batch.to(torch.device("meta"))
        assert (copy.samples, copy.batch_targets) == (1, 7)
        tensors = (copy.input_ids, copy.labels, copy.position_ids, copy.attention_mask)
        assert [one.device.type for one in tensors] == ["meta"] * 4

    def test_the_row_of_an_idle_rank_counts_for_nothing(self):
        batch = collate([], pad_id=0, packed=True)
        assert batch.samples == 0
        assert int(counted_targets(batch.labels)) == 0


class TestMaxTokensPerRankCollator:
    @given(
        lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
        world_size=st.integers(1, 5),
        packer=st.sampled_from(sorted(PACKERS)),
    )
    def test_returns_minibatches_that_hold_each_sample_once_within_the_limit(
        self, lengths, world_size, packer
    ):
        samples = [{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate(lengths)]
        ranks = [
            MaxTokensPerRankCollator(
                40, rank=rank, world_size=world_size, packer=PACKERS[packer], pad_id=99
            )(samples)
            for rank in range(world_size)
        ]
        assert len({len(own) for own in ranks}) == 1
        every = [batch for own in ranks for batch in own]
        assert all(batch.input_ids.shape[1] <= 40 for batch in every)
        assert sorted(sample for own in ranks for sample in drawn(own)) == [*range(len(samples))]
        targets = sum(int(counted_targets(batch.labels)) for batch in every)
        assert {batch.batch_targets for batch in every} == {targets}
        assert targets == sum(lengths) - len(lengths)

    def test_long_samples_are_refused_by_default(self):
        with pytest.raises(BadInputError, match="sample 1 has 9 tokens, more than the 8 that a p"):
            MaxTokensPerRankCollator(8)([GOOD, {"input_ids": [1] * 9, "labels": [1] * 9}])

    def test_filtered_samples_are_told_and_do_not_count(self):
        """The count that losses are divided by is of what is trained, not of what was read."""
        batch = [GOOD, {"input_ids": [1] * 9, "labels": [1] * 9}, GOOD]
        collator = MaxTokensPerRankCollator(8, overlong="drop")
        told = "1 of 3 samples of a batch have more than 8 tokens and are left out."
        with pytest.warns(UserWarning, match=f"^{re.escape(told)}$"):
            (found,) = collator(batch)
        assert (found.samples, found.batch_targets) == (2, 4)
        assert int(counted_targets(found.labels)) == 4

    def test_where_all_are_filtered_every_rank_still_runs_one_row(self):
        batch = [{"input_ids": [1] * 9, "labels": [1] * 9}]
        for rank in range(3):
            collator = MaxTokensPerRankCollator(8, rank=rank, world_size=3, overlong="drop")
            with pytest.warns(UserWarning, match="1 of 1 samples of a batch"):
                (found,) = collator(batch)
            assert (found.samples, found.batch_targets) == (0, 0)

    def test_a_long_sample_can_have_a_row_of_its_own(self):
        batch = [{"input_ids": [1] * n, "labels": [1] * n} for n in (9, 3, 3)]
        found = MaxTokensPerRankCollator(8, overlong="own")(batch)
        assert sorted(one.input_ids.shape[1] for one in found) == [6, 9]
        assert {one.batch_targets for one in found} == {12}

    def test_an_unknown_policy_is_refused(self):
        with pytest.raises(BadInputError) as caught:
            MaxTokensPerRankCollator(8, overlong="dorp")
        assert str(caught.value) == (
            "overlong='dorp': expected one of 'error', 'drop', 'own'. Did you mean 'drop'?"
        )


def make_loader(count=23, **more):
    settings = {"global_batch": 4, "max_tokens_per_rank": 12, "seed": 3, "pad_id": 999}
    return data_loader(numbered(count), **{**settings, **more})


def batches(loader):
    return [drawn(step) for step in loader]


def through_json(state):
    return json.loads(json.dumps(state))


forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


class TestGetDataLoader:
    @pytest.mark.parametrize("world_size", [1, 2, 3, 8])
    @pytest.mark.parametrize("count", [1, 7, 8, 9])
    def test_each_sample_is_loaded_once_and_all_ranks_run_as_often(self, world_size, count):
        """Also on more ranks than there are samples, and with a short last batch."""
        loaders = [
            make_loader(count, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        found, order = [], epoch_order(count, seed=3, epoch=0)
        for number, steps in enumerate(zip(*loaders, strict=True)):
            assert len({len(step) for step in steps}) == 1
            window = [sample for step in steps for sample in drawn(step)]
            assert sorted(window) == sorted(order[4 * number : 4 * number + 4])
            found += window
        assert sorted(found) == list(range(count))

    def test_too_long_a_sample_is_named_before_the_first_batch(self, tmp_path):
        path = write(tmp_path / "a.jsonl", GOOD, {"input_ids": [1] * 9, "labels": [1] * 9})
        with pytest.raises(BadInputError, match=r"a\.jsonl, line 2 has 9 tokens, more than the 8"):
            data_loader(JsonlDataset(path), global_batch=1, max_tokens_per_rank=8)

    @pytest.mark.ranks(2)
    def test_two_ranks_load_the_two_halves_of_every_global_batch(self, rank, tmp_path):
        """The same file on both, and not a word between them until the end."""
        path = write(tmp_path / f"{rank.index}.jsonl", *numbered(10))
        loader = data_loader(
            JsonlDataset(path),
            global_batch=4,
            max_tokens_per_rank=12,
            rank=rank.index,
            world_size=rank.world_size,
            pad_id=999,
        )
        with watch(torch.nn.Linear, rank=rank.index) as seen:
            own = [(drawn(step), len(step), step[0].batch_targets) for step in loader]
        assert seen.collectives == []
        both = [None, None]
        dist.all_gather_object(both, own)
        order = epoch_order(10, seed=0, epoch=0)
        for number, (one, other) in enumerate(zip(*both, strict=True)):
            assert sorted(one[0] + other[0]) == sorted(order[4 * number : 4 * number + 4])
            assert one[1:] == other[1:]


class TestDataLoaderBatchCount:
    @pytest.mark.parametrize(("count", "expected"), [(1, 1), (4, 1), (5, 2), (23, 6), (24, 6)])
    @pytest.mark.parametrize("world_size", [1, 3])
    def test_an_epoch_has_as_many_batches_as_it_says_on_any_world(
        self, count, expected, world_size
    ):
        loader = make_loader(count, world_size=world_size)
        assert len(loader) == expected == len(list(loader)) == len(list(loader))


class TestResume:
    @pytest.mark.parametrize("epoch", [0, 2])
    @pytest.mark.parametrize("stop", range(7))
    def test_the_rest_of_an_epoch_is_what_was_not_handed_out(self, epoch, stop):
        whole = make_loader()
        whole.set_epoch(epoch)
        expected = batches(whole)
        loader = make_loader()
        loader.set_epoch(epoch)
        before = [drawn(step) for step in islice(loader, stop)]
        state = through_json(loader.state_dict())
        resumed = make_loader()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        resumed.set_epoch(epoch)  # as a loop over epochs does
        assert before + batches(resumed) == expected
        assert len(expected) == 6
        resumed.set_epoch(epoch + 1)
        whole.set_epoch(epoch + 1)
        assert batches(resumed) == batches(whole) != expected

    def test_resumed_twice_in_an_epoch(self):
        expected, found = batches(make_loader()), []
        state = make_loader().state_dict()
        for stop in (1, 2, 3):
            loader = make_loader()
            loader.load_state_dict(state)
            found += [drawn(step) for step in islice(loader, stop)]
            state = loader.state_dict()
        assert found == expected

    def test_a_state_after_the_end_leaves_nothing_to_repeat(self):
        loader = make_loader()
        list(loader)
        assert loader.state_dict()["drawn"] == 23
        resumed = make_loader()
        resumed.load_state_dict(loader.state_dict())
        assert batches(resumed) == []
        assert len(batches(resumed)) == 6
        loader.set_epoch(1)
        assert (loader.state_dict()["epoch"], loader.state_dict()["drawn"]) == (1, 0)

    @forks
    @pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 0), (0, 2)])
    def test_what_loading_processes_drew_ahead_is_not_lost(self, before, after):
        """Two processes are four batches ahead; the state speaks of what was handed out."""
        loader = make_loader(workers=before)
        steps = iter(loader)
        found = [drawn(next(steps)) for _ in range(2)]
        state = loader.state_dict()
        assert state["drawn"] == 8
        steps.close()
        resumed = make_loader(workers=after)
        resumed.load_state_dict(state)
        assert found + batches(resumed) == batches(make_loader())

    @forks
    def test_a_file_read_by_loading_processes(self, tmp_path):
        path = write(tmp_path / "a.jsonl", *numbered(9))

        def load(workers):
            dataset = JsonlDataset(path)
            dataset[0]  # its map is open when the processes are forked
            return data_loader(
                dataset, global_batch=2, max_tokens_per_rank=12, workers=workers, pad_id=999
            )

        assert batches(load(2)) == batches(load(0))

    def test_a_state_is_small_whatever_there_is_to_load(self):
        assert len(json.dumps(make_loader(5000).state_dict())) < 200

    @pytest.mark.parametrize(
        ("more", "text"),
        [
            ({"count": 22}, "size=23, this one has size=22"),
            ({"seed": 4}, "seed=3, this one has seed=4"),
            ({"shuffle": False}, "shuffle=True, this one has shuffle=False"),
            ({"global_batch": 2}, "global_batch=4, this one has global_batch=2"),
        ],
    )
    def test_a_state_of_another_run_is_refused(self, more, text):
        with pytest.raises(BadInputError) as caught:
            make_loader(**more, elastic=True).load_state_dict(make_loader().state_dict())
        assert str(caught.value) == (
            f"the state was saved by a loader with {text}; use the same value, or start anew."
        )

    def test_a_state_of_another_file_is_refused(self, tmp_path):
        first, second = numbered(4), [*reversed(numbered(4))]
        loaders = [
            data_loader(
                JsonlDataset(write(tmp_path / name, *records)),
                global_batch=2,
                max_tokens_per_rank=12,
            )
            for name, records in (("a.jsonl", first), ("b.jsonl", second), ("c.jsonl", first))
        ]
        state = loaders[0].state_dict()
        loaders[2].load_state_dict(state)
        with pytest.raises(
            BadInputError, match=r"a loader with data='4-[0-9a-f]{8}', this one has"
        ):
            loaders[1].load_state_dict(state)

    def test_another_world_size_has_to_be_declared(self):
        state = make_loader().state_dict()
        with pytest.raises(BadInputError) as caught:
            make_loader(world_size=2).load_state_dict(state)
        assert str(caught.value) == (
            "the state was saved by a loader for 1 ranks, this one is for 2; give elastic=True if "
            "the batches that are left may be laid out anew."
        )

    @forks
    @pytest.mark.ranks(4)
    @pytest.mark.parametrize("workers", [0, 2])
    def test_one_rank_then_two_then_four_draw_each_sample_once(self, rank, workers):
        """Elastic: the run is stopped twice in an epoch and goes on on twice as many ranks."""
        order = epoch_order(23, seed=3, epoch=1)
        state, own = None, []
        for world_size, steps in ((1, 1), (2, 2), (4, 3)):
            if rank.index < world_size:
                loader = make_loader(
                    rank=rank.index, world_size=world_size, workers=workers, elastic=True
                )
                loader.set_epoch(1)
                if state is not None:
                    loader.load_state_dict(state)
                own.append([drawn(step) for step in islice(loader, steps)])
                state = loader.state_dict()
            states = [None] * rank.world_size
            dist.all_gather_object(states, state)
            assert states[:world_size] == [states[0]] * world_size  # equal on all ranks
            state = states[0]
        every = [None] * rank.world_size
        dist.all_gather_object(every, own)
        stages = [[parts[-stage] for parts in every if len(parts) >= stage] for stage in (3, 2, 1)]
        windows = [
            [sample for part in step for sample in part]
            for stage in stages
            for step in zip(*stage, strict=True)
        ]
        assert [len(stage) for stage in stages] == [1, 2, 4]
        assert [sorted(window) for window in windows] == [
            sorted(order[start : start + 4]) for start in range(0, 23, 4)
        ]


class TestTrainerData:
    class Watched(list):
        """Samples that know in which order they were drawn."""

        def __init__(self, samples):
            super().__init__(samples)
            self.drawn = []

        def __getitem__(self, index):
            self.drawn.append(index)
            return super().__getitem__(index)

    @pytest.mark.parametrize("stop", [1, 5, 6, 8])
    def test_a_resumed_run_draws_what_is_left_of_its_epoch(self, tmp_path, stop):
        """Two epochs of six steps, the last of three samples: stopped in, at the end of and after one."""

        def train(**more):
            samples = self.Watched(numbered(23))
            settings = {
                "optimizer": "sgd",
                "micro_batch": 4,
                "seed": 3,
                "device": "cpu",
                "out_dir": tmp_path,
                **more,
            }
            Trainer(TrainConfig(**settings), model=LedgerTable(), samples=samples).train()
            return samples.drawn

        whole = [index for epoch in (0, 1) for index in epoch_order(23, seed=3, epoch=epoch)]
        before = train(max_steps=stop, checkpoint_every=stop)
        after = train(max_steps=12, resume_from=tmp_path)
        assert before + after == whole


documents = st.lists(st.integers(1, 12), min_size=1, max_size=8)
block = st.integers(2, 9)


def stream_of(lengths):
    """Return documents whose tokens are numbered through."""
    made, start = [], 0
    for length in lengths:
        ids = [*range(start, start + length)]
        made.append({"input_ids": ids, "labels": ids})
        start += length
    return made


def targets(sample):
    return [label for label in sample["labels"][1:] if label != -100]


class TestPretrainingBlocks:
    @given(lengths=documents, length=block)
    def test_every_token_is_in_one_block_and_every_block_but_the_last_is_full(
        self, lengths, length
    ):
        blocks = Blocks(stream_of(lengths), length)
        found = [list(blocks[i]["input_ids"]) for i in range(len(blocks))]
        assert [token for ids in found for token in ids] == [*range(sum(lengths))]
        assert {len(ids) for ids in found[:-1]} <= {length}
        assert blocks.lengths == [len(ids) for ids in found]
        assert len(blocks) == math.ceil(sum(lengths) / length)
        assert blocks.counted == [len(ids) - 1 for ids in found]

    @given(lengths=documents, length=block)
    def test_dropped_is_what_no_block_holds(self, lengths, length):
        total = sum(lengths)
        if total < length:
            with pytest.raises(BadInputError, match=f"make no block of {length} with last='drop'"):
                Blocks(stream_of(lengths), length, last="drop")
            return
        blocks = Blocks(stream_of(lengths), length, last="drop")
        assert blocks.lengths == [length] * (total // length)
        assert blocks.dropped == total % length
        assert list(blocks[len(blocks) - 1]["input_ids"])[-1] == total - blocks.dropped - 1

    @given(lengths=documents, length=block)
    def test_padding_is_not_trained(self, lengths, length):
        blocks = Blocks(stream_of(lengths), length, last="pad", pad_id=7777)
        assert blocks.lengths == [length] * math.ceil(sum(lengths) / length)
        tokens = [token for i in range(len(blocks)) for token in blocks[i]["input_ids"]]
        missing = -sum(lengths) % length
        assert tokens == [*range(sum(lengths)), *[7777] * missing]
        last = list(blocks[len(blocks) - 1]["labels"])
        assert last[length - missing :] == [-100] * missing
        assert sum(blocks.counted) == sum(lengths) - len(blocks)

    @given(lengths=documents, length=block)
    def test_with_an_overlap_every_token_but_the_first_is_trained_once(self, lengths, length):
        blocks = Blocks(stream_of(lengths), length, overlap=1)
        trained_tokens = [token for i in range(len(blocks)) for token in targets(blocks[i])]
        assert trained_tokens == [*range(1, sum(lengths))]
        assert len(blocks) == max(1, math.ceil((sum(lengths) - 1) / (length - 1)))
        assert all(n <= length for n in blocks.lengths)

    @given(lengths=documents, length=block)
    def test_isolated_documents_share_no_block_and_none_is_lost(self, lengths, length):
        blocks = Blocks(stream_of(lengths), length, isolated=True)
        owner = [number for number, size in enumerate(lengths) for _ in range(size)]
        found = [list(blocks[i]["input_ids"]) for i in range(len(blocks))]
        assert [token for ids in found for token in ids] == [*range(sum(lengths))]
        assert all(len({owner[token] for token in ids}) == 1 for ids in found)
        assert len(blocks) == sum(math.ceil(size / length) for size in lengths)

    @pytest.mark.parametrize("last", ["partial", "drop"])
    @pytest.mark.parametrize("isolated", [False, True])
    @pytest.mark.parametrize("overlap", [0, 1])
    @given(lengths=documents, length=block)
    def test_blocks_hold_and_drop_all_tokens_together(
        self, last, isolated, overlap, lengths, length
    ):
        try:
            blocks = Blocks(
                stream_of(lengths), length, last=last, isolated=isolated, overlap=overlap
            )
        except BadInputError:
            assert last == "drop"
            assert max(lengths if isolated else [sum(lengths)]) < length
            return
        held = {token for i in range(len(blocks)) for token in blocks[i]["input_ids"]}
        assert len(held) + blocks.dropped == sum(lengths)

    def test_documents_keep_their_own_labels_and_are_read_only_where_needed(self, tmp_path):
        records = [
            GOOD,
            {"input_ids": [4, 5], "labels": [4, -100]},
            {"input_ids": [6], "labels": [6]},
        ]
        read = []

        class Watched(JsonlDataset):
            def __getitem__(self, index):
                read.append(index)
                return super().__getitem__(index)

        blocks = Blocks(Watched(write(tmp_path / "a.jsonl", *records)), 4)
        assert read == []
        assert {k: list(v) for k, v in blocks[1].items()} == {
            "input_ids": [5, 6],
            "labels": [-100, 6],
        }
        assert read == [1, 2]
        assert list(blocks[0]["labels"]) == [-100, 2, 3, 4]
        path = tmp_path / "a.jsonl"
        assert blocks.name(0) == f"block 0 ({path}, line 1 to {path}, line 2)"

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (
                {"length": 1},
                "length=1: expected a whole number of at least 2; a block's first token is not "
                "trained.",
            ),
            (
                {"last": "patial"},
                "last='patial': expected one of 'partial', 'drop', 'pad'. Did you mean 'partial'?",
            ),
            ({"overlap": 2}, "overlap=2: expected 0 or 1."),
            (
                {"last": "drop", "length": 9},
                "3 tokens in 1 documents make no block of 9 with last='drop'; give more documents, "
                "shorter blocks or last='partial'.",
            ),
        ],
    )
    def test_what_cannot_be_cut_is_said(self, arguments, text):
        with pytest.raises(BadInputError) as caught:
            Blocks([GOOD], **{"length": 2, **arguments})
        assert str(caught.value) == text
