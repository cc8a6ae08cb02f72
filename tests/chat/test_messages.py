"""OpenAI's messages: one parser for Python and batch, errors that name the place, prefixes."""

import copy
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Function, Tool

from mistral_chat import LLM, Answer, SamplingParams
from mistral_chat.chat.batch import answer_many
from mistral_chat.chat.messages import encode_messages, read_messages
from mistral_chat.cli.batch import lines as batch_lines
from mistral_chat.cli.main import request_of
from mistral_chat.errors import MistralChatError, PromptError, UsageError, one_line
from tests.scripts.tokenizers import WITH_MARKS, tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=8)
TOOL = Tool(function=Function(name="f", parameters={"type": "object"}))
USER: dict[str, Any] = {"role": "user", "content": "Hi"}
SAID: dict[str, Any] = {"role": "assistant", "content": "Hello"}
CALL: dict[str, Any] = {
    "id": "abcDEF123",
    "type": "function",
    "function": {"name": "f", "arguments": '{"a": 1}'},
}
CALLS: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT: dict[str, Any] = {"role": "tool", "tool_call_id": "abcDEF123", "content": "2"}
WHOLE = [{"role": "developer", "content": "Be brief."}, USER, CALLS, RESULT, SAID, USER]
PICTURE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> Iterator[LLM]:
    with LLM(tiny_folder, device="cpu", dtype="float32", max_batch_size=2) as made:
        yield made


def _ask_python(llm: LLM, messages: Any, **asked: Any) -> Answer:
    offered = asked.get("held", {}).get("tools", [TOOL] if "tools" in asked else ())
    held = _without(asked.get("held", {}), "tools")
    return llm.chat(messages, GREEDY, offered, **held)


def _ask_batch(llm: LLM, messages: Any, *words: str, **asked: Any) -> Answer:
    options = request_of(["MODEL", "--instruct", *words])
    value = {"messages": messages, "max_tokens": 8, "temperature": 0} | asked.get("held", {})
    (line,) = batch_lines.read_lines(json.dumps(value).encode(), options, options.system)
    if line.question is None:
        raise PromptError(str(line.error).removeprefix("line 1: "))
    offered = [TOOL] if "tools" in asked else []
    *_, (_, end) = answer_many(llm.engine, llm.tokenizer, [line.question], offered)
    if isinstance(end, MistralChatError):
        raise end
    assert isinstance(end, Answer)
    return end


def _call(**changes: Any) -> dict[str, Any]:
    return CALLS | {"tool_calls": [CALL | changes]}


def _without(entry: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != name}


