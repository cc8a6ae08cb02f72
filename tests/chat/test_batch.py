"""answer_many over a scripted model and a random one: tools and schemas of single questions."""

import json
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from mistral_common.protocol.instruct.tool_calls import Function, Tool

from mistral_chat import LLM, Answer, SamplingParams
from mistral_chat.chat.batch import Question, answer_many
from mistral_chat.chat.grammar import Grammar, GrammarMask
from mistral_chat.errors import PromptError, UsageError
from tests.chat.test_chat import Talk

GREEDY = SamplingParams(temperature=0, max_tokens=40, seed=1)
HOT = SamplingParams(temperature=1.5, max_tokens=120, seed=2)
ASKED = [{"role": "user", "content": "Hi"}]
TOOL: Mapping[str, Any] = {"name": "f", "parameters": {"type": "object"}}
SMALL: Mapping[str, Any] = {"type": "integer", "minimum": 0, "maximum": 9}


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> Iterator[LLM]:
    with LLM(tiny_folder, device="cpu", dtype="float32", max_batch_size=3) as made:
        yield made


def _ends(llm: LLM, *questions: Question, **defaults: Any) -> list[Any]:
    """The final result of each question, in order."""
    found = answer_many(llm.engine, llm.tokenizer, questions, **defaults)
    ends = {n: e for n, e in found if isinstance(e, (Answer, PromptError, UsageError))}
    assert sorted(ends) == list(range(len(questions)))
    return [ends[n] for n in sorted(ends)]


@pytest.mark.parametrize("where", ["question", "all"])
@pytest.mark.parametrize("name", ["v3", "small tekken"])
def test_calls_are_reported_and_not_run(name: str, where: str) -> None:
    talk = Talk(name)
    assert talk.tokenizer.tool_calls_id is not None
    call = talk.ids('[{"name": "f", "arguments": {"a": 1}}]')
    talk.runner.script = deque([talk.tokenizer.tool_calls_id, *call])
    own = [TOOL] if where == "question" else None
    offered = [Tool(function=Function(**TOOL))] if where == "all" else []
    question = Question(messages=ASKED, tools=own, params=GREEDY)
    *_, (number, answer) = answer_many(talk.chat.engine, talk.tokenizer, [question], offered)
    assert isinstance(answer, Answer)
    assert (number, answer.finish_reason) == (0, "tool_calls")
    assert [(c.name, c.arguments) for c in answer.tool_calls] == [("f", {"a": 1})]


def test_schema_of_a_question_is_its_own(llm: LLM) -> None:
    name = {"enum": ["red", "green"]}
    free, one, two, default = _ends(
        llm,
        Question(prompt="a", params=HOT, json_object=False),
        Question(prompt="a", params=HOT, json_schema=name),
        Question(messages=ASKED, params=HOT, json_schema={"type": "array", "items": name,
                                                          "maxItems": 2}),
        Question(prompt="a", params=HOT),
        grammar=Grammar(SMALL),
    )  # fmt: skip
    jsonschema.validate(json.loads(one.text), name)
    assert isinstance(json.loads(two.text), list)
    assert json.loads(default.text) in range(10)
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(free.text)


@pytest.mark.parametrize(
    ("asked", "kind", "said"),
    [
        ({"json_schema": {"not": {}}}, PromptError, 'not supported: "not"'),
        ({"json_schema": {}, "json_object": True}, UsageError, "expected one of them"),
        ({"json_schema": {}, "tools": [TOOL]}, UsageError, "tools and a JSON schema"),
        ({"json_object": True, "params": SamplingParams(stop=("x",))}, UsageError, "stop and a"),
    ],
)
def test_schema_that_cannot_be_taken_is_its_own_questions_end(
    llm: LLM, asked: dict[str, Any], kind: type, said: str
) -> None:
    good = Question(prompt="a", params=HOT, json_schema=SMALL)
    bad = Question(**({"messages": ASKED, "params": HOT} | asked))
    first, refused, last = _ends(llm, good, bad, good)
    assert isinstance(refused, kind)
    assert said in str(refused)
    assert first.text == last.text
    assert json.loads(first.text) in range(10)


@pytest.mark.parametrize("method", ["allowed", "take"])
@pytest.mark.parametrize("at", [1, 3])
def test_mask_that_fails_under_way_ends_its_own_answer(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, method: str, at: int
) -> None:
    """Fail as llguidance does when a schema exceeds its limits."""
    whole = getattr(GrammarMask, method)
    held = {"type": "string", "const": "fails " * 4}
    n_calls = 0

    def fail(self: GrammarMask, *words: Any) -> Any:
        nonlocal n_calls
        if self._where == "json_schema" and self is first_made[0]:
            n_calls += 1
            if n_calls == at:
                raise PromptError("too much")
            assert n_calls < at, "asked again after it failed"
        return whole(self, *words)

    first_made: list[GrammarMask] = []
    make = Grammar.mask

    def note(self: Grammar, *words: Any) -> GrammarMask:
        first_made.append(make(self, *words))
        return first_made[-1]

    monkeypatch.setattr(Grammar, "mask", note)
    monkeypatch.setattr(GrammarMask, method, fail)
    failing = Question(prompt="a", params=HOT, json_schema=held)
    good = Question(prompt="a", params=HOT, json_schema={"const": "goes on"})
    free = Question(prompt="a", params=GREEDY)
    ended, *others = _ends(llm, failing, good, free, good)
    assert isinstance(ended, PromptError)
    assert str(ended) == "too much"
    assert [json.loads(a.text) for a in (others[0], others[2])] == ["goes on"] * 2
    monkeypatch.undo()
    assert others[1].token_ids == _ends(llm, free)[0].token_ids
