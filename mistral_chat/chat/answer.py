"""Turn the engine's tokens into text as it arrives, and into an answer that says how it ended.

Keeps thinking apart from the answer, finds stop texts in it and the place where calls begin. Knows
nothing of conversations.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mistral_chat.chat.template import BEGIN_THINK, END_THINK, TOOL_CALLS
from mistral_chat.chat.thinking import Thinking, Thought
from mistral_chat.chat.tokenizer import Tokenizer
from mistral_chat.chat.tools import ToolCall, parse_tool_calls
from mistral_chat.engine.engine import Engine, Prefill, Request, Token

__all__ = [
    "Answer",
    "AnswerBuilder",
    "AnswerStream",
    "Delta",
    "StopTexts",
    "Thinking",
    "Thought",
    "TokenLogprob",
    "Usage",
]

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A chosen token and the most likely alternatives.

    Args:
        id: token id.
        text: the text of this token alone.
        logprob: natural log of the model's own probability.
        top: (id, text, logprob) of the most likely tokens.
    """

    id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request.

    Args:
        prompt_tokens: tokens of the prompt.
        cached_tokens: prompt tokens that came from the cache.
        completion_tokens: tokens of the answer, including the end token.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The complete answer to a prompt.

    Args:
        text: the answer without its thinking; tool calls in raw form, with their control token.
        finish_reason: `stop` at the end token or a stop text, `length` at max_tokens or a full
            context, `tool_calls`, `cancelled`.
        token_ids: chosen ids, including the end token.
        tool_calls: the calls, if all of them could be parsed.
        seed: the same seed gives the same answer.
        usage: token counts.
        first_token_s: seconds from the request to the first token; None if there was none.
        decode_tokens_per_s: speed after the first token; None for fewer than two tokens.
        logprobs: one entry per chosen token, if requested.
        prompt_logprobs: of the prompt's tokens after the first, if requested.
        stopped_by_text: whether a stop text ended the answer.
        call_at: index in the text where the first call begins, valid or not; None without one.
        thought: what the model thought before; None if nothing.
    """

    text: str
    finish_reason: FinishReason
    token_ids: tuple[int, ...]
    tool_calls: tuple[ToolCall, ...]
    seed: int
    usage: Usage
    first_token_s: float | None
    decode_tokens_per_s: float | None
    logprobs: tuple[TokenLogprob, ...] | None
    prompt_logprobs: tuple[float, ...] | None
    stopped_by_text: bool
    call_at: int | None = None
    thought: Thought | None = None

    @property
    def thinking(self) -> str:
        """What the model thought before it answered; empty if nothing."""
        return "" if self.thought is None else self.thought.text

    @property
    def said(self) -> str:
        """The text before the first call."""
        return self.text[: self.call_at]


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer's text, never empty.

    Args:
        text: the piece.
        is_call: whether it is part of a call in raw form, which is not meant for people.
    """

    text: str
    is_call: bool = False