FAULTS: list[tuple[Any, str]] = [
    ([], "messages are empty: expected one at least"),
    ({"role": "user"}, "messages are {'role': 'user'}: expected a list"),
    ([USER, 3], "message 2 is 3: expected an object"),
    ([{"content": "Hi"}], "message 1: role is missing: expected system, developer, user"),
    ([USER, {"role": "wizard", "content": "Hi"}], "message 2: role is 'wizard': expected"),
    ([{"role": ["user"], "content": "Hi"}], "message 1: role is ['user']: expected"),
    ([{"role": "user"}], "message 1: content is missing: expected a text or a list of text parts"),
    ([USER | {"content": None}], "message 1: content is null: expected a text"),
    ([USER | {"content": 3}], "message 1: content is 3: expected a text"),
    ([{"role": "developer"}, USER], "message 1: content is missing"),
    ([USER, CALLS, _without(RESULT, "content")], "message 3: content is missing"),
    ([USER | {"content": ["Hi"]}], "message 1: part 1 of content is 'Hi': expected an object"),
    ([USER | {"content": [{"type": "text", "text": "a"}, {"type": "text"}]}],
     "message 1: part 2 of content: text is missing: expected a text"),
    ([USER | {"content": [PICTURE]}],
     "message 1: part 1 of content: type is 'image_url': expected text, and nothing else"),
    ([USER | {"content": [{"type": "input_audio"}]}], "type is 'input_audio': expected text"),
    ([USER | {"content": [{"type": "thinking", "thinking": "a"}]}], "type is 'thinking': expected"),
    ([USER | {"weight": 1}], "message 1: the field 'weight' has no meaning in a user message"),
    ([USER, {"role": "assistant"}, USER],
     "message 2: content is missing and there are no tool_calls: expected one of them"),
    ([USER, SAID | {"content": ""}, USER], "message 2: content is '' and there are no tool_calls"),
    ([USER, CALLS | {"tool_calls": 3}, RESULT], "message 2: tool_calls is 3: expected a list"),
    ([USER, CALLS | {"tool_calls": [3]}, RESULT], "message 2: call 1 is 3: expected an object"),
    ([USER, CALLS | {"tool_calls": [CALL, _without(CALL, "id")]}, RESULT],
     "message 2: call 2: id is missing: expected the text that its tool message has as"),
    ([USER, _call(type="custom"), RESULT], "message 2: call 1: type is 'custom': expected"),
    ([USER, _call(function=None), RESULT], "message 2: call 1: function is null: expected"),
    ([USER, _call(function={"name": "f g"}), RESULT], "message 2: call 1: name is 'f g': expected"),
    ([USER, _call(function={"name": "f", "arguments": "[1]"}), RESULT],
     "message 2: call 1: arguments is '[1]': expected a JSON object"),
    ([USER, _call(id="call_1"), RESULT | {"tool_call_id": "call_1"}],
     "message 2: call 1: id is 'call_1': the v3 SentencePiece template takes 9 letters and"),
    ([USER, CALLS | {"content": "Let me see."}, RESULT],
     "message 2: content and tool_calls: the v3 SentencePiece template takes one of them"),
    ([USER, SAID | {"reasoning": "Hm."}, USER], "message 2: part 1 of content is thinking, which"),
    ([USER, SAID | {"reasoning": "a", "reasoning_content": "b"}, USER], "message 2: reasoning and"),
    ([USER, CALLS, _without(RESULT, "tool_call_id")],
     "message 3: tool_call_id is missing: expected the id of a call"),
    ([USER, CALLS, RESULT | {"tool_call_id": None}], "message 3: tool_call_id is null: expected"),
    ([USER, CALLS, RESULT | {"tool_call_id": "other"}],
     "message 3: tool_call_id is 'other', which is no call without a result: expected 'abcDEF123'"),
    ([USER, CALLS, RESULT, RESULT], "message 4: tool_call_id is 'abcDEF123', which is no call"),
    ([USER, CALLS, SAID, USER],
     "message 2: the call 'abcDEF123' has no result: expected a tool message with this"),
    ([USER, CALLS | {"tool_calls": [CALL, CALL]}, RESULT], "message 2: call 2: id is 'abcDEF123'"),
    ([USER, RESULT], "message 2: role tool after user: expected assistant, user or system"),
    ([SAID], "message 1: the last message is the assistant's: expected the user's or a tool's, or"),
    ([USER, SAID], "message 2: the last message is the assistant's"),
    ([USER, SAID | {"prefix": True}, USER], "message 2: prefix is true: expected it on the last"),
    ([USER, SAID | {"prefix": 1}], "message 2: prefix is 1: expected true or false"),
    ([USER | {"prefix": True}], "message 1: the field 'prefix' has no meaning in a user message"),
    ([USER, CALLS | {"prefix": True}], "message 2: prefix and tool_calls: expected one of them"),
    ([USER, {"role": "assistant", "prefix": True}], "message 2: content is missing"),
    ([SAID | {"prefix": True}], "message 1: prefix without a message before it"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "said"), FAULTS)
def test_fault_is_said_alike_in_python_and_in_a_batch(llm: LLM, messages: Any, said: str) -> None:
    found = []
    for ask in (_ask_python, _ask_batch):
        with pytest.raises(PromptError) as caught:
            ask(llm, messages)
        found.append(str(caught.value))
    assert found[0] == found[1] == one_line(found[0])
    assert found[0].startswith(said) or (said in found[0] and found[0].startswith("message "))


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ({"name": "f"}, "tools are {'name': 'f'}: expected a list of function schemas"),
        ("f", "tools are 'f': expected a list"),
        ([3], "tool 1: not a function schema"),
        ([{"name": "f"}, {"name": "g h"}], "tool 2: not a function schema: function.name: found"),
        ([{"type": "web_search", "name": "f"}], "tool 1: not a function schema: type"),
    ],
)
def test_fault_of_a_tool_is_said_alike(llm: LLM, tools: Any, said: str) -> None:
    found = []
    for ask in (_ask_python, _ask_batch):
        with pytest.raises(PromptError) as caught:
            ask(llm, [USER], held={"tools": tools})
        found.append(str(caught.value))
    assert found[0] == found[1]
    assert found[0].startswith(said)


