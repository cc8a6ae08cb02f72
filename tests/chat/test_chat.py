"""Streams, endings and histories of answers with tokens chosen in advance.

The engine is the real one; its runner scores the scripted token highest instead of running a model.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.tool_calls import Function, Tool

from mistral_chat.chat.answer import Answer, Delta, StopTexts
from mistral_chat.chat.chat import Chat, ChatStream
from mistral_chat.chat.tokenizer import Tokenizer
from mistral_chat.config import SamplingParams
from mistral_chat.engine.engine import Engine, Prefill
from mistral_chat.engine.runner import Runner
from mistral_chat.engine.step import Step
from mistral_chat.engine.step_guard import StepGuard
from mistral_chat.errors import ContextLengthError, PromptError
from tests.scripts.tokenizers import WITH_MARKS, byte_ids, encode, tokenizer

GREEDY = SamplingParams(temperature=0)
TOOL = Tool(function=Function(name="f", parameters={"type": "object"}))


class Scripted(Runner):
    """Scores the next scripted id highest, and the end token after the script."""

    def __init__(self, made: Tokenizer, max_seq_len: int, vocab_size: int) -> None:
        device = torch.device("cpu")
        args = SimpleNamespace(vocab_size=vocab_size)
        self._model: Any = SimpleNamespace(args=args, device=device)
        self._cache: Any = SimpleNamespace(n_slots=1)
        self.group: Any = SimpleNamespace(world_size=1)
        self.guard = StepGuard(1)
        self.vocab_size = vocab_size
        self.max_seq_len = max_seq_len
        self.chunk_size = 16
        self.decoder = None
        self.script: deque[int] = deque()
        self.eos_id = made.eos_id
        self.n_scored = 0
        self.on_scored: Callable[[int], None] = lambda n: None

    def run(self, step: Step) -> torch.Tensor | None:
        if step.logits == "none":
            return None
        self.n_scored += 1
        self.on_scored(self.n_scored)
        n_rows = len(step.chunks[0].tokens) if step.logits == "all" else 1
        logits = torch.zeros(n_rows, self.model.args.vocab_size)
        logits[-1, self.script.popleft() if self.script else self.eos_id] = 50
        return logits


class Talk:
    """A chat, its script, and what it streamed."""

    def __init__(
        self, name: str = "v3", max_seq_len: int = 2000, extra_rows: int = 0, **options: Any
    ) -> None:
        self.tokenizer = tokenizer(name)
        self.runner = Scripted(self.tokenizer, max_seq_len, self.tokenizer.n_words + extra_rows)
        self.chat = Chat(Engine(self.runner), self.tokenizer, **options)

    def stream(
        self, ids: Iterable[int], params: SamplingParams = GREEDY, text: str = "Hi"
    ) -> ChatStream:
        self.runner.script = deque(ids)
        return self.chat.send(text, params)

    def answer(
        self, ids: Iterable[int], params: SamplingParams = GREEDY, text: str = "Hi"
    ) -> tuple[list[str], Answer]:
        """Return the streamed pieces and the answer."""
        events = list(self.stream(ids, params, text))
        last = events[-1]
        assert isinstance(last, Answer)
        return [e.text for e in events if isinstance(e, Delta)], last

    def next_prompt(self) -> list[int]:
        """Return the text that the model would be given now."""
        return self.chat.send("next", GREEDY)._request.ids

    def ids(self, text: str) -> list[int]:
        return encode(self.tokenizer, text)


def cut(text: str, rng: random.Random) -> list[str]:
    pieces = []
    while text:
        n = rng.randrange(1, 5)
        pieces.append(text[:n])
        text = text[n:]
    return pieces


@pytest.mark.parametrize("stop", ["a", "ab", "aab", "abab", "aaaa"])
def test_stop_texts_end_the_text_before_the_first_of_them(stop: str) -> None:
    rng = random.Random(3)
    for _ in range(200):
        text = "".join(rng.choice("aab") for _ in range(rng.randrange(20)))
        stops = StopTexts([stop])
        shown, reached = "", False
        for piece in cut(text, rng):
            more, reached = stops.add(piece)
            shown += more
            assert (text.split(stop)[0] if stop in text else text).startswith(shown)
            if reached:
                break
        shown += "" if reached else stops.flush()
        assert reached is (stop in text)
        assert shown == text.split(stop)[0]


def test_stop_texts_take_whichever_comes_first() -> None:
    rng = random.Random(4)
    for _ in range(200):
        text = "".join(rng.choice("abcd") for _ in range(15))
        stops = StopTexts(["ab", "cdd"])
        shown = ""
        for piece in cut(text, rng):
            more, reached = stops.add(piece)
            shown += more
            if reached:
                break
        else:
            shown += stops.flush()
        assert shown == text.split("ab")[0].split("cdd")[0]


def test_stop_texts_hold_back_no_more_than_they_must() -> None:
    stops = StopTexts(["END", "..."])
    assert stops.add("one E") == ("one ", False)
    assert stops.add("N") == ("", False)
    assert stops.add("Emy..") == ("ENEmy", False)
    assert stops.add("x") == ("..x", False)
    assert stops.flush() == ""


def test_no_stop_texts_hold_back_nothing() -> None:
    stops = StopTexts([])
    assert stops.add("all of it") == ("all of it", False)
    assert stops.flush() == ""


@pytest.mark.parametrize(
    "text", ["Hello there.", "  two, and two after  ", "line\n\nline\n", "é🙂 日本 👩‍👩‍👧"]
)
@pytest.mark.parametrize("one_byte_each", [False, True])
@pytest.mark.parametrize("name", ["v1", *WITH_MARKS])
def test_answer_is_what_was_streamed(name: str, text: str, one_byte_each: bool) -> None:
    talk = Talk(name)
    if one_byte_each:
        text = text.strip(" ")
    ids = byte_ids(talk.tokenizer, text) if one_byte_each else talk.ids(text)
    pieces, answer = talk.answer(ids)
    assert "".join(pieces) == answer.text == text
    assert all(pieces)  # a piece is never empty
    assert not any("\ufffd" in piece for piece in pieces)
    assert answer.token_ids == (*ids, talk.tokenizer.eos_id)
    assert answer.finish_reason == "stop"
    assert not answer.stopped_by_text


def test_stream_yields_progress_then_text_then_the_answer() -> None:
    events = list(Talk().stream(Talk().ids("Hello there"), text="a long question " * 20))
    kinds = [type(event) for event in events]
    n_prefill = kinds.count(Prefill)
    assert n_prefill > 2
    assert kinds == [Prefill] * n_prefill + [Delta] * (len(kinds) - n_prefill - 1) + [Answer]


def test_stream_runs_nothing_before_it_is_iterated() -> None:
    talk = Talk()
    stream = talk.stream(talk.ids("Hello"))
    assert stream.answer is None
    assert talk.runner.n_scored == 0
    events = list(stream)
    assert stream.answer is events[-1]


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_answer_ends_at_max_tokens(max_tokens: int) -> None:
    talk = Talk()
    ids = talk.ids("one two three four five")
    _, answer = talk.answer(ids, replace(GREEDY, max_tokens=max_tokens))
    assert answer.finish_reason == "length"
    assert answer.token_ids == tuple(ids[:max_tokens])
    assert answer.text == talk.tokenizer.raw.decode(ids[:max_tokens])


def test_answer_ends_when_the_context_is_full() -> None:
    talk = Talk(max_seq_len=40)
    ids = talk.ids("word " * 100)
    _, answer = talk.answer(ids)
    assert answer.finish_reason == "length"
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == 40


def test_answer_of_the_end_token_alone_is_empty() -> None:
    talk = Talk()
    pieces, answer = talk.answer([])
    assert (pieces, answer.text, answer.finish_reason) == ([], "", "stop")
    assert answer.token_ids == (talk.tokenizer.eos_id,)


def test_unfinished_character_is_shown_when_the_answer_ends() -> None:
    for ids_after, reason in (([], "stop"), ([5], "length")):
        talk = Talk()
        half = byte_ids(talk.tokenizer, "x🙂")[:-1]
        params = replace(GREEDY, max_tokens=len(half) if ids_after else None)
        pieces, answer = talk.answer(half, params)
        assert answer.finish_reason == reason
        assert "".join(pieces) == answer.text == "x\ufffd"


@pytest.mark.parametrize("name", WITH_MARKS)
@pytest.mark.parametrize("one_byte_each", [False, True])
def test_stop_text_is_found_over_tokens(name: str, one_byte_each: bool) -> None:
    talk = Talk(name)
    text = "The answer is 42. Question: what else?"
    ids = byte_ids(talk.tokenizer, text) if one_byte_each else talk.ids(text)
    pieces, answer = talk.answer(ids, replace(GREEDY, stop=("Question:",)))
    assert "".join(pieces) == answer.text == "The answer is 42. "
    assert answer.finish_reason == "stop"
    assert answer.stopped_by_text
    # nothing is run after the token that completes it
    assert talk.runner.n_scored == len(answer.token_ids)
    assert "what" not in talk.tokenizer.raw.decode(list(answer.token_ids))


def test_stop_text_that_never_comes_holds_nothing_back_at_the_end() -> None:
    for params, reason in (
        (replace(GREEDY, stop=("Question:",)), "stop"),
        (replace(GREEDY, stop=("Question:",), max_tokens=8), "length"),
    ):
        talk = Talk()
        ids = byte_ids(talk.tokenizer, "x Questi" if reason == "length" else "x Question")
        pieces, answer = talk.answer(ids, params)
        assert answer.finish_reason == reason
        assert "".join(pieces) == answer.text == talk.tokenizer.raw.decode(ids)
        assert not answer.stopped_by_text


def test_stop_text_at_the_last_token_is_a_stop() -> None:
    talk = Talk()
    ids = byte_ids(talk.tokenizer, "xEND")
    _, answer = talk.answer(ids, replace(GREEDY, stop=("END",), max_tokens=4))
    assert (answer.finish_reason, answer.text) == ("stop", "x")


def test_stop_text_at_the_very_beginning_leaves_nothing() -> None:
    talk = Talk()
    pieces, answer = talk.answer(talk.ids("END of it"), replace(GREEDY, stop=("END",)))
    assert (pieces, answer.text, answer.finish_reason) == ([], "", "stop")


def cancel_at(talk: Talk, stream: ChatStream, n_tokens: int) -> None:
    """Cancel from outside while a token is being computed, as Ctrl-C does."""
    talk.runner.on_scored = lambda n: stream.cancel() if n == n_tokens else None


@pytest.mark.parametrize("n_tokens", [1, 6, 9])
def test_cancelled_answer_keeps_what_was_said(n_tokens: int) -> None:
    talk = Talk()
    text = "Hello END of it"
    ids = byte_ids(talk.tokenizer, text)
    stream = talk.stream(ids, replace(GREEDY, stop=("ENDING",)))
    cancel_at(talk, stream, n_tokens)
    *events, answer = list(stream)
    assert isinstance(answer, Answer)
    assert answer.finish_reason == "cancelled"
    assert answer.token_ids == tuple(ids[:n_tokens])
    assert answer.text == text[:n_tokens]  # also what was held back as it might begin a stop text
    assert "".join(e.text for e in events if isinstance(e, Delta)) == answer.text
    assert talk.runner.n_scored == n_tokens
    talk.runner.on_scored = lambda n: None
    assert talk.next_prompt()[: len(stream._request.ids) + n_tokens] == [
        *stream._request.ids,
        *ids[:n_tokens],
    ]


def test_cancelled_stop_text_counts_when_it_was_complete() -> None:
    talk = Talk()
    stream = talk.stream(byte_ids(talk.tokenizer, "x END"), replace(GREEDY, stop=("END",)))
    cancel_at(talk, stream, 5)
    answer = list(stream)[-1]
    assert isinstance(answer, Answer)
    assert (answer.text, answer.finish_reason) == ("x ", "stop")


def test_answer_cancelled_before_its_first_token_leaves_no_trace() -> None:
    talk = Talk()
    talk.answer(talk.ids("first"))
    before = talk.next_prompt()
    stream = talk.stream(talk.ids("second"))
    stream.cancel()
    (answer,) = list(stream)
    assert isinstance(answer, Answer)
    assert (answer.text, answer.finish_reason, answer.token_ids) == ("", "cancelled", ())
    assert answer.first_token_s is None
    assert answer.usage.completion_tokens == 0
    assert talk.next_prompt() == before


@pytest.mark.parametrize("name", WITH_MARKS)
def test_second_turn_reuses_all_that_was_run(name: str) -> None:
    talk = Talk(name)
    _, first = talk.answer(talk.ids("Hello there, friend.  "), text="a question")
    assert first.usage.cached_tokens == 0
    _, second = talk.answer(byte_ids(talk.tokenizer, "fine"), text="another")
    # all of it but the end token, which was chosen and never run
    held = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert second.usage.cached_tokens == held
    assert second.usage.prompt_tokens > held
    _, third = talk.answer(talk.ids("bye"), text="a third")
    held = second.usage.prompt_tokens + second.usage.completion_tokens - 1
    assert third.usage.cached_tokens == held


@pytest.mark.parametrize("name", ["v3", "small tekken"])
def test_second_turn_with_a_system_prompt_reuses_less_on_v3(name: str) -> None:
    # its template puts the system prompt into the last user message
    talk = Talk(name, system="Be brief.")
    _, first = talk.answer(talk.ids("Hello"))
    _, second = talk.answer(talk.ids("fine"))
    assert 0 < second.usage.cached_tokens < first.usage.prompt_tokens


@pytest.mark.parametrize("name", ["v7", "small tekken v7", "v11", "v13", "v15"])
def test_second_turn_with_a_system_prompt_reuses_all_from_v7_on(name: str) -> None:
    talk = Talk(name, system="Be brief.")
    _, first = talk.answer(talk.ids("Hello"))
    _, second = talk.answer(talk.ids("fine"))
    held = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert second.usage.cached_tokens == held


def test_usage_counts_what_was_asked_and_said() -> None:
    talk = Talk()
    stream = talk.stream(talk.ids("one two"), text="question")
    list(stream)
    assert stream.answer is not None
    usage = stream.answer.usage
    assert usage.prompt_tokens == len(stream._request.ids)
    assert usage.completion_tokens == len(talk.ids("one two")) + 1 == len(stream.answer.token_ids)


@pytest.mark.parametrize("name", WITH_MARKS)
def test_history_holds_the_ids_that_were_chosen(name: str) -> None:
    talk = Talk(name)
    own = byte_ids(talk.tokenizer, "hello  ")
    stream = talk.stream(own)
    list(stream)
    prompt = stream._request.ids
    following = talk.next_prompt()
    assert following[: len(prompt) + len(own) + 1] == [*prompt, *own, talk.tokenizer.eos_id]


def test_history_after_a_stop_text_holds_the_text_alone() -> None:
    talk = Talk()
    talk.answer(byte_ids(talk.tokenizer, "helloEND"), replace(GREEDY, stop=("END",)))
    shown = talk.tokenizer.raw.decode(talk.next_prompt())
    assert "hello" in shown
    assert "END" not in shown


@pytest.mark.parametrize("said", ["", "x"])
def test_history_leaves_out_a_turn_without_an_answer(said: str) -> None:
    talk = Talk()
    before = talk.next_prompt()
    ids = byte_ids(talk.tokenizer, said)
    _, answer = talk.answer(ids, replace(GREEDY, stop=("x",)), text="unanswered")
    assert answer.text == ""
    assert talk.next_prompt() == before


@pytest.mark.parametrize("name", ["v1", *WITH_MARKS])
def test_replacing_the_last_turn_is_as_if_it_had_not_been(name: str) -> None:
    talk, wanted = Talk(name), Talk(name)
    for either in (talk, wanted):
        either.answer(talk.ids("one"), text="first")
    talk.answer(talk.ids("two"), text="second")
    prompts = []
    for either, options in ((talk, {"replace_last": True}), (wanted, {})):
        either.runner.script = deque(talk.ids("three"))
        stream = either.chat.send("another", GREEDY, **options)
        prompts.append(stream._request.ids)
        list(stream)
        assert stream.is_kept
    assert prompts[0] == prompts[1]
    assert talk.next_prompt() == wanted.next_prompt()


def test_replacing_with_nothing_leaves_the_last_turn() -> None:
    talk = Talk(max_seq_len=60)
    talk.answer(talk.ids("two"), text="second")
    before = talk.next_prompt()
    with pytest.raises(ContextLengthError):
        talk.chat.send("word " * 100, GREEDY, replace_last=True)
    talk.runner.script = deque()
    stream = talk.chat.send("again", GREEDY, replace_last=True)
    stream.cancel()
    list(stream)
    assert not stream.is_kept
    assert talk.next_prompt() == before


def test_turns_to_drop_are_just_enough() -> None:
    talk = Talk(max_seq_len=200)
    for n in range(5):
        talk.answer(talk.ids("some answer"), text=f"a question {n}")
    conversation = talk.chat.conversation

    def length(n: int, text: str) -> int:
        rest = conversation.copy()
        rest.drop(n)
        return len(rest.encode(talk.tokenizer, [UserMessage(content=text)]))

    counts = set()
    for n_words in range(1, 220, 6):
        text = "word " * n_words
        n = talk.chat.turns_to_drop(text, 20)
        counts.add(n)
        if n is None:
            assert length(5, text) > 180
        else:
            assert length(n, text) <= 180
            assert n == 0 or length(n - 1, text) > 180
    assert {0, 1, 5, None} <= counts


def test_clear_forgets_the_history() -> None:
    talk = Talk(system="Be brief.")
    before = talk.next_prompt()
    talk.answer(talk.ids("Hello"))
    assert talk.next_prompt() != before
    talk.chat.clear()
    assert talk.next_prompt() == before


def test_message_that_does_not_fit_changes_nothing() -> None:
    talk = Talk(max_seq_len=60)
    talk.answer(talk.ids("Hello"))
    before = talk.next_prompt()
    with pytest.raises(ContextLengthError) as caught:
        talk.chat.send("word " * 100, GREEDY)
    assert caught.value.max_seq_len == 60
    assert talk.next_prompt() == before
    assert talk.answer(talk.ids("still here"))[1].text == "still here"


@pytest.mark.parametrize("system", [None, "Answer in rhyme."])
def test_system_prompt_and_tools_reach_the_model(system: str | None) -> None:
    talk = Talk(system=system, tools=[TOOL])
    prompt = talk.next_prompt()
    assert talk.tokenizer.raw.get_special_token("[AVAILABLE_TOOLS]") in prompt
    assert ("Answer in rhyme." in talk.tokenizer.raw.decode(prompt)) is (system is not None)


def tool_call(talk: Talk) -> list[int]:
    assert talk.tokenizer.tool_calls_id is not None
    return [talk.tokenizer.tool_calls_id, *talk.ids('[{"name": "f", "arguments": {"a": 1}}]')]


@pytest.mark.parametrize("name", ["v2", "v3", "v7", "small tekken"])
def test_tool_call_is_an_answer_of_its_own_kind(name: str) -> None:
    talk = Talk(name, tools=[TOOL])
    pieces, answer = talk.answer(tool_call(talk))
    assert answer.finish_reason == "tool_calls"
    assert [(c.name, c.arguments) for c in answer.tool_calls] == [("f", {"a": 1})]
    assert "".join(pieces) == answer.text
    assert answer.text.startswith("[TOOL_CALLS]")
    again = Talk(name, tools=[TOOL]).answer(tool_call(talk), replace(GREEDY, seed=answer.seed))[1]
    assert again.tool_calls == answer.tool_calls  # ids made here follow the seed
    talk.next_prompt()  # and the chat can go on


# Ids beyond the vocabulary, a control token and a word, as config.json may have them.
@pytest.mark.parametrize("end_id", [0, 4, 40_000])
def test_an_end_of_the_folders_own_ends_answers_and_calls(
    monkeypatch: pytest.MonkeyPatch, end_id: int
) -> None:
    monkeypatch.setattr(tokenizer("v3"), "end_ids", frozenset((2, end_id)))
    wanted, talk = (Talk("v3", extra_rows=10_000, tools=[TOOL]) for _ in range(2))
    for ids in (wanted.ids("Hello there"), tool_call(wanted)):
        by_template = wanted.answer([*ids, 2], replace(GREEDY, seed=7))[1]
        found = talk.answer([*ids, end_id], replace(GREEDY, seed=7))[1]
        assert found.token_ids == (*ids, end_id)
        assert found.text == by_template.text
        assert found.finish_reason == by_template.finish_reason
        assert found.tool_calls == by_template.tool_calls
        assert talk.next_prompt() == wanted.next_prompt()  # with the template's end


def test_tool_call_cut_short_is_no_call() -> None:
    talk = Talk(tools=[TOOL])
    _, answer = talk.answer(tool_call(talk), replace(GREEDY, max_tokens=4))
    assert (answer.finish_reason, answer.tool_calls) == ("length", ())


def test_tool_call_that_cannot_be_read_is_text() -> None:
    talk = Talk(tools=[TOOL])
    _, answer = talk.answer([*tool_call(talk), *talk.ids(' [{"name": and so on')])
    assert (answer.finish_reason, answer.tool_calls) == ("stop", ())
    assert answer.text.endswith("and so on")


def test_text_after_tool_calls_is_no_part_of_them() -> None:
    talk = Talk(tools=[TOOL])
    _, plain = talk.answer(tool_call(talk), replace(GREEDY, seed=1))
    talk = Talk(tools=[TOOL])
    _, answer = talk.answer([*tool_call(talk), *talk.ids(" and so on")], replace(GREEDY, seed=1))
    assert plain.tool_calls
    assert (answer.finish_reason, answer.tool_calls) == ("tool_calls", plain.tool_calls)
    talk.next_prompt()  # and the chat can go on


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_control_tokens_are_never_said(temperature: float) -> None:
    talk = Talk(extra_rows=20)
    banned = set(talk.tokenizer.banned_ids(talk.tokenizer.n_words + 20, tools=False))
    assert talk.tokenizer.tool_calls_id in banned
    params = SamplingParams(temperature=temperature, max_tokens=12, ignore_eos=True, seed=1)
    _, answer = talk.answer(sorted(banned)[::80] + sorted(banned)[-3:], params)
    assert len(answer.token_ids) == 12
    assert banned.isdisjoint(answer.token_ids)


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_seed_is_reported_and_grows_with_each_answer(seed: int) -> None:
    talk = Talk()
    seeds = [
        talk.answer(talk.ids("ok"), SamplingParams(temperature=0, seed=seed))[1].seed
        for _ in range(3)
    ]
    assert seeds == [(seed + n) % 2**63 for n in range(3)]


def test_seed_is_drawn_and_repeats_the_answer() -> None:
    hot = SamplingParams(temperature=1000, max_tokens=10)  # all tokens are about as likely
    first = Talk().answer([], hot)[1]
    other = Talk().answer([], hot)[1]
    assert first.seed != other.seed
    assert first.token_ids != other.token_ids
    again = Talk().answer([], replace(hot, seed=first.seed))[1]
    assert (again.token_ids, again.text) == (first.token_ids, first.text)


def test_logprobs_have_each_token_by_itself() -> None:
    talk = Talk()
    ids = talk.ids("Hello there")
    _, answer = talk.answer(ids, replace(GREEDY, logprobs=2))
    assert answer.logprobs is not None
    assert [entry.id for entry in answer.logprobs] == [*ids, talk.tokenizer.eos_id]
    assert [entry.text for entry in answer.logprobs] == [" Hello", " there", "</s>"]
    for entry in answer.logprobs:
        assert entry.top[0] == (entry.id, entry.text, entry.logprob)
        assert len(entry.top) == 2
        assert -1e-6 < entry.logprob <= 0  # 50 above all others


def test_logprobs_of_rows_beyond_the_tokenizer_have_no_text() -> None:
    talk = Talk(extra_rows=4)
    beyond = talk.tokenizer.n_words + 1
    _, answer = talk.answer([beyond], replace(GREEDY, logprobs=1, max_tokens=1))
    assert answer.logprobs is not None
    # the model finds it most likely and may not choose it
    assert [(i, text) for i, text, _ in answer.logprobs[0].top] == [(beyond, "")]
    assert answer.token_ids[0] != beyond


def test_logprobs_are_none_unless_asked_for() -> None:
    _, answer = Talk().answer(Talk().ids("Hello"))
    assert answer.logprobs is None
    assert answer.prompt_logprobs is None


def test_prompt_logprobs_are_one_for_each_token_after_the_first() -> None:
    talk = Talk(instruct=False)
    params = replace(GREEDY, prompt_logprobs=True)
    _, answer = talk.answer(talk.ids("x"), params, text="some longer prompt")
    assert answer.prompt_logprobs is not None
    assert len(answer.prompt_logprobs) == answer.usage.prompt_tokens - 1


@pytest.mark.parametrize("n_tokens", [1, 2, 5])
def test_timings_are_there_when_there_is_something_to_time(n_tokens: int) -> None:
    talk = Talk()
    _, answer = talk.answer(talk.ids("a b c d e f"), replace(GREEDY, max_tokens=n_tokens))
    assert answer.first_token_s is not None
    assert answer.first_token_s > 0
    if n_tokens == 1:
        assert answer.decode_tokens_per_s is None
    else:
        assert answer.decode_tokens_per_s is not None
        assert answer.decode_tokens_per_s > 0


@pytest.mark.parametrize("name", ["v1", "v3", "small tekken"])
def test_completion_goes_on_after_the_prompt(name: str) -> None:
    talk = Talk(name, instruct=False)
    ids = talk.tokenizer.encode("The capital of France is Paris.")
    n_prompt = len(talk.tokenizer.encode("The capital of France is"))
    stream = talk.stream(ids[n_prompt:], text="The capital of France is")
    pieces = [e.text for e in stream if isinstance(e, Delta)]
    assert stream._request.ids == ids[:n_prompt]
    assert "".join(pieces) == " Paris."  # its space belongs to it


def test_completions_keep_no_history() -> None:
    talk = Talk(instruct=False, system="Be brief.")
    before = talk.next_prompt()
    talk.answer(talk.ids("something"), text="a prompt")
    assert talk.next_prompt() == before == talk.tokenizer.encode("next")


def test_completion_without_max_tokens_ends_at_256() -> None:
    talk = Talk(instruct=False)
    params = replace(GREEDY, ignore_eos=True)
    assert len(talk.answer([], params)[1].token_ids) == 256
    talk = Talk(instruct=True, max_seq_len=400)
    _, answer = talk.answer([], params)
    assert answer.usage.prompt_tokens + len(answer.token_ids) == 400  # a chat goes on until full


def test_completions_of_one_seed_are_the_same() -> None:
    talk = Talk(instruct=False)
    params = SamplingParams(temperature=1000, max_tokens=5, seed=3)
    first, second = (talk.answer([], params)[1] for _ in range(2))
    assert first.token_ids == second.token_ids
    assert first.seed == second.seed == 3


def test_message_that_the_template_refuses_is_named() -> None:
    tool = Tool(function=Function(name="no spaces please", parameters={"type": "object"}))
    with pytest.raises(PromptError, match="no spaces please"):
        Talk(tools=[tool]).chat.send("Hi")
