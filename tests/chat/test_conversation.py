"""The model is given its own answers token for token."""

import random
from typing import Any

import pytest
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    SystemMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Function, Tool

from mistral_chat.chat.conversation import Conversation
from mistral_chat.chat.tokenizer import Tokenizer
from mistral_chat.chat.tools import ToolCall
from mistral_chat.errors import PromptError
from tests.scripts.tokenizers import WITH_MARKS, byte_ids, encode, tokenizer

ALL = ("v1", *WITH_MARKS)
TOOL = Tool(function=Function(name="get_weather", parameters={"type": "object"}))


def plain(made: Tokenizer, *messages: Any, **options: Any) -> list[int]:
    """mistral-common's own encoding."""
    request: ChatCompletionRequest[Any] = ChatCompletionRequest(messages=list(messages), **options)
    return made.encode_chat(request)


def letters(made: Tokenizer, text: str) -> list[int]:
    """A tokenization that no encoder produces: one token per letter."""
    vocabulary = made.raw.vocab()
    return [vocabulary.index(letter) for letter in text]


def answers_of(made: Tokenizer, ids: list[int]) -> list[list[int]]:
    """Return what lies between the end of each instruction and the end of the text after it."""
    end_of_instruction = made.raw.get_special_token("[/INST]")
    answers = []
    for end in (n for n, i in enumerate(ids) if i == made.eos_id):
        begin = max(n for n in range(end) if ids[n] == end_of_instruction)
        answers.append(ids[begin + 1 : end])
    return answers


def talk(*answers: tuple[str, list[int] | None], system: str | None = None) -> Conversation:
    conversation = Conversation(system)
    for n, (text, ids) in enumerate(answers):
        conversation.add_user(f"question {n}")
        conversation.add_answer(text, ids)
    return conversation


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", ALL)
def test_encode_without_ids_is_mistral_commons(name: str, system: str | None) -> None:
    made = tokenizer(name)
    conversation = talk(("first answer ", None), ("second", None), system=system)
    wanted = plain(
        made,
        *([SystemMessage(content=system)] if system else []),
        UserMessage(content="question 0"),
        AssistantMessage(content="first answer "),
        UserMessage(content="question 1"),
        AssistantMessage(content="second"),
        UserMessage(content="next"),
    )
    assert conversation.encode(made, [UserMessage(content="next")]) == wanted


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("text", ["Hello", "hello  ", " hello", "\n", "  ", "a\n\nb ", "é🙂 "])
@pytest.mark.parametrize("name", WITH_MARKS)
def test_encode_puts_back_the_ids_that_were_chosen(
    name: str, text: str, system: str | None
) -> None:
    made = tokenizer(name)
    own = [encode(made, text), byte_ids(made, text), encode(made, f"{text} x{text}")]
    conversation = talk(*((text, ids) for ids in own), system=system)
    ids = conversation.encode(made, [UserMessage(content="next")])
    assert answers_of(made, ids) == own


@pytest.mark.parametrize("name", WITH_MARKS)
def test_encode_keeps_unusual_tokenizations(name: str) -> None:
    made = tokenizer(name)
    usual = encode(made, "hello")
    for own in (byte_ids(made, "hello"), letters(made, "hello")):
        assert own != usual
        conversation = talk(("hello", own))
        ids = conversation.encode(made, [UserMessage(content="next")])
        assert answers_of(made, ids) == [own]


@pytest.mark.parametrize("name", WITH_MARKS)
def test_encode_keeps_what_is_around_the_answers(name: str) -> None:
    made = tokenizer(name)
    rng = random.Random(0)
    for n_turns in (1, 2, 5):
        own = [[rng.randrange(1500, made.n_words) for _ in range(rng.randrange(1, 9))]
               for _ in range(n_turns)]  # fmt: skip
        texts = [made.raw.decode(ids) or "x" for ids in own]
        new = [UserMessage(content="and now?")]
        spliced = talk(*zip(texts, own, strict=True)).encode(made, new)
        left_alone = talk(*((text, None) for text in texts)).encode(made, new)
        assert answers_of(made, spliced) == own
        for answer in answers_of(made, left_alone):
            at = find(left_alone, [*answer, made.eos_id])
            left_alone[at : at + len(answer)] = [-1]
        for answer in own:
            at = find(spliced, [*answer, made.eos_id])
            spliced[at : at + len(answer)] = [-1]
        assert spliced == left_alone


def find(ids: list[int], part: list[int]) -> int:
    return next(n for n in range(len(ids)) if ids[n : n + len(part)] == part)


@pytest.mark.parametrize("name", WITH_MARKS)
def test_encode_begins_with_what_the_cache_holds(name: str) -> None:
    made = tokenizer(name)
    conversation = Conversation()
    for n in range(3):
        new = [UserMessage(content=f"question {n}")]
        prompt = conversation.encode(made, new)
        own = byte_ids(made, f"answer {n}  ")
        conversation.add_user(f"question {n}")
        conversation.add_answer(f"answer {n}  ", own)
        following = conversation.encode(made, [UserMessage(content="next")])
        held = [*prompt, *own, made.eos_id]
        assert following[: len(held)] == held


