"""JSON by construction: random schemas, masks against brute force, refusals, batches."""

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
from mistral_common.protocol.instruct.tool_calls import Function, Tool

from mistral_chat import LLM, Answer, SamplingParams
from mistral_chat.chat.chat import Chat
from mistral_chat.chat.schema.grammar import ANY_OBJECT, Grammar, GrammarMask, read_grammar
from mistral_chat.errors import PromptError, UsageError
from mistral_chat.model.args import TransformerArgs
from tests.conftest import TINY, make_folder
from tests.scripts.tokenizers import encode, small_tekken, tokenizer

Schema = dict[str, Any]
Parts = tuple[tuple[bytes, ...], ...]
N_SCHEMAS = 60
N_OF_A_REAL_MODEL = 8  # whose tokens cost a hundred times as much
HOT = SamplingParams(temperature=1.5, max_tokens=160, seed=5)
POINT: Schema = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 40}},
    "required": ["x"],
    "additionalProperties": False,
}
NAMES: Schema = {"type": "array", "items": {"enum": ["é", 'a"b', "\n"]}, "maxItems": 3}


@pytest.fixture(scope="module", params=["v3", "small tekken"])
def llm(
    request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LLM]:
    """A random model; the one with a Tekken tokenizer has rows beyond the tokenizer's."""
    folder = tiny_folder
    if request.param == "small tekken":
        n_words = tokenizer("small tekken").n_words
        args = TransformerArgs(**{**vars(TINY), "vocab_size": n_words + 45})
        folder = make_folder(tmp_path_factory.mktemp("models") / "tekken", args)
        (folder / "tokenizer.model.v3").unlink()
        (folder / "tekken.json").write_text(small_tekken("v3"), encoding="utf-8")
    with LLM(folder, device="cpu", dtype="float32", max_batch_size=8) as made:
        yield made


def _leaf(rng: random.Random) -> Schema:
    low = rng.randrange(-50, 50)
    choices: list[Schema] = [
        {"type": "string", "minLength": rng.randrange(3), "maxLength": rng.randrange(3, 9)},
        {"type": "string", "pattern": "^[a-f]{2,5}-[0-9]+$", "maxLength": 12},
        {"type": "string", "format": "date"},
        {"type": "integer", "minimum": low, "maximum": low + rng.randrange(200)},
        {"type": "number", "exclusiveMinimum": low, "maximum": low + rng.random() * 9 + 1},
        {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 1000},
        {"type": "number"},
        {"type": "boolean"},
        {"type": "null"},
        {"type": ["integer", "null"]},
        {"enum": rng.sample(["red", "grün", 'a"b', "\n", 3, 2.5, None, True, [1, "x"]], 3)},
        {"const": {"k": [1, None]}},
    ]
    return rng.choice(choices)


