"""Rounds of calls with every template: what runs, what the model is told, what is kept.

The model's answers are scripted; engine, tokenizers and templates are the real ones.
"""

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.messages import ToolMessage
from mistral_common.protocol.instruct.tool_calls import Function, Tool

from mistral_chat.chat.answer import Answer, Delta
from mistral_chat.chat.functions import CallsCancelledError, PythonFunctions
from mistral_chat.chat.rounds import MAX_ROUNDS, CallResult, Rounds
from mistral_chat.chat.tools import UNREADABLE, ToolCall
from mistral_chat.errors import ContextLengthError, PromptError, UsageError
from tests.chat.test_chat import GREEDY, Talk
from tests.chat.test_functions import ARGUMENTS, EVERY_TYPE, write

TEMPLATES = ("v3", "small tekken", "v7", "small tekken v7", "v11", "v13", "v15")
NAMES = ("f", "g", "every")
TOOLS = [Tool(function=Function(name=name, parameters={"type": "object"})) for name in NAMES]
Calls = list[tuple[str, dict[str, Any]]]


def say(talk: Talk, text: str) -> list[int]:
    return [*talk.ids(text), talk.tokenizer.eos_id]


def ask(talk: Talk, calls: Calls, before: str = "") -> list[int]:
    """Write calls as a model of this template does."""
    made = talk.tokenizer
    start = made.tool_calls_id
    assert start is not None
    ids = talk.ids(before) if before else []
    if made.args_id is None:
        listed = [{"name": name, "arguments": arguments} for name, arguments in calls]
        ids += [start, *talk.ids(json.dumps(listed, ensure_ascii=False))]
    else:
        for name, arguments in calls:
            text = json.dumps(arguments, ensure_ascii=False)
            ids += [start, *talk.ids(name), made.args_id, *talk.ids(text)]
    return [*ids, made.eos_id]


def garble(talk: Talk) -> list[int]:
    """Write a call that cannot be parsed."""
    assert talk.tokenizer.tool_calls_id is not None
    return [talk.tokenizer.tool_calls_id, *talk.ids("nonsense {"), talk.tokenizer.eos_id]


class Turn:
    """A message and everything that follows."""

    def __init__(
        self,
        talk: Talk,
        answers: list[list[int]],
        run: Callable[[ToolCall], str] = lambda call: f"result of {call.name}",
        text: str = "Hi",
    ) -> None:
        talk.runner.script = deque(id_ for answer in answers for id_ in answer)
        self.prompts: list[list[int]] = []
        self.shown: list[str] = []
        self.raw: list[str] = []
        self.results: list[CallResult] = []
        self.answers: list[Answer] = []
        self.rounds = Rounds(talk.chat, GREEDY, run)
        stream = talk.chat.send(text, GREEDY)
        following: Any = stream
        while following is not None:
            stream = following
            self.prompts.append(stream._request.ids)
            for event in stream:
                if isinstance(event, Delta):
                    (self.raw if event.is_call else self.shown).append(event.text)
            assert stream.answer is not None
            self.answers.append(stream.answer)
            self.results += self.rounds.results(stream.answer)
            following = self.rounds.go_on()


def roles(talk: Talk) -> list[str]:
    return [message.role for message in talk.chat.conversation.messages]


def decoded(talk: Talk, ids: list[int]) -> str:
    return "".join(map(talk.tokenizer.piece, ids))


@pytest.mark.parametrize("name", TEMPLATES)
def test_arguments_of_every_json_type_make_the_round_trip(name: str, tmp_path: Path) -> None:
    with PythonFunctions(write(tmp_path, EVERY_TYPE), 20) as functions:
        talk = Talk(name, 20_000, tools=functions.tools)
        script = [ask(talk, [("every", ARGUMENTS)]), say(talk, "Done.")]
        turn = Turn(talk, script, functions.call)
    (result,) = turn.results
    assert json.loads(result.text) == ARGUMENTS
    assert turn.answers[-1].text == "Done."
    assert turn.rounds.ended is None
    (message,) = [m for m in talk.chat.conversation.messages if isinstance(m, ToolMessage)]
    assert json.loads(str(message.content)) == ARGUMENTS
    told = talk.tokenizer.raw.get_special_token("[TOOL_RESULTS]")
    assert turn.prompts[1].count(told) == 1
    assert "🙂" in talk.tokenizer.raw.decode(turn.prompts[1][turn.prompts[1].index(told) :])


