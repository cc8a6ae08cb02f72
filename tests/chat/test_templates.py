"""Laws of all template versions: what the program keeps and reads is what mistral-common writes."""

import json
import random
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.chunk import TextChunk, ThinkChunk
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool
from mistral_common.protocol.instruct.tool_calls import ToolCall as CallOfTemplate

from mistral_chat.chat.answer import Answer, Delta
from mistral_chat.chat.batch import Question, answer_many
from mistral_chat.chat.conversation import Conversation, text_of, thinking_of
from mistral_chat.chat.messages import encode_messages
from mistral_chat.chat.schema.grammar import Grammar
from mistral_chat.chat.template import TEMPLATES, check_effort_of_file
from mistral_chat.chat.thinking import Thinking, Thought
from mistral_chat.chat.tokenizer import Tokenizer
from mistral_chat.chat.tools import ToolCall, parse_tool_calls
from mistral_chat.config import SamplingParams
from mistral_chat.errors import PromptError, TokenizerError
from tests.chat.test_chat import GREEDY, Talk
from tests.scripts.tokenizers import (
    THINKING,
    WITH_MARKS,
    byte_ids,
    encode,
    small_tekken,
    tokenizer,
)

ALL = ("v1", *WITH_MARKS)
WITH_TOOLS = [name for name in WITH_MARKS if name != "v2"]  # v2 forgets calls of earlier turns
TOOLS = [Tool(function=Function(name=name, parameters={"type": "object"})) for name in ("f", "g")]
CALLS = [
    ToolCall("aaaaaaaa1", "f", {"a": 1, "text": 'é🙂 "[ARGS]" [TOOL_CALLS]\n', "none": None}),
    ToolCall("bbbbbbbb2", "g", {}),
    ToolCall("cccccccc3", "f", {"deep": {"er": [1.5, True, []]}}),
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def official(made: Tokenizer, *messages: Any, **options: Any) -> list[int]:
    """mistral-common's own encoding."""
    request: ChatCompletionRequest[Any] = ChatCompletionRequest(messages=list(messages), **options)
    return list(made.mistral.encode_chat_completion(request).tokens)


def as_template(calls: list[ToolCall]) -> list[CallOfTemplate]:
    return [
        CallOfTemplate(
            id=call.id,
            function=FunctionCall(
                name=call.name, arguments=json.dumps(call.arguments, ensure_ascii=False)
            ),
        )
        for call in calls
    ]


def mark(made: Tokenizer, text: str) -> int:
    return int(made.raw.get_special_token(text))


def thinking(made: Tokenizer, thought: str, said: str = "") -> list[int]:
    """An answer's tokens, with thinking before what is said."""
    begin, end = mark(made, "[THINK]"), mark(made, "[/THINK]")
    return [begin, *encode(made, thought), end, *encode(made, said)]


def test_every_version_that_mistral_common_knows_has_a_template() -> None:
    from mistral_common.tokens.tokenizers.base import TokenizerVersion

    assert {version.value for version in TokenizerVersion} == set(TEMPLATES)


# What the program says of a version agrees with what mistral-common writes.
@pytest.mark.parametrize("name", [*WITH_TOOLS])
def test_template_says_what_mistral_common_writes(name: str) -> None:
    made = tokenizer(name)
    answer = AssistantMessage(content=None, tool_calls=as_template(CALLS[1:2]))
    result = ToolMessage(content="r", tool_call_id=CALLS[1].id, name="g")
    ids = official(made, UserMessage(content="q"), answer, result, tools=TOOLS)
    begin = ids.index(made.tool_calls_id)  # type: ignore[arg-type]
    call = ids[begin : ids.index(made.eos_id)]
    written = {made.raw.id_to_piece(i) for i in call if made.is_special(i)}
    assert written == set(made.template.call_marks)
    text = "".join(made.piece(i) for i in call)
    assert (CALLS[1].id in text) is made.template.calls_have_ids


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("tools", [[], TOOLS])
@pytest.mark.parametrize("name", WITH_MARKS)
def test_first_turn_is_mistral_commons(name: str, tools: list[Tool], system: str | None) -> None:
    made = tokenizer(name)
    before = [SystemMessage(content=system)] if system else []
    wanted = official(made, *before, UserMessage(content="Hi"), tools=tools or None)
    assert Conversation(system, tools).encode(made, [UserMessage(content="Hi")]) == wanted


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", WITH_TOOLS)
def test_history_with_parallel_calls_is_mistral_commons(name: str, system: str | None) -> None:
    made = tokenizer(name)
    thought = Thought("Which city?") if made.takes_thinking else None
    said = "I look." if made.template.calls_have_text else ""
    conversation = Conversation(system, TOOLS)
    conversation.add_user("Hi")
    conversation.add_calls(said, CALLS, None, thought)
    for call in CALLS:
        conversation.add_result(call, f"of {call.id}")
    conversation.add_answer("It rains.", None)
    content: Any = said or None
    if thought:
        content = [ThinkChunk(thinking=thought.text), TextChunk(text=said)]
    wanted = official(
        made,
        *([SystemMessage(content=system)] if system else []),
        UserMessage(content="Hi"),
        AssistantMessage(content=content, tool_calls=as_template(CALLS)),
        *[ToolMessage(content=f"of {c.id}", tool_call_id=c.id, name=c.name) for c in CALLS],
        AssistantMessage(content="It rains."),
        UserMessage(content="next"),
        tools=TOOLS,
    )
    assert conversation.encode(made, [UserMessage(content="next")]) == wanted


# A prompt of the next turn begins with all that was run, tools and settings included.
@pytest.mark.parametrize("name", THINKING)
def test_tools_and_settings_stand_before_the_first_question(name: str) -> None:
    talk = Talk(name, tools=TOOLS, reasoning="high" if name == "v15" else None, system="Be brief.")
    _, first = talk.answer(thinking(talk.tokenizer, "Hm.", "Hello"))
    _, second = talk.answer(talk.ids("fine"))
    held = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert second.usage.cached_tokens == held


@pytest.mark.parametrize("n_calls", [1, 2, 3])
@pytest.mark.parametrize("name", WITH_TOOLS)
def test_calls_are_read_as_the_template_writes_them(name: str, n_calls: int) -> None:
    made = tokenizer(name)
    calls = CALLS[:n_calls]
    answer = AssistantMessage(content=None, tool_calls=as_template(calls))
    results = [ToolMessage(content="r", tool_call_id=c.id, name=c.name) for c in calls]
    ids = official(made, UserMessage(content="q"), answer, *results, tools=TOOLS)
    begin = ids.index(made.tool_calls_id)  # type: ignore[arg-type]
    own = ids[begin : ids.index(made.eos_id)]
    found = parse_tool_calls(made, own, seed=5)
    assert found is not None
    assert [(c.name, c.arguments) for c in found] == [(c.name, c.arguments) for c in calls]
    if made.template.calls_have_ids:
        assert list(found) == calls
    else:  # made up, valid, the same for the same seed
        assert found == parse_tool_calls(made, own, seed=5)
        assert len({call.id for call in found}) == n_calls
        assert all(len(call.id) == 9 and call.id.isalnum() for call in found)
    # And the model's own tokens are what it is given back.
    talk = Talk(name, tools=TOOLS)
    stream = talk.stream([*own, made.eos_id])
    answer_ids = [*list(stream)[-1].token_ids]  # type: ignore[union-attr]
    for call in talk.chat.conversation.open_calls:
        talk.chat.conversation.add_result(call, "r")
    prompt = talk.next_prompt()
    asked = stream._request.ids
    if made.template.system_thinking or made.template.settings:  # older ones move the tools
        assert prompt[: len(asked) + len(answer_ids)] == [*asked, *answer_ids]
    else:
        assert find(prompt, answer_ids)


def find(ids: list[int], part: list[int]) -> bool:
    return any(ids[n : n + len(part)] == part for n in range(len(ids)))


def parts(events: list[Any]) -> tuple[str, str]:
    thought = "".join(e.text for e in events if isinstance(e, Thinking))
    return thought, "".join(e.text for e in events if isinstance(e, Delta))


# Wherever the answer is cut into tokens, thinking and text come apart, and whole.
@pytest.mark.parametrize("one_byte_each", [False, True])
@pytest.mark.parametrize("name", ["v11", *THINKING])
def test_thinking_is_apart_from_the_answer(name: str, one_byte_each: bool) -> None:
    talk = Talk(name)
    made = talk.tokenizer
    cut = byte_ids if one_byte_each else encode
    thought, said = "First: 🙂 é [/THINK] written out,\n\nthen ", " The answer: 日本 [THINK]"
    begin, end = mark(made, "[THINK]"), mark(made, "[/THINK]")
    ids = [begin, *cut(made, thought), end, *cut(made, said)]
    events = list(talk.stream(ids))
    answer = events[-1]
    assert isinstance(answer, Answer)
    assert parts(events) == (thought, said) == (answer.thinking, answer.text)
    assert answer.thought is not None
    assert answer.thought.n_tokens == len(cut(made, thought))
    assert answer.thought.is_closed
    kinds = [type(e) for e in events if isinstance(e, (Thinking, Delta))]
    assert kinds == sorted(kinds, key=lambda kind: kind is Delta)
    assert all(e.text for e in events if isinstance(e, (Thinking, Delta)))
    assert answer.token_ids == (*ids, made.eos_id)


def test_thinking_may_come_in_several_pieces_and_between_text() -> None:
    talk = Talk("v13")
    made = talk.tokenizer
    ids = [*thinking(made, "one", "Some text. "), *thinking(made, "two", "More.")]
    events = list(talk.stream(ids))
    assert parts(events) == ("one\n\ntwo", "Some text. More.")
    answer = events[-1]
    assert isinstance(answer, Answer)
    assert (answer.thinking, answer.text) == parts(events)
    assert find(talk.next_prompt(), [*ids, made.eos_id])  # token for token


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_marks_gives_the_streamed_parts(seed: int) -> None:
    rng, talk = random.Random(seed), Talk("v15", tools=TOOLS)
    made = talk.tokenizer
    marks = [mark(made, text) for text in ("[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]")]
    bits = [byte_ids(made, "🙂"), encode(made, "word END"), encode(made, "{}"), byte_ids(made, "é")]
    ids = []
    for _ in range(12):
        ids += rng.choice([[rng.choice(marks)], rng.choice(bits), rng.choice(bits)[:1]])
    events = list(talk.stream(ids, replace(GREEDY, stop=("ENDING", "wordy"))))
    answer = events[-1]
    assert isinstance(answer, Answer)
    assert parts(events) == (answer.thinking, answer.text)
    raw = "".join(e.text for e in events if isinstance(e, Delta) and not e.is_call)
    assert raw == answer.said
    assert "THINK" not in answer.text + answer.thinking
    talk.next_prompt()  # the chat can go on


def test_marks_of_plain_completion_are_shown() -> None:
    talk = Talk("v13", instruct=False)
    _, answer = talk.answer(thinking(talk.tokenizer, "hm", "so"))
    assert (answer.text, answer.thought) == ("[THINK]hm[/THINK]so", None)


def test_stop_texts_are_looked_for_in_the_answer_alone() -> None:
    talk = Talk("v13")
    ids = [*thinking(talk.tokenizer, "the END is", "It is the END of it")]
    _, answer = talk.answer(ids, replace(GREEDY, stop=("END",)))
    assert answer.thinking == "the END is"
    assert (answer.text, answer.finish_reason) == ("It is the ", "stop")
    # Kept as the template writes it, since the tokens hold more than the text.
    made = talk.tokenizer
    content = [ThinkChunk(thinking="the END is"), TextChunk(text="It is the ")]
    assert talk.next_prompt() == official(
        made,
        UserMessage(content="Hi"),
        AssistantMessage(content=content),
        UserMessage(content="next"),
    )


@pytest.mark.parametrize("ends", ["length", "cancelled", "stop"])
@pytest.mark.parametrize("name", THINKING)
def test_answer_that_ends_within_its_thinking_is_kept(name: str, ends: str) -> None:
    talk = Talk(name)
    made = talk.tokenizer
    ids = [mark(made, "[THINK]"), *encode(made, "one two three four five")]
    max_tokens = len(ids) if ends == "length" else None
    stream = talk.stream(
        ids if ends != "cancelled" else [*ids, *ids], replace(GREEDY, max_tokens=max_tokens)
    )
    if ends == "cancelled":
        talk.runner.on_scored = lambda n: stream.cancel() if n == len(ids) else None
    answer = list(stream)[-1]
    talk.runner.on_scored = lambda n: None
    assert isinstance(answer, Answer)
    assert (answer.finish_reason, answer.text) == (ends, "")
    assert answer.thought is not None
    assert answer.thought.is_closed is False
    assert answer.thinking == "one two three four five"
    assert stream.is_kept
    message = talk.chat.conversation.messages[-1]
    assert (text_of(message), thinking_of(message)) == ("", answer.thinking)
    following = talk.next_prompt()
    assert following[: len(stream._request.ids) + len(ids) + 1] == [
        *stream._request.ids,
        *ids,
        made.eos_id,
    ]
    open_end = AssistantMessage(content=[ThinkChunk(thinking=answer.thinking, closed=False)])
    assert following == official(
        made, UserMessage(content="Hi"), open_end, UserMessage(content="next")
    )


@pytest.mark.parametrize("closes", [True, False])
def test_call_after_or_within_thinking_is_a_call(closes: bool) -> None:
    talk = Talk("v13", tools=TOOLS)
    made = talk.tokenizer
    ids = thinking(made, "call f")
    if not closes:  # as some models do
        ids.pop()
    ids += [mark(made, "[TOOL_CALLS]"), *talk.ids("f"), mark(made, "[ARGS]"), *talk.ids('{"a": 1}')]
    events = list(talk.stream(ids))
    answer = events[-1]
    assert isinstance(answer, Answer)
    assert answer.finish_reason == "tool_calls"
    assert [(c.name, c.arguments) for c in answer.tool_calls] == [("f", {"a": 1})]
    assert (answer.thinking, answer.said) == ("call f", "")
    assert all(e.is_call for e in events if isinstance(e, Delta))
    (call,) = talk.chat.conversation.open_calls
    talk.chat.conversation.add_result(call, "22")
    assert find(talk.next_prompt(), [*ids, made.eos_id])


def test_answer_that_goes_on_from_open_thinking_begins_with_thinking() -> None:
    made = tokenizer("v13")
    part = {"type": "thinking", "thinking": "So far", "closed": False}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": [part], "prefix": True},
    ]
    ids = encode_messages(made, messages, [])
    assert made.ends_within_thinking(ids)
    assert not made.ends_within_thinking(encode_messages(made, messages[:1], []))
    talk = Talk("v13")
    talk.runner.script = deque([*talk.ids(" and on"), mark(made, "[/THINK]"), *talk.ids("42")])
    question = Question(messages=messages, params=GREEDY)
    *_, (_, answer) = answer_many(talk.chat.engine, made, [question])
    assert isinstance(answer, Answer)
    assert (answer.thinking, answer.text) == (" and on", "42")