def _draw_schema(rng: random.Random, depth: int) -> Schema:
    """Draw a schema of at most this depth whose texts are short, or probably so."""
    kind = rng.random()
    if depth == 0 or kind < 0.1:
        return _leaf(rng)
    if kind < 0.35:
        least = rng.randrange(3)
        items = _draw_schema(rng, depth - 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + 2}
    if kind < 0.5:
        return {"anyOf": [_draw_schema(rng, depth - 1) for _ in range(rng.randrange(1, 4))]}
    names = rng.sample(["a", "b_c", "größe", "a b", 'q"', "n\n", "enum"], rng.randrange(4))
    made: Schema = {
        "type": "object",
        "properties": {name: _draw_schema(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.5],
        "additionalProperties": False,
    }
    if rng.random() < 0.2:
        made["additionalProperties"] = _leaf(rng)
    return made


def _is_valid(text: str, schema: Mapping[str, Any]) -> None:
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


def _answers_of_schemas(llm: LLM, n_schemas: int, max_tokens: int) -> list[str]:
    """What ended by itself of answers to random schemas of growing depth, each of them valid."""
    rng = random.Random(20)
    schemas = [_draw_schema(rng, n * 5 // n_schemas) for n in range(n_schemas)]
    params = [
        SamplingParams(temperature=1.5, top_p=rng.choice([1, 0.9]), max_tokens=max_tokens, seed=n)
        for n in range(n_schemas)
    ]
    answers = llm.generate(["Some JSON:"] * n_schemas, params, json_schema=schemas)
    ended = [n for n in range(n_schemas) if answers[n].finish_reason == "stop"]
    assert {a.finish_reason for a in answers} <= {"stop", "length"}
    for n in ended:
        _is_valid(answers[n].text, schemas[n])
    return [answers[n].text for n in ended]


def test_answers_that_end_by_themselves_are_valid(llm: LLM) -> None:
    ended = _answers_of_schemas(llm, N_SCHEMAS, 160)
    # A name of a further property has no bound, and this model seldom closes one.
    assert len(ended) > 0.7 * N_SCHEMAS
    assert len(set(ended)) > 0.5 * len(ended)


def test_answers_of_a_real_model_that_end_by_themselves_are_valid(embedded_folder: Path) -> None:
    with LLM(embedded_folder, device="cpu", dtype="float32", max_batch_size=8) as llm:
        ended = _answers_of_schemas(llm, N_OF_A_REAL_MODEL, 48)
    assert len(ended) > 0.6 * N_OF_A_REAL_MODEL
    assert len(set(ended)) > 0.5 * len(ended)


def test_chat_answer_is_valid(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Where?"}]
    for seed in range(8):
        params = SamplingParams(temperature=1.5, seed=seed)
        _is_valid(llm.chat(messages, params, json_schema=POINT).text, POINT)
    cut = llm.chat(messages, HOT, json_object=True)
    assert cut.finish_reason == "length"
    assert cut.text.lstrip().startswith("{")


def test_send_overrides_the_grammar_of_a_chat(llm: LLM) -> None:
    chat = Chat(llm.engine, llm.tokenizer, grammar=Grammar(POINT))
    for schema in (None, NAMES, None):
        *_, answer = chat.send("Where?", HOT, json_schema=schema)
        assert isinstance(answer, Answer)
        _is_valid(answer.text, schema or POINT)
        assert answer.finish_reason == "stop"


def test_batch_equals_one_by_one(llm: LLM) -> None:
    schemas: list[Schema | None] = [POINT, NAMES, None, POINT]
    params = [SamplingParams(temperature=1.5, max_tokens=40, seed=seed) for seed in range(4)]
    prompts = ["one", "two words", "three", "and the fourth"]
    together = llm.generate(prompts, params, json_schema=schemas)
    for n, answer in enumerate(together):
        (alone,) = llm.generate(prompts[n], params[n], json_schema=schemas[n])
        assert answer.token_ids == alone.token_ids


def test_masks_hold_on_a_machine_that_decodes_ahead(llm: LLM) -> None:
    def answers() -> list[tuple[int, ...]]:
        params = [SamplingParams(temperature=0, max_tokens=30)] * 3
        found = llm.generate(["a", "b", "c"], params, json_schema=[POINT, None, NAMES])
        return [answer.token_ids for answer in found]

    plain = answers()
    llm.engine.runner.open_decoder()
    try:
        assert answers() == plain
    finally:
        llm.engine.runner.decoder = None


def test_logprobs_are_of_the_model_and_not_of_the_mask(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=1)
    (free,) = llm.generate("x", params)
    (held,) = llm.generate("x", params, json_object=True)
    assert free.logprobs is not None
    assert held.logprobs is not None
    assert held.logprobs[0].top == free.logprobs[0].top
    assert held.logprobs[0].logprob <= free.logprobs[0].logprob


SPACES = ("", " ", *("\n" + " " * n for n in range(41)))
SMALL: Schema = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yé", 12]}, "b": {"const": True}},
    "required": ["a"],
    "additionalProperties": False,
}
_A = (SPACES, ('"a"',), SPACES, (":",), SPACES, ('"x"', '"yé"', "12"), SPACES)
_B = (SPACES, ('"b"',), SPACES, (":",), SPACES, ("true",), SPACES)
# What SMALL describes: one alternative of each, in order.
TEXTS = tuple(
    tuple(tuple(text.encode() for text in part) for part in parts)
    for parts in ((("", " "), ("{",), *_A, ("}",)), (("", " "), ("{",), *_A, (",",), *_B, ("}",)))
)


@cache
def _can_begin(text: bytes, parts: Parts) -> bool:
    """Return whether a text is the beginning of one made of these parts."""
    if not text:
        return True
    return bool(parts) and any(
        part.startswith(text)
        or (text.startswith(part) and _can_begin(text[len(part) :], parts[1:]))
        for part in parts[0]
    )


@cache
def _open_ends(text: bytes, parts: Parts) -> frozenset[tuple[bytes, Parts]]:
    """Return every way to read a text: the unfinished part at its end, and the parts left."""
    if not parts:
        return frozenset()
    found = {(text, parts)} if any(part.startswith(text) for part in parts[0]) else set()
    for part in parts[0]:
        if text.startswith(part):
            found |= _open_ends(text[len(part) :], parts[1:])
    return frozenset(found)


@cache
def _is_whole(text: bytes, parts: Parts) -> bool:
    if not parts:
        return not text
    return any(text.startswith(p) and _is_whole(text[len(p) :], parts[1:]) for p in parts[0])


def _ids(words: Any, vocab_size: int) -> set[int]:
    bits = np.unpackbits(words.numpy().view(np.uint8), bitorder="little")
    assert len(words) == -(-vocab_size // 32)
    assert not bits[vocab_size:].any()
    return set(np.flatnonzero(bits).tolist())


@pytest.mark.parametrize("name", ["v3", "small tekken"])
def test_masks_equal_brute_force(name: str) -> None:
    made = tokenizer(name)
    vocab_size = made.n_words + 45
    banned = set(made.banned_ids(vocab_size, tools=False)) | {
        i for i in range(made.n_words) if made.is_special(i)
    }
    pieces = {i: made.token_bytes(i) for i in range(vocab_size) if i not in banned}
    rng = random.Random(1)
    for seed in range(2):
        mask = Grammar(SMALL).mask(made, vocab_size)
        text = b""
        chosen = None
        while chosen != made.eos_id:
            ends = {end for parts in TEXTS for end in _open_ends(text, parts)}

            def may_follow(data: bytes, ends: Iterable[tuple[bytes, Parts]] = ends) -> bool:
                return any(_can_begin(begun + data, parts) for begun, parts in ends)

            near = {i for i in range(256) if may_follow(bytes((i,)))}  # saves most look-ups
            expected = {i for i, piece in pieces.items() if piece[0] in near and may_follow(piece)}
            if any(_is_whole(text, parts) for parts in TEXTS):
                expected.add(made.eos_id)
            assert _ids(mask.allowed(), vocab_size) == expected, text
            # few spaces, so that there are few places to check
            tight = sorted(i for i in expected if i == made.eos_id or pieces[i].strip())
            chosen = rng.choice(tight if seed else sorted(expected))
            mask.take(chosen)
            text += pieces.get(chosen, b"")
        _is_valid(text.decode(), SMALL)
    for cached in (_can_begin, _open_ends, _is_whole):
        cached.cache_clear()


@pytest.mark.parametrize("name", ["v3", "v7", "small tekken", "v11", "v15"])
@pytest.mark.parametrize("text", ['{"x": 12}', '{\n  "x": 7\n}', '{"x":1}', ' {"x": -3}'], ids=repr)
def test_texts_that_models_write_are_allowed(name: str, text: str) -> None:
    made = tokenizer(name)
    mask = Grammar(POINT).mask(made, made.n_words)
    if made.version.endswith("SentencePiece"):
        text = text.removeprefix(" ")  # the model writes one itself
    for token in encode(made, text):
        assert token in _ids(mask.allowed(), made.n_words)
        mask.take(token)
    assert made.eos_id in _ids(mask.allowed(), made.n_words)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (ANY_OBJECT, '{"a":  1'),  # pages of spaces
        (ANY_OBJECT, "{\n\n"),
        (ANY_OBJECT, "  {"),
        (ANY_OBJECT, "[1]"),
        (ANY_OBJECT, '{"a": 1, "a\n'),
        ({"properties": {"a": {"type": "null"}}}, r'{"\u0061": 1}'),  # another name for a
        ({"properties": {"a/": {"type": "null"}}}, r'{"a\/": 1}'),
        ({"properties": {"\n": {"type": "null"}}}, r'{"\u000a": 1}'),
        ({"properties": {"a": {}}, "type": "object"}, '{"a": 1, "a": 2}'),
        ({"type": "string"}, r'"\ud83d"'),
        ({"type": "integer"}, "01"),
    ],
)
def test_texts_that_would_not_be_valid_are_not_allowed(schema: Schema, text: str) -> None:
    made = tokenizer("small tekken")
    mask = Grammar(schema).mask(made, made.n_words)
    first_byte = made.raw.num_special_tokens  # type: ignore[union-attr]
    for byte in text.encode():
        if first_byte + byte not in _ids(mask.allowed(), made.n_words):
            return
        mask.take(first_byte + byte)
    pytest.fail("allowed to its end")


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "object", "properties": 3}, "not a JSON schema: properties: 3 is not"),
        ({"type": "text"}, "not a JSON schema: type: 'text' is not"),
        ({"properties": {"a": {"items": [{}]}}}, "not a JSON schema: properties.a.items"),
        ({"not": {}}, 'not supported: "not"'),
        ({"type": "array", "uniqueItems": True}, 'not supported: "uniqueItems"'),
        ({"$ref": "#/nowhere"}, "Pointer '/nowhere' does not exist"),
        ({"$ref": "http://localhost/schema"}, "is not present in a registry"),
        ({"enum": []}, "Unsatisfiable schema"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable schema"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"pattern": "[[:alpha:]]"}, "a pattern that means one thing here and another there (Poss"),
        ({"pattern": "[a-z&&[^e]]"}, "a pattern that means one thing here and another there (Poss"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ({"not": {}, "x-guidance": {"lenient": True}}, "not supported"),
        ({"$defs": {"a": {"minProperties": 2}}, "$ref": "#/$defs/a"}, "minProperties above"),
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, "draft 3"),
        ({"$schema": "http://localhost/schema#"}, "answers cannot be kept"),
        # the first of these would end the process
        ({"enum": [{"a": [-(2**63)]}]}, "enum: a number of 2^53 or more, which would be rounded"),
        ({"const": 2**53 + 1}, "const: a number of 2^53 or more"),
        ({"properties": {"a": {"minimum": 2**53 + 1}}}, "minimum: a number of 2^53 or more"),
        ({"type": "integer", "exclusiveMaximum": -(2**53)}, "exclusiveMaximum: a number of 2^53"),
        ({"$schema": 5}, "not a JSON schema: $schema is not of type 'string'"),
        ({"$schema": []}, "not a JSON schema: $schema is not of type 'string'"),
        ({"const": {1, 2}}, "not JSON"),
        ({"const": "\ud800"}, "answers cannot be kept"),
    ],
)
def test_schema_that_cannot_be_kept_is_refused_by_name(schema: Schema, said: str) -> None:
    with pytest.raises(PromptError) as caught:
        Grammar(schema, "the schema")
    assert str(caught.value).startswith("the schema: answers cannot be kept to this schema: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_of_properties_are_no_keywords() -> None:
    named: Schema = {"type": "object", "properties": {"minProperties": {"const": 3}}}
    Grammar(named | {"required": ["minProperties"], "minProperties": 1})
    Grammar({"enum": [{"minProperties": 3}]})


def test_numbers_that_stay_exact_are_taken() -> None:
    Grammar({"type": "integer", "minimum": 1 - 2**53, "maximum": 2**63 - 1})
    Grammar({"enum": [2**53 - 1, 0.1, 1e-300, True]})


def test_keywords_of_somebodys_own_may_hold_anything() -> None:
    Grammar({"type": "null", "x-form": {"required": True}, "example": {"minProperties": "a"}})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "does not exist: expected a file"),
        (b"{", "is not JSON: Expecting property name"),
        (b"\xff{}", "is not UTF-8 text: byte 0xff"),
        (b'{"const": NaN}', "holds NaN, which is no JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        (b"[]", "found list, expected a JSON object"),
        (b'{"type": "text"}', "answers cannot be kept to this schema: not a JSON schema: type:"),
        (b'{"anyOf": [' * 200 + b"{}" + b"]}" * 200, "schema: nested too deeply"),
    ],
)
def test_file_that_is_no_schema_is_named(tmp_path: Path, data: bytes | None, said: str) -> None:
    path = tmp_path / "schema.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(PromptError) as caught:
        read_grammar(path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)