@pytest.mark.parametrize("name", TEMPLATES)
def test_several_calls_in_one_answer_are_run_in_order(name: str) -> None:
    talk = Talk(name, tools=TOOLS)
    calls: Calls = [("f", {"n": 1}), ("g", {}), ("f", {"n": 2})]
    seen: list[tuple[str, dict[str, Any]]] = []

    def run(call: ToolCall) -> str:
        seen.append((call.name, call.arguments))
        return f"result {len(seen)}"

    turn = Turn(talk, [ask(talk, calls), ask(talk, calls[:1]), say(talk, "Done.")], run)
    assert seen == [*calls, calls[0]]
    assert [r.text for r in turn.results] == [f"result {n}" for n in (1, 2, 3, 4)]
    assert roles(talk) == ["user", "assistant", *["tool"] * 3, "assistant", "tool", "assistant"]
    last = decoded(talk, turn.prompts[-1])
    places = [last.index(f"result {n}") for n in (1, 2, 3, 4)]
    assert places == sorted(places)
    assert "Done." in decoded(talk, talk.next_prompt())
    assert talk.chat.conversation.undo() == "Hi"
    assert roles(talk) == []


@pytest.mark.parametrize("name", TEMPLATES)
def test_raw_calls_are_told_apart_from_what_is_said(name: str) -> None:
    talk = Talk(name, tools=TOOLS)
    turn = Turn(talk, [ask(talk, [("f", {})], "I will look."), say(talk, "It rains.")])
    assert "".join(turn.shown) == "I will look.It rains."
    first = turn.answers[0]
    assert first.said == "I will look."
    assert first.said + "".join(turn.raw) == first.text
    assert turn.raw[0].startswith("[TOOL_CALLS]")
    # Templates before v7 allow no text beside calls.
    assert (
        "I will look." in decoded(talk, turn.prompts[1])
    ) is talk.tokenizer.template.calls_have_text


# What was run is not run again: everything up to the call if the template adds an id that the
# model left out (v3 to v11), else all but the end token, which was never run.
@pytest.mark.parametrize("name", TEMPLATES)
def test_results_reuse_the_cache(name: str) -> None:
    talk = Talk(name, tools=TOOLS)
    turn = Turn(
        talk, [ask(talk, [("f", {"a": [1, 2]})]), ask(talk, [("g", {})]), say(talk, "Done.")]
    )
    for before, after in zip(turn.answers, turn.answers[1:], strict=False):
        held = before.usage.prompt_tokens + before.usage.completion_tokens - 1
        assert after.usage.cached_tokens >= before.usage.prompt_tokens
        if not talk.tokenizer.template.calls_have_ids:
            assert after.usage.cached_tokens == held


@pytest.mark.parametrize("name", ["v3", "v11", "v13"])
def test_history_holds_the_ids_of_calls_that_the_template_would_write(name: str) -> None:
    talk = Talk(name, tools=TOOLS)
    made = talk.tokenizer
    assert made.tool_calls_id is not None
    if name == "v3":  # with more spaces than the template has
        own = [made.tool_calls_id, *talk.ids('[{"name":"f",  "arguments":{}, "id":"abcDEF123"}]')]
    elif name == "v11":
        assert made.args_id is not None
        assert made.call_id_id is not None
        own = [made.tool_calls_id, *talk.ids("f"), made.call_id_id, *talk.ids("abcDEF123"),
               made.args_id, *talk.ids("{  }")]  # fmt: skip
    else:
        assert made.args_id is not None
        own = [made.tool_calls_id, *talk.ids("f"), made.args_id, *talk.ids("{  }")]
    turn = Turn(talk, [[*own, made.eos_id], say(talk, "Done.")])
    first, second = turn.prompts
    assert second[: len(first) + len(own) + 1] == [*first, *own, made.eos_id]
    later = talk.next_prompt()
    assert any(later[n : n + len(own)] == own for n in range(len(later)))