def test_questions_of_a_batch_are_answered_after_thinking() -> None:
    talk = Talk("v15")
    made = talk.tokenizer
    talk.runner.script = deque(thinking(made, "END of", '{"a": 1}'))
    asked = [{"role": "user", "content": "q"}]
    question = Question(messages=asked, json_schema=SCHEMA, reasoning="high", params=GREEDY)
    *_, (_, answer) = answer_many(talk.chat.engine, made, [question])
    assert isinstance(answer, Answer)
    assert (answer.thinking, json.loads(answer.text)) == ("END of", {"a": 1})
    assert answer.usage.prompt_tokens == len(encode_messages(made, asked, [], None, "high"))


def test_thinking_of_history_is_given_to_templates_that_take_it() -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning_content": "because"},
        {"role": "user", "content": "next"},
    ]
    for name in THINKING:
        made = tokenizer(name)
        content = [ThinkChunk(thinking="because"), TextChunk(text="a")]
        wanted = official(
            made,
            UserMessage(content="q"),
            AssistantMessage(content=content),
            UserMessage(content="next"),
        )
        assert encode_messages(made, messages, []) == wanted
    for name in ("v3", "v7", "v11"):
        with pytest.raises(PromptError, match="message 2: part 1 of content is thinking"):
            encode_messages(tokenizer(name), messages, [])