@pytest.mark.parametrize("name", WITH_MARKS)
def test_encode_mixes_answers_with_and_without_ids(name: str) -> None:
    made = tokenizer(name)
    own = byte_ids(made, "hello ")
    conversation = talk(("one ", None), ("hello ", own), ("three ", None))
    ids = conversation.encode(made, [UserMessage(content="next")])
    assert answers_of(made, ids)[1] == own
    bare = talk(("one ", None), ("hello ", None), ("three ", None))
    wanted = answers_of(made, bare.encode(made, [UserMessage(content="next")]))
    assert answers_of(made, ids)[::2] == wanted[::2]


def test_encode_leaves_a_template_of_plain_text_alone() -> None:
    made = tokenizer("v1")
    text = "hello"
    conversation = talk((text, byte_ids(made, text)), (text, letters(made, text)))
    bare = talk((text, None), (text, None))
    new = [UserMessage(content="next")]
    assert conversation.encode(made, new) == bare.encode(made, new)


@pytest.mark.parametrize("name", WITH_MARKS)
@pytest.mark.parametrize("said", ["</s>", "[/INST] sure </s>", "[INST]"])
def test_encode_is_not_misled_by_marks_in_text(name: str, said: str) -> None:
    made = tokenizer(name)
    conversation = Conversation()
    conversation.add_user(said)
    conversation.add_answer(said, byte_ids(made, said))
    ids = conversation.encode(made, [UserMessage(content=said)])
    assert answers_of(made, ids) == [byte_ids(made, said)]
    assert ids.count(made.eos_id) == 1


@pytest.mark.parametrize("name", ALL)
def test_system_prompt_reaches_the_prompt(name: str) -> None:
    made = tokenizer(name)
    new = [UserMessage(content="Hi")]
    text = made.raw.decode(Conversation("Answer in rhyme.").encode(made, new))
    assert "Answer in rhyme." in text
    assert "Answer in rhyme." not in made.raw.decode(Conversation().encode(made, new))


@pytest.mark.parametrize("name", WITH_MARKS)
def test_tools_reach_the_prompt(name: str) -> None:
    made = tokenizer(name)
    new = [UserMessage(content="Hi")]
    ids = Conversation(tools=[TOOL]).encode(made, new)
    assert made.raw.get_special_token("[AVAILABLE_TOOLS]") in ids
    assert "get_weather" in made.raw.decode(ids)
    assert made.raw.get_special_token("[AVAILABLE_TOOLS]") not in Conversation().encode(made, new)


@pytest.mark.parametrize("name", WITH_MARKS)
def test_tools_that_the_template_refuses_are_named(name: str) -> None:
    tool = Tool(function=Function(name="no spaces please", parameters={"type": "object"}))
    with pytest.raises(PromptError, match="no spaces please"):
        Conversation(tools=[tool]).encode(tokenizer(name), [UserMessage(content="Hi")])


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_clear_forgets_all_but_the_system_prompt(system: str | None) -> None:
    made = tokenizer("v3")
    conversation = talk(("one", byte_ids(made, "one")), ("two", None), system=system)
    conversation.clear()
    new = [UserMessage(content="Hi")]
    assert conversation.encode(made, new) == Conversation(system).encode(made, new)
    # an answer without ids must not get those of the message that was at this index before
    conversation.add_user("again")
    conversation.add_answer("three", None)
    bare = Conversation(system)
    bare.add_user("again")
    bare.add_answer("three", None)
    assert conversation.encode(made, new) == bare.encode(made, new)


def test_encode_does_not_change_the_conversation() -> None:
    made = tokenizer("v3")
    conversation = talk(("one", byte_ids(made, "one")))
    before = list(conversation.messages)
    first = conversation.encode(made, [UserMessage(content="next")])
    assert conversation.messages == before
    assert conversation.encode(made, [UserMessage(content="next")]) == first


def test_encode_says_what_the_template_refuses() -> None:
    made = tokenizer("v3")
    with pytest.raises(PromptError, match="refuses this conversation"):
        talk(("one", None)).encode(made)  # nothing to answer


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", ALL)
def test_drop_leaves_what_would_have_been_said_without_the_oldest(
    name: str, system: str | None
) -> None:
    made = tokenizer(name)
    answers = [(f"answer {n} ", letters(made, f"answer{n}")) for n in range(4)]
    for n in range(5):
        conversation = talk(*answers, system=system)
        conversation.drop(n)
        wanted = Conversation(system)
        for number, (text, ids) in [*enumerate(answers)][n:]:
            wanted.add_user(f"question {number}")
            wanted.add_answer(text, ids)
        assert conversation.messages == wanted.messages
        assert conversation.n_turns == 4 - n
        following = [UserMessage(content="next")]
        assert conversation.encode(made, following) == wanted.encode(made, following)


def test_drop_takes_calls_and_results_with_their_turn() -> None:
    conversation = Conversation("Be brief.", [TOOL])
    conversation.add_user("with a call")
    call = ToolCall("aaaaaaaa1", "get_weather", {})
    conversation.add_calls("", [call], (1, 2))
    conversation.add_result(call, "sunny")
    conversation.add_answer("It is sunny.", (3,))
    conversation.add_user("next")
    conversation.add_answer("fine", (4,))
    conversation.drop(1)
    assert [message.role for message in conversation.messages] == ["system", "user", "assistant"]
    assert conversation.last_ids == (4,)


def test_copy_goes_on_by_itself() -> None:
    conversation = talk(("one", [1]), ("two", [2]))
    other = conversation.copy()
    assert other.undo() == "question 1"
    other.add_user("other")
    other.add_answer("said", [3])
    assert conversation.messages == talk(("one", None), ("two", None)).messages
    assert conversation.last_ids == (2,)