class StopTexts:
    """Find stop texts in a stream; hold back text that may become one.

    Args:
        texts: the stop texts, none of them empty.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Return the text that can be shown now, and whether a stop text followed it."""
        self._held += text
        found = [at for at in (self._held.find(t) for t in self._texts) if at >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        n_kept = max((self._overlap(t) for t in self._texts), default=0)
        cut = len(self._held) - n_kept
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """Return the text that was held back and did not become a stop text."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, text: str) -> int:
        """Return the length of the longest suffix of the held text that is a prefix of `text`."""
        longest = min(len(text) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(text[:n])), 0)


class AnswerBuilder:
    """Turn the events of one request into pieces of text and, at the end, an answer.

    Args:
        tokenizer: of the model.
        request: the request; cancelled here when a stop text is found.
        seed: the seed in the request's params.
        instruct: whether the chat template is used; a plain completion shows marks of thinking.
        continues: whether the text continues the prompt's last text.
    """

    def __init__(
        self, tokenizer: Tokenizer, request: Request, seed: int, *, instruct: bool, continues: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._request = request
        self._seed = seed
        self._detokenizer = tokenizer.detokenizer(continues=continues)
        self._stops = StopTexts(request.params.stop)
        self._text: list[str] = []
        self._n_decoded = 0  # characters of the answer, shown or held back
        self._n_shown = 0
        self._call_at: int | None = None
        self._tokens: list[Token] = []
        self._prefill: Prefill | None = None
        self._stopped_by_text = False
        self._parts_thinking = instruct and tokenizer.has_think_marks
        self._is_thinking = self._parts_thinking and tokenizer.ends_within_thinking(request.ids)
        self._thoughts: list[str] = []
        self._n_thought = 0  # tokens
        self._thought_s = 0.0
        self._started = self._last = time.monotonic()
        self._first = 0.0

    def add(self, event: Prefill | Token) -> list[Delta | Thinking]:
        """Take an event; return what can be shown now."""
        if isinstance(event, Prefill):
            self._prefill = event
            return []
        before, self._last = self._last, time.monotonic()
        if not self._tokens:
            self._first = before = self._last
        self._tokens.append(event)
        if self._is_thinking:
            self._thought_s += self._last - before
            self._n_thought += event.finish_reason != "stop"
        text = "" if event.finish_reason == "stop" else self._detokenizer.add(event.id)
        pieces = self._part(event.id, text)
        if self._stopped_by_text:
            self._request.cancelled = True
        elif event.finish_reason:
            pieces += self._flush()
        return pieces

    def _part(self, token: int, text: str) -> list[Delta | Thinking]:
        """Divide a token's text between thinking and answer; marks of thinking are in neither."""
        made = self._tokenizer
        if self._is_thinking and token == made.tool_calls_id:  # some models call without [/THINK]
            pieces = self._show(text.removesuffix(TOOL_CALLS))
            self._n_thought -= 1
            self._is_thinking = False
            return pieces + self._part(token, TOOL_CALLS)
        if self._parts_thinking and token in (made.begin_think_id, made.end_think_id):
            begins = token == made.begin_think_id
            # The mark may first complete a character, which belongs to what was before it.
            pieces = self._show(text.removesuffix(BEGIN_THINK if begins else END_THINK))
            if begins and not self._is_thinking and not self._stopped_by_text:
                pieces += self._answered(self._stops.flush())  # stop texts are in one piece
                if self._thoughts:
                    pieces += self._thought("\n\n")
            self._n_thought -= self._is_thinking  # a mark is no thinking
            self._is_thinking = begins
            return pieces
        if token == made.tool_calls_id and self._call_at is None:
            # This token may first complete a pending character, so its own text comes last.
            self._call_at = self._n_decoded + len(text) - len(TOOL_CALLS)
        return self._show(text)

    def _show(self, text: str) -> list[Delta | Thinking]:
        """Take text of what is going on, thinking or answer; return what can be shown of it."""
        if self._is_thinking:
            return self._thought(text)
        self._n_decoded += len(text)
        shown, self._stopped_by_text = self._stops.add(text)
        return self._answered(shown)

    def _thought(self, text: str) -> list[Delta | Thinking]:
        if not text:
            return []
        self._thoughts.append(text)
        return [Thinking(text, self._n_thought, self._thought_s)]

    def _answered(self, text: str) -> list[Delta | Thinking]:
        """Return shown text of the answer, divided where a call begins in it."""
        self._text.append(text)
        at = self._call_at
        n_said = len(text) if at is None else min(len(text), max(0, at - self._n_shown))
        self._n_shown += len(text)
        pieces: list[Delta | Thinking] = [Delta(text[:n_said])] if n_said else []
        return [*pieces, Delta(text[n_said:], is_call=True)] if n_said < len(text) else pieces

    def _flush(self) -> list[Delta | Thinking]:
        pieces = self._show(self._detokenizer.flush())
        return pieces if self._stopped_by_text else pieces + self._answered(self._stops.flush())

    def finish(self) -> tuple[list[Delta | Thinking], Answer]:
        """Return the rest of the text, which only a cancelled answer still has, and the answer."""
        rest: list[Delta | Thinking] = []
        reason: FinishReason = "cancelled"
        last = self._tokens[-1].finish_reason if self._tokens else None
        if self._stopped_by_text:
            reason = "stop"
        elif last is not None:
            reason = last
        else:
            rest = self._flush()
        params = self._request.params
        ids = tuple(token.id for token in self._tokens)
        written = ids[:-1] if last == "stop" else ids
        calls = parse_tool_calls(self._tokenizer, written, self._seed) if reason == "stop" else None
        n_decoded, decode_s = len(ids) - 1, self._last - self._first
        prefill = self._prefill or Prefill(0, len(self._request.ids), 0)
        thought = None
        if self._thoughts:
            text, is_closed = "".join(self._thoughts), not self._is_thinking
            thought = Thought(text, self._n_thought, self._thought_s, is_closed)
        answer = Answer(
            text="".join(self._text),
            finish_reason="tool_calls" if calls else reason,
            token_ids=ids,
            tool_calls=calls or (),
            seed=self._seed,
            usage=Usage(len(self._request.ids), prefill.cached, len(ids)),
            first_token_s=self._first - self._started if ids else None,
            decode_tokens_per_s=n_decoded / decode_s if n_decoded > 0 and decode_s > 0 else None,
            logprobs=None if params.logprobs is None else tuple(map(self._logprob, self._tokens)),
            prompt_logprobs=prefill.logprobs if params.prompt_logprobs else None,
            stopped_by_text=self._stopped_by_text,
            call_at=self._call_at,
            thought=thought,
        )
        return rest, answer

    def _logprob(self, token: Token) -> TokenLogprob:
        assert token.logprob is not None
        piece = self._tokenizer.piece
        top = tuple((id_, piece(id_), logprob) for id_, logprob in token.top)
        return TokenLogprob(token.id, piece(token.id), token.logprob, top)


class AnswerStream:
    """A running answer. Iterate it once: prompt progress, then thinking, text, and the answer.

    Args:
        engine: the engine that runs the request.
        request: the request to run.
        builder: the builder of the same request.
    """

    def __init__(self, engine: Engine, request: Request, builder: AnswerBuilder) -> None:
        self._engine = engine
        self._request = request
        self._builder = builder
        self.answer: Answer | None = None

    def cancel(self) -> None:
        """End the answer before its next step and keep the text so far."""
        self._request.cancelled = True

    def __iter__(self) -> Iterator[Prefill | Thinking | Delta | Answer]:
        for event in self._engine.generate(self._request):
            pieces = self._builder.add(event)
            if isinstance(event, Prefill):
                yield event
            yield from pieces
        rest, self.answer = self._builder.finish()
        yield from rest
        yield self.answer