# A chat may be resumed with another model, whose template knows no thinking.
@pytest.mark.parametrize("name", ["v1", "v3", "v7", "v11"])
def test_templates_without_thinking_are_given_the_answers_alone(name: str) -> None:
    made = tokenizer(name)
    conversation, bare = Conversation(), Conversation()
    for either, thought in ((conversation, Thought("hm")), (bare, None)):
        either.add_user("q")
        either.add_answer("a", None, thought)
        either.add_user("q2")
    conversation.add_answer("", None, Thought("cut short", is_closed=False))
    bare.add_answer("\u2026", None)
    new = [UserMessage(content="next")]
    assert conversation.encode(made, new) == bare.encode(made, new)


@pytest.mark.parametrize("name", ["v11", *THINKING])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_schema_holds_for_what_follows_the_thinking(name: str, temperature: float) -> None:
    talk = Talk(name, grammar=Grammar(SCHEMA))
    made = talk.tokenizer
    script = thinking(made, "not JSON at all", '{"a": 42}')
    _, answer = talk.answer(script, SamplingParams(temperature=temperature, seed=1))
    assert answer.thinking == "not JSON at all"
    assert json.loads(answer.text) == {"a": 42}
    assert answer.finish_reason == "stop"
    # It does not end within the thinking, nor think anew in the answer.
    begin = mark(made, "[THINK]")
    ids = [begin, *talk.ids("x"), made.eos_id, begin, *talk.ids("y"), mark(made, "[/THINK]"), begin]
    _, answer = talk.answer(ids, replace(GREEDY, max_tokens=60))
    assert answer.thinking.startswith("x")
    assert answer.text.lstrip()[:1] in ("", "{")
    # Nor must it think.
    _, answer = talk.answer(talk.ids('{"a": 1}'))
    assert (answer.text, answer.thought) == ('{"a": 1}', None)


