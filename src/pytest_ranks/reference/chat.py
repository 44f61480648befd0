"""Conversations through a tokenizer's chat template, trained on what the assistant says in every turn.

A template with `{% generation %}` tags says itself what is trained. For one without them, each turn is
found as what the template adds to the conversation before it.
"""

from __future__ import annotations

import json
import re
from array import array
from typing import TYPE_CHECKING, Any

from pytest_ranks.errors import BadInputError, did_you_mean
from pytest_ranks.reference.loss import IGNORED
from pytest_ranks.reference.records import checked_text, shown

if TYPE_CHECKING:
    from pytest_ranks.reference.records import Sample

    Span = tuple[int, int]
    """Characters that are trained: the first, and the one behind the last."""

ROLES = ("system", "developer", "user", "assistant", "tool")
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def read_messages(record: dict[str, Any], tokenizer: Any, where: str) -> Sample:
    """Return a conversation as a sample; `tools`, if the record has them, go to the template too.

    Args:
        record: with `messages`, each with `role` and `content`.
        tokenizer: with a chat template; a fast one, which knows where in the text a token lies.
        where: how messages call the record.

    Raises:
        BadInputError: it is no conversation, or the template cannot render it or say what is trained.
    """
    messages = _checked(record["messages"], where)
    if not getattr(tokenizer, "chat_template", None):
        raise BadInputError(
            f"{where}: 'messages' needs a chat template, and the tokenizer has none; set "
            "tokenizer.chat_template and save it, or give 'prompt' and 'completion'."
        )
    if not tokenizer.is_fast:
        raise BadInputError(
            f"{where}: 'messages' needs a fast tokenizer, which says where in the text a token "
            f"lies; found {type(tokenizer).__name__}."
        )
    chat = _Chat(tokenizer, record.get("tools"), where)
    turns = [place for place, one in enumerate(messages) if one["role"] == "assistant"]
    text, spans = chat.render(messages)
    checked_text(text, where=f"{where}: what the chat template makes of 'messages'")
    _check_arguments(messages, text, where)
    if chat.tagged and len(spans) != len(turns):
        raise BadInputError(
            f"{where}: the chat template's generation tags mark {len(spans)} turns, found "
            f"{len(turns)} of the role 'assistant' in 'messages'; correct the template."
        )
    if not chat.tagged:
        spans = [chat.turn(messages, place, text) for place in turns]
    return _label(text, spans, tokenizer, up_to_the_end=not chat.tagged, where=where)


def _checked(messages: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list):
        raise BadInputError(f"{where}: 'messages' is {shown(messages)}; expected a list of turns.")
    for place, one in enumerate(messages):
        here = f"{where}: messages[{place}]"
        if not isinstance(one, dict):
            raise BadInputError(
                f"{here} is {shown(one)}; expected an object with 'role' and 'content'."
            )
        role = one.get("role")
        if role not in ROLES:
            raise BadInputError(
                f"{here}: 'role' is {shown(role)}; expected one of {', '.join(ROLES)}."
                f"{did_you_mean(str(role), ROLES)}"
            )
        if not (role == "assistant" and one.get("tool_calls")):
            checked_text(one.get("content"), where=f"{here}: 'content'", empty=role == "tool")
        if role == "assistant" and one.get("weight", 1) != 1:
            raise BadInputError(
                f"{here}: 'weight' is {shown(one['weight'])}, and every assistant turn is trained "
                "alike; leave the field out, or give 'input_ids' and 'labels'."
            )
    if not any(one["role"] == "assistant" for one in messages):
        raise BadInputError(
            f"{where}: 'messages' has no turn of the role 'assistant': nothing of it would be "
            "trained; leave the sample out."
        )
    return messages


def _check_arguments(messages: list[dict[str, Any]], text: str, where: str) -> None:
    """Refuse a tool call's arguments given as JSON in a text where the template quotes texts once more.

    Raises:
        BadInputError: the model would learn to answer with a quoted text in place of an object.
    """
    for place, one in enumerate(messages):
        calls = one.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            owner = call.get("function", call) if isinstance(call, dict) else {}
            given = owner.get("arguments") if isinstance(owner, dict) else None
            if not isinstance(given, str) or '"' not in given:
                continue
            if json.dumps(given, ensure_ascii=False) in text:
                raise BadInputError(
                    f"{where}: messages[{place}]: 'arguments' of a tool call is a text, which the "
                    "chat template quotes once more; give an object."
                )


class _Chat:
    """A tokenizer's template, for one record."""

    def __init__(self, tokenizer: Any, tools: Any, where: str) -> None:
        self._tokenizer = tokenizer
        self._tools = tools
        self._where = where
        self._template = tokenizer.get_chat_template(None, tools)
        self.tagged = GENERATION_TAG.search(self._template) is not None

    def render(
        self, messages: list[dict[str, Any]], *, ask: bool = False
    ) -> tuple[str, list[Span]]:
        """Return the text, and the parts of it that lie between generation tags.

        Args:
            messages: the conversation.
            ask: whether to add what makes the model answer.
        """
        # `apply_chat_template` gives a mask in place of the parts: one that loses a last character
        # of several tokens, and runs to the conversation's end behind a space that has no token.
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        present = [{k: v for k, v in one.items() if v is not None} for one in messages]
        try:
            texts, spans = render_jinja_template(
                conversations=[present],
                tools=self._tools,
                chat_template=self._template,
                return_assistant_tokens_mask=self.tagged and not ask,
                add_generation_prompt=ask,
                **self._tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise BadInputError(
                f"{self._where}: the chat template cannot render 'messages' ({reason})."
            ) from error
        return texts[0], [tuple(span) for span in spans[0]] if self.tagged and not ask else []

    def turn(self, messages: list[dict[str, Any]], place: int, whole: str) -> Span:
        """Return where a turn lies, from the texts without it and up to it.

        Raises:
            BadInputError: one of them does not begin as the next one does.
        """
        if place == 0:
            raise BadInputError(
                f"{self._where}: messages[0] is an assistant turn; a chat template without "
                "generation tags needs another before it."
            )
        before, _ = self.render(messages[:place], ask=True)
        until, _ = self.render(messages[: place + 1])
        if not (until.startswith(before) and whole.startswith(until)):
            raise BadInputError(
                f"{self._where}: the chat template renders what is before messages[{place}] or up "
                "to it in another way than in the whole conversation, so that the turn cannot be "
                "found; use a template with {% generation %} tags."
            )
        return len(before), len(until)


def _label(
    text: str, spans: list[Span], tokenizer: Any, *, up_to_the_end: bool, where: str
) -> Sample:
    """Tokenise the whole conversation at once; train the tokens that lie inside the spans.

    Args:
        text: the conversation.
        spans: what is trained.
        tokenizer: a fast one.
        up_to_the_end: whether a span ends with its last end-of-text token: what the template puts
            behind it, often a line break, is never asked of the model.
        where: how messages call the record.
    """
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = found["input_ids"], found["offset_mapping"]
    labels = [IGNORED] * len(ids)
    for number, (first, behind) in enumerate(spans, start=1):
        inside = [
            place for place, (start, end) in enumerate(offsets) if first <= start < end <= behind
        ]
        ends = [place for place in inside if ids[place] == tokenizer.eos_token_id]
        if up_to_the_end and ends:
            inside = [place for place in inside if place <= ends[-1]]
        if not inside:
            raise BadInputError(
                f"{where}: assistant turn {number} of 'messages' has no token of its own after the "
                "chat template; leave the turn out."
            )
        for place in inside:
            labels[place] = ids[place]
    return {"input_ids": array("i", ids), "labels": array("i", labels)}