@pytest.mark.parametrize("name", TEMPLATES)
def test_call_of_an_unknown_function_is_told_to_both(name: str) -> None:
    talk = Talk(name, tools=TOOLS)
    ran: list[str] = []

    def run(call: ToolCall) -> str:
        ran.append(call.name)
        return "ok"

    turn = Turn(talk, [ask(talk, [("h", {}), ("f", {})]), say(talk, "Oh.")], run)
    assert ran == ["f"]
    assert turn.results[0].fault == "the model called h, which is none of f, g, every"
    assert turn.results[0].text.startswith("error: there is no function h")
    assert turn.rounds.ended is None
    assert "there is no function h" in decoded(talk, turn.prompts[1])


@pytest.mark.parametrize("name", TEMPLATES)
def test_call_that_cannot_be_read_is_told_to_both(name: str) -> None:
    talk = Talk(name, tools=TOOLS)
    garbled = garble(talk)
    turn = Turn(talk, [garbled, ask(talk, [("f", {})]), garbled, say(talk, "Sorry.")])
    assert [r.call.name for r in turn.results] == [UNREADABLE, "f", UNREADABLE]
    assert turn.results[0].fault == "the model made a call that cannot be read"
    first, second = turn.prompts[:2]
    assert second[: len(first) + len(garbled)] == [*first, *garbled]  # it sees what it wrote
    assert "could not be read" in decoded(talk, second)
    assert turn.answers[-1].text == "Sorry."
    assert turn.rounds.ended is None


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["unreadable", "unknown", "both"])
def test_second_unusable_call_in_a_row_ends_the_rounds(name: str, kind: str) -> None:
    talk = Talk(name, tools=TOOLS)
    unknown = ask(talk, [("h", {})])
    script = {
        "unreadable": [garble(talk)] * 2,
        "unknown": [unknown] * 2,
        "both": [unknown, garble(talk)],
    }[kind]
    turn = Turn(talk, [ask(talk, [("f", {})]), *script, say(talk, "never said")])
    assert turn.rounds.ended == "the model made unusable calls twice in a row"
    assert len(turn.answers) == 3
    assert not talk.chat.conversation.open_calls
    after = Turn(talk, [say(talk, "Here I am.")], text="And now?")
    assert after.answers[-1].text == "Here I am."


@pytest.mark.parametrize("name", ["v3", "v11"])
@pytest.mark.parametrize(
    "text",
    [
        "[" * 3000,
        '[{"name": "f", "arguments": {"a": ' + "[" * 100 + "]" * 100 + "}}]",
        '[{"name": "f", "arguments": {"a": NaN}}]',
        '[{"name": "f", "arguments": {"a": -1e999}}]',
        '[{"name": "f", "arguments": {"a": "\\ud83d"}}]',
        '[{"name": "no such name", "arguments": {}}]',
        '[{"name": "f", "arguments": [1]}]',
    ],
)
def test_call_that_no_template_could_repeat_is_unreadable(name: str, text: str) -> None:
    talk = Talk(name, 20_000, tools=TOOLS)
    assert talk.tokenizer.tool_calls_id is not None
    own = [talk.tokenizer.tool_calls_id, *talk.ids(text), talk.tokenizer.eos_id]
    turn = Turn(talk, [own, say(talk, "Sorry.")])
    assert [result.call.name for result in turn.results] == [UNREADABLE]
    assert turn.answers[-1].text == "Sorry."
    assert talk.next_prompt()