@pytest.mark.parametrize(
    ("messages", "same"),
    [
        (WHOLE, [{"role": "system", "content": "Be brief."}, *WHOLE[1:]]),
        ([USER | {"content": [{"type": "text", "text": "Hi"}]}], [USER]),
        ([USER | {"name": "Ann", "tool_calls": None, "x": None, "annotations": []}], [USER]),
        ([USER, SAID | {"tool_calls": [], "refusal": None, "prefix": False}, USER],
         [USER, SAID, USER]),
        ([USER, _without(CALLS, "content"), RESULT | {"name": None}], [USER, CALLS, RESULT]),
        ([USER, CALLS | {"content": ""}, RESULT], [USER, CALLS, RESULT]),
        ([USER, _call(type=None), RESULT], [USER, CALLS, RESULT]),
        ([USER, _call(function={"name": "f", "arguments": {"a": 1}}), RESULT],
         [USER, CALLS, RESULT]),
        ([USER, _call(function={"name": "f", "arguments": None}), RESULT],
         [USER, _call(function={"name": "f", "arguments": "{}"}), RESULT]),
    ],
)  # fmt: skip
def test_null_and_other_writings_are_the_same_conversation(
    llm: LLM, messages: list[dict[str, Any]], same: list[dict[str, Any]]
) -> None:
    wanted = encode_messages(llm.tokenizer, same, [TOOL])
    assert encode_messages(llm.tokenizer, messages, [TOOL]) == wanted
    assert read_messages(read_messages(messages)) == read_messages(messages)
    answers = [ask(llm, messages, tools=True) for ask in (_ask_python, _ask_batch)]
    assert [a.usage.prompt_tokens for a in answers] == [len(wanted)] * 2
    assert answers[0].token_ids == answers[1].token_ids


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_conversation_has_one_system_prompt_and_its_own_wins(llm: LLM, role: str) -> None:
    own = [{"role": role, "content": "Be brief."}, USER]
    words = ("--system", "Be long and longer still.")
    alone = _ask_batch(llm, own)
    assert _ask_batch(llm, own, *words).usage.prompt_tokens == alone.usage.prompt_tokens
    assert _ask_python(llm, own).usage.prompt_tokens == alone.usage.prompt_tokens
    added = _ask_batch(llm, [USER], *words).usage.prompt_tokens
    whole = [{"role": "system", "content": words[1]}, USER]
    assert added == len(encode_messages(llm.tokenizer, whole, []))


@pytest.mark.parametrize("text", ["The capital of", "Trailing ", "{", "é🙂\n", " a"])
@pytest.mark.parametrize("name", ["v1", *WITH_MARKS, "v13"])
def test_prefix_is_the_templates_answer_without_its_end(name: str, text: str) -> None:
    made = tokenizer(name)
    messages = [{"role": "system", "content": "Be brief."}, USER]
    prefix = {"role": "assistant", "content": text, "prefix": True}
    request: ChatCompletionRequest[Any] = ChatCompletionRequest(
        messages=[
            SystemMessage(content="Be brief."),
            UserMessage(content="Hi"),
            AssistantMessage(content=text, prefix=True),
        ]
    )
    ids = encode_messages(made, [*messages, prefix], [])
    assert ids == made.mistral.encode_chat_completion(request).tokens
    assert ids[-1] != made.eos_id
    before = encode_messages(made, messages, [])
    assert ids[: len(before)] == before
    assert len(ids) > len(before)


@pytest.mark.parametrize("ask", [_ask_python, _ask_batch])
def test_answer_goes_on_from_a_prefix(llm: LLM, ask: Any) -> None:
    messages = [USER, {"role": "assistant", "content": "The sea is", "prefix": True}]
    answer = ask(llm, messages)
    ids = encode_messages(llm.tokenizer, messages, [])
    (wanted,) = llm.generate([ids], GREEDY)
    assert answer.token_ids == wanted.token_ids
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.text == wanted.text  # its first space belongs to it


@pytest.mark.parametrize("held", [{"json_schema": {"type": "null"}}, {"json_object": True}])
@pytest.mark.parametrize("ask", [_ask_python, _ask_batch])
def test_prefix_and_a_schema_are_refused(llm: LLM, ask: Any, held: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="prefix and a JSON schema: expected one of them"):
        ask(llm, [USER, SAID | {"prefix": True}], held=held)


JUNK: list[Any] = [None, 0, 1.5, True, "", "x", "\ud83d", [], [1], {}, {"type": "text"}, "user",
                   "tool", "assistant", [PICTURE], [{"type": "text", "text": "a"}], ["é"],
                   "abcDEF123", {"name": "f"}, [CALL], "[" * 5000, 10**400]  # fmt: skip


def _spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place in a value where something else can be put."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _spots(value[key])


@pytest.mark.parametrize("name", ["v1", "v3", "small tekken v7", "v11", "v13", "v15"])
def test_any_messages_are_encoded_or_refused_in_a_line_that_says_where(name: str) -> None:
    rng = random.Random(14)
    made = tokenizer(name)
    n_refused = 0
    for _ in range(300):
        messages = copy.deepcopy(WHOLE if rng.random() < 0.7 else [USER, SAID | {"prefix": True}])
        for _ in range(rng.randrange(1, 3)):
            where, key = rng.choice(list(_spots(messages)))
            if rng.random() < 0.3:
                del where[key]
            else:
                where[key] = copy.deepcopy(rng.choice(JUNK))
        try:
            ids = encode_messages(made, messages, [TOOL])
        except PromptError as error:
            n_refused += 1
            said = str(error)
            assert len(said) <= 300, said
            assert "\n" not in said
            assert re.match(r"message \d+\b|messages are ", said), (said, messages)
        else:
            assert ids
    assert n_refused > 100