@pytest.mark.parametrize("effort", ["none", "high"])
def test_reasoning_is_a_setting_of_v15(effort: str) -> None:
    talk = Talk("v15", reasoning=effort)
    made = talk.tokenizer
    assert made.efforts == ("none", "high")
    wanted = official(made, UserMessage(content="next"), reasoning_effort=effort)
    assert talk.next_prompt() == wanted
    assert f'{{"reasoning_effort": "{effort}"}}' in made.raw.decode(wanted)
    talk.chat.conversation.reasoning = None  # mistral-common writes the tokenizer's default
    assert talk.next_prompt() == official(made, UserMessage(content="next"))
    assert encode_messages(made, [{"role": "user", "content": "next"}], [], None, effort) == wanted


@pytest.mark.parametrize("name", [name for name in ALL if name != "v15"])
def test_reasoning_is_refused_by_templates_without_it(name: str) -> None:
    with pytest.raises(PromptError, match=r"reasoning high: the v.* template has no such setting"):
        Talk(name, reasoning="high")
    with pytest.raises(PromptError, match="reasoning none"):
        encode_messages(tokenizer(name), [{"role": "user", "content": "q"}], [], None, "none")


def test_reasoning_is_checked_in_a_file_as_in_a_tokenizer(tmp_path: Path) -> None:
    for version in ("v3", "v7", "v11", "v13", "v15"):
        path = tmp_path / "tekken.json"
        path.write_text(small_tekken(version), encoding="utf-8")
        known = Tokenizer(path).efforts
        for effort in ("none", "high", "low"):
            if effort in known:
                check_effort_of_file(effort, path)
            else:
                with pytest.raises(PromptError, match=f"reasoning {effort}: .*tekken.json"):
                    check_effort_of_file(effort, path)
    for other in (tmp_path / "tokenizer.model.v3", None):
        with pytest.raises(PromptError, match="reasoning high"):
            check_effort_of_file("high", other)
    path.write_text("{")
    with pytest.raises(TokenizerError):
        check_effort_of_file("high", path)
    for value in ([], {"model_settings_builder": None}, {"model_settings_builder": [1]}):
        path.write_text(json.dumps(value))
        with pytest.raises((PromptError, TokenizerError)):
            check_effort_of_file("high", path)