def test_what_would_break_an_answer_is_refused(llm: LLM) -> None:
    tool = Tool(function=Function(name="f", parameters={"type": "object"}))
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(UsageError, match="tools and a JSON schema"):
        llm.chat(messages, tools=[tool], json_object=True)
    with pytest.raises(UsageError, match="tools and a JSON schema"):
        llm.conversation(tools=[tool]).send("x", json_schema=POINT)
    with pytest.raises(UsageError, match="tools and a JSON schema"):
        Chat(llm.engine, llm.tokenizer, tools=[tool], grammar=Grammar(POINT))
    with pytest.raises(UsageError, match="stop and a JSON schema"):
        llm.generate("x", SamplingParams(stop=("}",)), json_object=True)
    with pytest.raises(UsageError, match="ignore_eos and a JSON schema"):
        llm.generate("x", SamplingParams(ignore_eos=True), json_object=True)
    with pytest.raises(UsageError, match="json_schema and json_object"):
        llm.generate("x", json_schema=POINT, json_object=True)
    with pytest.raises(UsageError, match="1 JSON schemas for 2 prompts"):
        llm.generate(["x", "y"], json_schema=[POINT])


def test_token_that_was_not_allowed_is_an_error() -> None:
    made = tokenizer("small tekken")
    mask = Grammar(POINT, "the schema").mask(made, made.n_words)
    with pytest.raises(PromptError, match="the schema: llguidance cannot follow"):
        mask.take(made.raw.num_special_tokens + ord("x"))  # type: ignore[union-attr]


def test_place_where_nothing_is_valid_is_named() -> None:
    matcher: Any = SimpleNamespace(compute_bitmask=lambda: bytes(8), is_error=lambda: False)
    with pytest.raises(PromptError, match="the schema: the schema leads to a place where no text"):
        GrammarMask(matcher, 40, "the schema").allowed()
