"""Turn the engine's tokens into text as it arrives, and into an answer that says how it ended.

Also finds stop texts and the place where tool calls begin. Knows nothing of conversations.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mistral_chat.chat.tokenizer import TOOL_CALLS, Tokenizer
from mistral_chat.chat.tools import ToolCall, parse_tool_calls
from mistral_chat.engine.engine import Engine, Prefill, Request, Token

__all__ = [
    "Answer",
    "AnswerBuilder",
    "AnswerStream",
    "Delta",
    "StopTexts",
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
        text: the answer; tool calls in raw form, with their control token.
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
    """Turn the events of one request into text and, at the end, an answer.

    Args:
        tokenizer: of the model.
        request: the request; cancelled here when a stop text is found.
        seed: the seed in the request's params.
        continues: whether the text continues the prompt (plain completion).
    """

    def __init__(
        self, tokenizer: Tokenizer, request: Request, seed: int, *, continues: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._request = request
        self._seed = seed
        self._detokenizer = tokenizer.detokenizer(continues=continues)
        self._stops = StopTexts(request.params.stop)
        self._text: list[str] = []
        self._n_decoded = 0  # characters, shown or held back
        self.call_at: int | None = None
        self._tokens: list[Token] = []
        self._prefill: Prefill | None = None
        self._stopped_by_text = False
        self._started = time.monotonic()
        self._first = self._last = 0.0

    def add(self, event: Prefill | Token) -> str:
        """Take an event; return the text to show now, which may be empty."""
        if isinstance(event, Prefill):
            self._prefill = event
            return ""
        self._last = time.monotonic()
        if not self._tokens:
            self._first = self._last
        self._tokens.append(event)
        text = "" if event.finish_reason == "stop" else self._detokenizer.add(event.id)
        if event.id == self._tokenizer.tool_calls_id and self.call_at is None:
            # This token may first complete a pending character, so its own text comes last.
            self.call_at = self._n_decoded + len(text) - len(TOOL_CALLS)
        self._n_decoded += len(text)
        shown, self._stopped_by_text = self._stops.add(text)
        if self._stopped_by_text:
            self._request.cancelled = True
        elif event.finish_reason:
            shown += self._flush()
        self._text.append(shown)
        return shown

    def _flush(self) -> str:
        shown, self._stopped_by_text = self._stops.add(self._detokenizer.flush())
        return shown if self._stopped_by_text else shown + self._stops.flush()

    def finish(self) -> tuple[str, Answer]:
        """Return the rest of the text, which only a cancelled answer still has, and the answer."""
        rest = ""
        reason: FinishReason = "cancelled"
        last = self._tokens[-1].finish_reason if self._tokens else None
        if self._stopped_by_text:
            reason = "stop"
        elif last is not None:
            reason = last
        else:
            rest = self._flush()
            self._text.append(rest)
        params = self._request.params
        ids = tuple(token.id for token in self._tokens)
        written = ids[:-1] if last == "stop" else ids
        calls = parse_tool_calls(self._tokenizer, written, self._seed) if reason == "stop" else None
        n_decoded, decode_s = len(ids) - 1, self._last - self._first
        prefill = self._prefill or Prefill(0, len(self._request.ids), 0)
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
            call_at=self.call_at,
        )
        return rest, answer

    def _logprob(self, token: Token) -> TokenLogprob:
        assert token.logprob is not None
        piece = self._tokenizer.piece
        top = tuple((id_, piece(id_), logprob) for id_, logprob in token.top)
        return TokenLogprob(token.id, piece(token.id), token.logprob, top)


class AnswerStream:
    """A running answer. Iterate it once: prompt progress, then text, then the answer.

    Args:
        engine: the engine that runs the request.
        request: the request to run.
        builder: the builder of the same request.
    """

    def __init__(self, engine: Engine, request: Request, builder: AnswerBuilder) -> None:
        self._engine = engine
        self._request = request
        self._builder = builder
        self._n_shown = 0
        self.answer: Answer | None = None

    def cancel(self) -> None:
        """End the answer before its next step and keep the text so far."""
        self._request.cancelled = True

    def __iter__(self) -> Iterator[Prefill | Delta | Answer]:
        for event in self._engine.generate(self._request):
            text = self._builder.add(event)
            if isinstance(event, Prefill):
                yield event
            yield from self._deltas(text)
        rest, self.answer = self._builder.finish()
        yield from self._deltas(rest)
        yield self.answer

    def _deltas(self, text: str) -> Iterator[Delta]:
        """Split a piece of text where a call begins in it."""
        at = self._builder.call_at
        n_said = len(text) if at is None else min(len(text), max(0, at - self._n_shown))
        self._n_shown += len(text)
        if n_said:
            yield Delta(text[:n_said])
        if n_said < len(text):
            yield Delta(text[n_said:], is_call=True)
