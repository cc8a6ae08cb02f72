"""One prompt or a chat: text in, a stream of text out, and an answer that says how it ended.

The middle of the three generators: over `Engine.generate`'s ids, under the terminal's printing.
"""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.tool_calls import Tool

from mistral_chat.chat.conversation import NOT_RUN, Conversation
from mistral_chat.chat.grammar import Grammar, choose_grammar
from mistral_chat.chat.tokenizer import TOOL_CALLS, Tokenizer
from mistral_chat.chat.tools import UNREADABLE, ToolCall, make_id, parse_tool_calls
from mistral_chat.config import COMPLETION_MAX_TOKENS, SamplingParams
from mistral_chat.engine.engine import Engine, Prefill, Request, Token
from mistral_chat.errors import UsageError

__all__ = ["Answer", "AnswerBuilder", "AnswerStream", "Chat", "Delta", "TokenLogprob", "Usage"]

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
        calls = parse_tool_calls(self._tokenizer, ids, self._seed) if reason == "stop" else None
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


class Chat:
    """A conversation, or with `instruct=False` one plain completion after another.

    Args:
        engine: of the loaded model.
        tokenizer: of the same model.
        instruct: use the tokenizer's chat template and keep a history.
        system: system prompt.
        tools: offered functions.
        grammar: what every answer must be, unless `send` says otherwise; None is free text.

    Raises:
        UsageError: tools and a grammar.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        instruct: bool = True,
        system: str | None = None,
        tools: Sequence[Tool] = (),
        grammar: Grammar | None = None,
    ) -> None:
        check_no_tools(tools, grammar)
        self.engine = engine
        self.tokenizer = tokenizer
        self.instruct = instruct
        self.grammar = grammar
        self.conversation = Conversation(system, tools)
        self._n_answers = 0

    def clear(self) -> None:
        """Forget the conversation but its system prompt."""
        self.conversation.clear()

    def send(
        self,
        text: str,
        params: SamplingParams | None = None,
        *,
        json_schema: Mapping[str, Any] | None = None,
        json_object: bool = False,
    ) -> "ChatStream":
        """Say something and stream the answer, which joins the history when its stream ends.

        Calls of the last answer that got no result (`send_results`) get one that says so.

        Args:
            text: the next message, or a plain prompt.
            params: how to sample; a seed of its own is drawn where it has none. Later answers of
                a chat use the seed plus their number, so that a seed repeats a whole chat.
            json_schema: an answer that ends by itself is JSON, valid against this schema.
            json_object: the same for any JSON object.

        Returns:
            a stream to iterate once; nothing runs before.

        Raises:
            ContextLengthError: history and message leave no room for an answer.
            PromptError: the template refuses the message, or answers cannot be kept to the schema.
            UsageError: a schema with tools, stop texts or ignore_eos.
        """
        grammar = choose_grammar(json_schema, json_object) or self.grammar
        check_no_tools(self.conversation.tools, grammar)
        if self.instruct:
            self.conversation.close_calls(NOT_RUN)
            ids = self.conversation.encode(self.tokenizer, [UserMessage(content=text)])
        else:
            ids = self.tokenizer.encode(text)
        return self._stream(text, ids, params, grammar)

    def send_results(
        self, results: Mapping[str, str], params: SamplingParams | None = None
    ) -> "ChatStream":
        """Say what came of the last answer's calls, and stream what the model makes of it.

        Args:
            results: text by the call's id. What has got its result before stays as it is.
            params: how to sample.

        Raises:
            ContextLengthError: the results leave no room for an answer.
            PromptError: the template refuses them.
            UsageError: not the ids of the calls that wait for a result.
        """
        calls = self.conversation.open_calls
        if {call.id for call in calls} != set(results):
            waiting = ", ".join(call.id for call in calls) or "none"
            raise UsageError(f"results of {', '.join(results) or 'no call'}: waiting are {waiting}")
        for call in calls:
            self.conversation.add_result(call, results[call.id])
        ids = self.conversation.encode(self.tokenizer)
        return self._stream(None, ids, params, None)

    def _stream(
        self,
        text: str | None,
        ids: list[int],
        params: SamplingParams | None,
        grammar: Grammar | None,
    ) -> "ChatStream":
        request, seed = make_request(
            self.engine,
            self.tokenizer,
            ids,
            params or SamplingParams(),
            seed_offset=self._n_answers if self.instruct else 0,
            instruct=self.instruct,
            tools=bool(self.conversation.tools),
            grammar=grammar,
        )
        self.engine.check(request)
        builder = AnswerBuilder(self.tokenizer, request, seed, continues=not self.instruct)
        return ChatStream(self, text, request, builder)

    def keep(self, text: str | None, answer: Answer) -> None:
        """Add a finished answer to the history; one that is empty is not kept.

        Args:
            text: what it answers; None are results of calls, which are there already.
            answer: with its calls; calls that cannot be read are kept as one, by the name
                `UNREADABLE`, so that the model can be told.
        """
        self._n_answers += 1
        if not self.instruct:
            return
        own: tuple[int, ...] | None = answer.token_ids
        if own and own[-1] == self.tokenizer.eos_id:
            own = own[:-1]
        calls = self._calls_to_keep(answer)
        if not calls and not answer.said:
            return
        if text is not None:
            self.conversation.add_user(text)
        if calls:
            # The template of some versions writes ids, which results refer to. Where the model
            # left them out the call is written as the template has it.
            has_ids = calls[0].name == UNREADABLE or all(call.id in answer.text for call in calls)
            is_whole = has_ids or not self.tokenizer.calls_have_ids
            is_whole = is_whole and not answer.stopped_by_text
            self.conversation.add_calls(answer.said, calls, own if is_whole else None)
        else:
            if answer.stopped_by_text or any(map(self.tokenizer.is_special, own or ())):
                own = None
            self.conversation.add_answer(answer.said, own)

    def _calls_to_keep(self, answer: Answer) -> tuple[ToolCall, ...]:
        if answer.call_at is None or answer.finish_reason not in ("stop", "tool_calls"):
            return ()  # none, or cut short
        if answer.tool_calls or answer.stopped_by_text:
            return answer.tool_calls
        id_ = make_id(answer.seed, 0)
        return (ToolCall(id_, UNREADABLE, {"text": answer.text[answer.call_at :]}),)


class ChatStream(AnswerStream):
    """An answer of a chat on its way; at its end the exchange joins the history."""

    def __init__(
        self, chat: Chat, text: str | None, request: Request, builder: AnswerBuilder
    ) -> None:
        super().__init__(chat.engine, request, builder)
        self._chat = chat
        self._text = text

    def __iter__(self) -> Iterator[Prefill | Delta | Answer]:
        for event in super().__iter__():
            if isinstance(event, Answer):
                self._chat.keep(self._text, event)
            yield event


def check_no_tools(tools: Sequence[Tool], grammar: Grammar | None) -> None:
    """Refuse tools beside a grammar: a tool call is no answer of a schema.

    Raises:
        UsageError: both are there.
    """
    if tools and grammar is not None:
        raise UsageError("tools and a JSON schema: expected one of them")


def make_request(
    engine: Engine,
    tokenizer: Tokenizer,
    ids: list[int],
    params: SamplingParams,
    *,
    instruct: bool,
    tools: bool,
    seed_offset: int = 0,
    grammar: Grammar | None = None,
) -> tuple[Request, int]:
    """A request with its seed drawn, its end tokens and its banned ids; and the seed.

    Args:
        engine: whose model's vocabulary is banned beyond the tokenizer's.
        tokenizer: of the model.
        ids: the prompt.
        params: how to sample; without max_tokens a plain completion stops at 256.
        instruct: whether this is an answer rather than a completion.
        tools: whether tools are offered.
        seed_offset: added to the seed that the person gave.
        grammar: what the answer must be; None is free text.

    Raises:
        UsageError: a grammar, and params that would end an answer early or not at all.
    """
    if grammar is not None and (params.stop or params.ignore_eos):
        name = "stop" if params.stop else "ignore_eos"
        raise UsageError(f"{name} and a JSON schema: expected one of them")
    vocab_size = engine.runner.model.args.vocab_size
    seed = secrets.randbits(32) if params.seed is None else params.seed
    max_tokens = params.max_tokens
    if max_tokens is None and not instruct:
        max_tokens = COMPLETION_MAX_TOKENS
    used = (seed + seed_offset) % 2**63
    request = Request(
        ids=ids,
        params=replace(params, seed=used, max_tokens=max_tokens),
        stop_ids=frozenset((tokenizer.eos_id,)),
        banned_ids=tokenizer.banned_ids(vocab_size, tools=tools),
        mask=None if grammar is None else grammar.mask(tokenizer, vocab_size),
    )
    return request, used