SHOWN = "Think like this:[THINK]your thoughts[/THINK]Then answer."


def test_system_prompt_of_v13_shows_how_to_think_with_control_tokens() -> None:
    made = tokenizer("v13")
    chunks = [
        TextChunk(text="Think like this:"),
        ThinkChunk(thinking="your thoughts"),
        TextChunk(text="Then answer."),
    ]
    new = [UserMessage(content="Hi")]
    wanted = official(made, SystemMessage(content=chunks), *new)
    assert Conversation(SHOWN).encode(made, new) == wanted
    assert encode_messages(made, [{"role": "user", "content": "Hi"}], [], SHOWN) == wanted
    assert mark(made, "[THINK]") in wanted
    assert not made.ends_within_thinking(wanted)


@pytest.mark.parametrize("text", [SHOWN, "[/THINK] [THINK]", "[THINK]only begun", "plain"])
@pytest.mark.parametrize("name", ["v3", "v7", "v11", "v15"])
def test_system_prompt_of_other_templates_is_text(name: str, text: str) -> None:
    made, new = tokenizer(name), [UserMessage(content="Hi")]
    wanted = official(made, SystemMessage(content=text), *new)
    assert Conversation(text).encode(made, new) == wanted


def test_thinking_in_a_system_prompt_is_refused_where_the_template_has_no_place() -> None:
    part = {"type": "thinking", "thinking": "so", "closed": True}
    messages = [{"role": "system", "content": [part]}, {"role": "user", "content": "q"}]
    encode_messages(tokenizer("v13"), messages, [])
    for name in ("v7", "v11", "v15"):
        with pytest.raises(PromptError, match="message 1: part 1 of content is thinking"):
            encode_messages(tokenizer(name), messages, [])
