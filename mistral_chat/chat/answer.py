"""What comes of a prompt: text as it arrives, and an answer that says how it ended.

Turns the engine's tokens into text, finds stop texts and where calls begin. Knows nothing of
conversations.
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
    """A chosen token and what else was likely.

    Args:
        id: token id.
        text: the token by itself.
        logprob: natural log of the model's own probability.
        top: (id, text, logprob) of the most likely tokens.
    """

    id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request.

    Args:
        prompt_tokens: all of the prompt.
        cached_tokens: of those, the ones that were not computed again.
        completion_tokens: chosen, the end token included.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a prompt.

    Args:
        text: the answer; a tool call in raw form, with its control token.
        finish_reason: `stop` at the end token or a stop text, `length` at max_tokens or a full
            context, `tool_calls`, `cancelled`.
        token_ids: chosen ids, the end token included.
        tool_calls: calls that could be read.
        seed: repeats the answer.
        usage: tokens.
        first_token_s: seconds from the request to the first token; None when there was none.
        decode_tokens_per_s: of the tokens after the first; None for fewer than two.
        logprobs: of the chosen tokens, when asked for.
        prompt_logprobs: of the prompt's tokens after the first, when asked for.
        stopped_by_text: a stop text ended it.
        call_at: where in the text the first call begins, readable or not; None without one.
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
        """The text before any call."""
        return self.text[: self.call_at]


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer's text, never empty.

    Args:
        text: the piece.
        is_call: it belongs to calls in raw form, which no person needs to see.
    """

    text: str
    is_call: bool = False


class StopTexts:
    """Finds stop texts in a stream and holds back what may become one.

    Args:
        texts: none of them empty.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """The text that is safe to show, and whether a stop text was reached after it."""
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
        """What was held back and became no stop text."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, text: str) -> int:
        """Length of the longest end of what is held that begins `text`."""
        longest = min(len(text) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(text[:n])), 0)


class AnswerBuilder:
    """Turns one request's events into text and, at the end, an answer.

    Args:
        tokenizer: of the model.
        request: set cancelled here when a stop text is reached.
        seed: that the request's params carry.
        continues: the text goes on after the prompt (plain completion).
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
        """Take an event; give the text to show now, which may be empty."""
        if isinstance(event, Prefill):
            self._prefill = event
            return ""
        self._last = time.monotonic()
        if not self._tokens:
            self._first = self._last
        self._tokens.append(event)
        text = "" if event.finish_reason == "stop" else self._detokenizer.add(event.id)
        if event.id == self._tokenizer.tool_calls_id and self.call_at is None:
            # The token's text may come behind the end of an unfinished character.
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
        """The text still held back by a cancelled answer, and the answer."""
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
    """An answer on its way. Iterate it once: progress of the prompt, text, then the answer.

    Args:
        engine: runs the request.
        request: what to run.
        builder: of the same request.
    """

    def __init__(self, engine: Engine, request: Request, builder: AnswerBuilder) -> None:
        self._engine = engine
        self._request = request
        self._builder = builder
        self._n_shown = 0
        self.answer: Answer | None = None

    def cancel(self) -> None:
        """End the answer before its next step; what was said so far is kept."""
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
        """A piece of text, in two where a call begins inside it."""
        at = self._builder.call_at
        n_said = len(text) if at is None else min(len(text), max(0, at - self._n_shown))
        self._n_shown += len(text)
        if n_said:
            yield Delta(text[:n_said])
        if n_said < len(text):
            yield Delta(text[n_said:], is_call=True)