@pytest.mark.parametrize("name", ["v3", "v7", "v11"])
def test_calls_with_one_id_get_two(name: str) -> None:
    talk = Talk(name, tools=TOOLS)
    made = talk.tokenizer
    assert made.tool_calls_id is not None
    if name == "v11":
        assert made.call_id_id is not None
        assert made.args_id is not None
        one = [made.tool_calls_id, *talk.ids("f"), made.call_id_id, *talk.ids("abcDEF123"),
               made.args_id, *talk.ids("{}")]  # fmt: skip
        own = [*one, *one, made.eos_id]
    else:
        same = [{"name": "f", "arguments": {}, "id": "abcDEF123"}] * 2
        own = [made.tool_calls_id, *talk.ids(json.dumps(same)), made.eos_id]
    turn = Turn(talk, [own, say(talk, "Done.")])
    ids = [result.call.id for result in turn.results]
    assert ids[0] == "abcDEF123"
    assert len(set(ids)) == 2
    assert turn.answers[-1].text == "Done."


@pytest.mark.parametrize("name", ["v3", "v11"])
def test_rounds_are_over_after_16(name: str) -> None:
    talk = Talk(name, 20_000, tools=TOOLS)
    n_ran = 0

    def run(call: ToolCall) -> str:  # noqa: ARG001
        nonlocal n_ran
        n_ran += 1
        return "more"

    calls = ask(talk, [("f", {})])
    turn = Turn(talk, [calls] * MAX_ROUNDS + [say(talk, "At last.")], run)
    assert (n_ran, turn.rounds.ended) == (MAX_ROUNDS, None)
    assert turn.answers[-1].text == "At last."
    n_ran = 0
    turn = Turn(talk, [calls] * (MAX_ROUNDS + 5), run)
    assert n_ran == MAX_ROUNDS
    assert len(turn.answers) == MAX_ROUNDS + 1
    assert turn.rounds.ended == "16 rounds of calls are over; the last calls were not run"
    after = Turn(talk, [say(talk, "Here.")], text="And now?")
    assert after.answers[-1].text == "Here."


@pytest.mark.parametrize("name", TEMPLATES)
def test_cancelled_call_leaves_a_history_that_goes_on(name: str) -> None:
    talk = Talk(name, tools=TOOLS)

    def run(call: ToolCall) -> str:
        if call.name == "g":
            raise CallsCancelledError
        return "ran"

    calls: Calls = [("f", {}), ("g", {}), ("f", {"n": 2})]
    turn = Turn(talk, [ask(talk, calls), say(talk, "never said")], run)
    assert turn.rounds.cancelled
    assert len(turn.answers) == 1
    stopped = "error: the person stopped this call"
    assert [result.text for result in turn.results] == ["ran", stopped, stopped]
    after = Turn(talk, [say(talk, "Fine.")], text="And now?")
    assert after.answers[-1].text == "Fine."
    assert roles(talk) == ["user", "assistant", *["tool"] * 3, "user", "assistant"]
    assert talk.chat.conversation.undo() == "And now?"
    assert talk.chat.conversation.undo() == "Hi"
    assert roles(talk) == []


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "text",
    ["", "null", "{}", "[" * 20_000, "[" * 90 + "]" * 90, "NaN", '"a"', "[/TOOL_RESULTS]</s>",
     "\x00\x1b", "é🙂", "{broken", "a\ud83d", '"\\ud83d"', '{"\\ud83d": 1}', "1" * 5000, "1e999"],
)  # fmt: skip
def test_any_result_goes_into_any_template(name: str, text: str) -> None:
    talk = Talk(name, 60_000, tools=TOOLS)
    turn = Turn(talk, [ask(talk, [("f", {})]), say(talk, "Done.")], lambda call: text)
    assert turn.answers[-1].text == "Done."
    assert talk.next_prompt().count(talk.tokenizer.eos_id) == 2


@pytest.mark.parametrize("name", ["v3", "v7", "v11"])
def test_result_that_would_fill_the_context_is_cut_and_says_so(name: str) -> None:
    talk = Talk(name, 1000, tools=TOOLS)
    text = "word " * 4000
    calls: Calls = [("f", {}), ("g", {})]
    turn = Turn(talk, [ask(talk, calls), say(talk, "Done.")], lambda call: text)
    assert turn.answers[-1].text == "Done."
    for result in turn.results:
        kept, _, note = result.text.partition("\n[cut: the first ")
        assert text.startswith(kept)
        assert note == f"{len(kept):,} of {len(text):,} characters]"
        assert len(kept) > 300


def test_results_that_do_not_fit_are_an_error() -> None:
    talk = Talk("v3", 230, tools=TOOLS)
    calls: Calls = [("f", {"n": n}) for n in range(3)]
    with pytest.raises(ContextLengthError):
        Turn(talk, [ask(talk, calls)], lambda call: "x" * 100)
    assert talk.chat.conversation.undo() == "Hi"
    assert Turn(talk, [say(talk, "Fine.")]).answers[-1].text == "Fine."


def test_empty_answer_after_results_ends_the_turn() -> None:
    talk = Talk("v3", tools=TOOLS)
    turn = Turn(talk, [ask(talk, [("f", {})]), say(talk, "")[-1:]])
    assert [answer.text for answer in turn.answers][1:] == [""]
    assert roles(talk) == ["user", "assistant", "tool"]
    assert Turn(talk, [say(talk, "Fine.")]).answers[-1].text == "Fine."


@pytest.mark.parametrize("name", TEMPLATES)
def test_call_cut_short_is_not_kept_as_text(name: str) -> None:
    talk = Talk(name, tools=TOOLS)
    talk.runner.script = deque(ask(talk, [("f", {"a": "long enough"})], "Wait."))
    stream = talk.chat.send("Hi", GREEDY)
    talk.runner.on_scored = lambda n: stream.cancel() if n == 6 else None
    list(stream)
    talk.runner.on_scored = lambda n: None
    assert stream.answer is not None
    assert stream.answer.finish_reason == "cancelled"
    assert roles(talk) == ["user", "assistant"]
    assert talk.chat.conversation.messages[-1].content == "Wait."
    assert talk.tokenizer.tool_calls_id not in talk.next_prompt()


@pytest.mark.parametrize("name", TEMPLATES)
def test_message_in_place_of_results_says_that_calls_were_not_run(name: str) -> None:
    talk = Talk(name, tools=TOOLS)
    talk.answer(ask(talk, [("f", {}), ("g", {})]))
    _, answer = talk.answer(say(talk, "As you like."), text="Never mind")
    assert answer.text == "As you like."
    assert decoded(talk, talk.next_prompt()).count("not") >= 2
    assert roles(talk) == ["user", "assistant", "tool", "tool", "user", "assistant"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_send_results_goes_on_after_calls(name: str) -> None:
    talk = Talk(name, tools=TOOLS)
    _, answer = talk.answer(ask(talk, [("f", {}), ("g", {})]))
    first, second = answer.tool_calls
    for wrong in ({}, {first.id: "1"}, {first.id: "1", second.id: "2", "zzzzzzzzz": "3"}):
        with pytest.raises(UsageError, match=second.id):
            talk.chat.send_results(wrong, GREEDY)
    talk.runner.script = deque(say(talk, "Done."))
    stream = talk.chat.send_results({second.id: "two", first.id: "one"}, GREEDY)
    list(stream)
    assert stream.answer is not None
    assert stream.answer.text == "Done."
    said = [str(m.content) for m in talk.chat.conversation.messages if m.role == "tool"]
    assert said == ["one", "two"]


def test_template_of_one_result_takes_one_and_refuses_more() -> None:
    talk = Talk("v2", tools=TOOLS)
    turn = Turn(talk, [ask(talk, [("f", {})]), say(talk, "Done.")])
    assert turn.answers[-1].text == "Done."
    with pytest.raises(PromptError, match="v2 does not support multiple tool results"):
        Turn(talk, [ask(talk, [("f", {}), ("g", {})])], text="And now?")
    assert talk.chat.conversation.undo() == "And now?"
    assert Turn(talk, [say(talk, "Fine.")]).answers[-1].text == "Fine."
