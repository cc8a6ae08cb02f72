"""A chat or single prompts: text in, a stream of text out, and a history of what was said.

The middle of three generators: above `Engine.generate`, which yields ids, and below the terminal.
"""

import secrets
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.tool_calls import Tool

from mistral_chat.chat.answer import Answer, AnswerBuilder, AnswerStream, Delta
from mistral_chat.chat.conversation import NOT_RUN, Conversation
from mistral_chat.chat.schema.grammar import Grammar, choose_grammar
from mistral_chat.chat.thinking import Thinking
from mistral_chat.chat.thinking_mask import ThinkingMask
from mistral_chat.chat.tokenizer import Tokenizer
from mistral_chat.chat.tools import UNREADABLE, ToolCall, make_id
from mistral_chat.config import COMPLETION_MAX_TOKENS, SamplingParams
from mistral_chat.engine.engine import Engine, Prefill, Request, TokenMask
from mistral_chat.errors import UsageError

__all__ = ["Answer", "Chat", "ChatStream", "Delta", "Thinking", "check_no_tools", "make_request"]


class Chat:
    """A conversation or, with `instruct=False`, independent plain completions.

    Args:
        engine: the engine of the loaded model.
        tokenizer: the tokenizer of the same model.
        instruct: whether to use the chat template and keep a history.
        system: system prompt.
        tools: functions offered to the model.
        grammar: what every answer must be, unless `send` says otherwise; None is free text.
            Thinking before the answer is always free.
        reasoning: effort, none or high; None leaves it to the model.

    Raises:
        PromptError: the template does not know the reasoning effort.
        UsageError: both tools and a grammar.
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
        reasoning: str | None = None,
    ) -> None:
        check_no_tools(tools, grammar)
        if reasoning is not None:
            tokenizer.check_effort(reasoning)
        self.engine = engine
        self.tokenizer = tokenizer
        self.instruct = instruct
        self.grammar = grammar
        self.conversation = Conversation(system, tools, reasoning)
        self._n_answers = 0

    def clear(self) -> None:
        """Forget the conversation except its system prompt."""
        self.conversation.clear()

    def send(
        self,
        text: str,
        params: SamplingParams | None = None,
        *,
        json_schema: Mapping[str, Any] | None = None,
        json_object: bool = False,
        replace_last: bool = False,
    ) -> "ChatStream":
        """Send a message and stream the answer, which joins the history when the stream ends.

        The stream yields what the model thinks as `Thinking` and its answer as `Delta`. Calls of
        the last answer that still lack a result (`send_results`) get one that says so.

        Args:
            text: the next message, or a plain prompt.
            params: sampling settings; without a seed a random one is used. Later answers of a chat
                add their number to the seed, so one seed repeats the whole chat.
            json_schema: an answer that is not cut short is JSON, valid against this schema;
                thinking before it is free.
            json_object: the same for any JSON object.
            replace_last: replace the last turn, which is kept if this one gets no answer.

        Returns:
            a stream to iterate once; nothing runs until then.

        Raises:
            ContextLengthError: history and message leave no room for an answer.
            PromptError: the template refuses the message, or the schema is not supported.
            UsageError: a schema together with tools, stop texts or ignore_eos.
        """
        grammar = choose_grammar(json_schema, json_object) or self.grammar
        check_no_tools(self.conversation.tools, grammar)
        if self.instruct:
            self.conversation.close_calls(NOT_RUN)
            before = self.conversation.copy()
            if replace_last:
                before.undo()
            ids = before.encode(self.tokenizer, [UserMessage(content=text)])
        else:
            ids = self.tokenizer.encode(text)
        return self._stream(text, ids, params, grammar, replace_last=replace_last)

    def turns_to_drop(self, text: str, n_answer: int) -> int | None:
        """Return how many of the oldest turns must go so that a message fits the context.

        Args:
            text: the message.
            n_answer: tokens to reserve for its answer.

        Returns:
            0 if it fits already; None if it does not fit even alone.
        """
        room = self.engine.max_seq_len - n_answer

        def fits(n: int) -> bool:
            rest = self.conversation.copy()
            rest.drop(n)
            return len(rest.encode(self.tokenizer, [UserMessage(content=text)])) <= room

        counts = range(self.conversation.n_turns + 1)
        n = bisect_left(counts, True, key=fits)
        return n if n < len(counts) else None

    def send_results(
        self, results: Mapping[str, str], params: SamplingParams | None = None
    ) -> "ChatStream":
        """Send the results of the last answer's calls and stream the model's answer to them.

        Args:
            results: text by call id, for exactly the calls that have no result yet.
            params: sampling settings.

        Raises:
            ContextLengthError: the results leave no room for an answer.
            PromptError: the template refuses them.
            UsageError: the ids are not those of the calls that wait for a result.
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
        *,
        replace_last: bool = False,
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
        builder = AnswerBuilder(
            self.tokenizer, request, seed, instruct=self.instruct, continues=not self.instruct
        )
        return ChatStream(self, text, request, builder, replace_last=replace_last)

    def keep(self, text: str | None, answer: Answer, *, replace_last: bool = False) -> bool:
        """Add a finished answer to the history, unless it is empty.

        Args:
            text: the message it answers; None for results of calls, which the history already has.
            replace_last: take back the last turn first.
            answer: the answer; calls that cannot be parsed become one call named `UNREADABLE`, so
                that the model can be told.

        Returns:
            whether it was added.
        """
        self._n_answers += 1
        if not self.instruct:
            return False
        own: tuple[int, ...] | None = answer.token_ids
        if own and own[-1] in self.tokenizer.end_ids:
            own = own[:-1]
        calls = self._calls_to_keep(answer)
        thought = answer.thought if self.tokenizer.takes_thinking else None
        if not calls and not answer.said and thought is None:
            return False
        if replace_last:
            self.conversation.undo()
        if text is not None:
            self.conversation.add_user(text)
        if calls:
            # Some template versions write ids, which results refer to. If the model omitted them,
            # let the template write the calls instead of using the model's own tokens.
            has_ids = calls[0].name == UNREADABLE or all(call.id in answer.text for call in calls)
            is_whole = has_ids or not self.tokenizer.template.calls_have_ids
            is_whole = is_whole and not answer.stopped_by_text
            self.conversation.add_calls(answer.said, calls, own if is_whole else None, thought)
        else:
            is_whole = not answer.stopped_by_text and answer.call_at is None
            self.conversation.add_answer(answer.said, own if is_whole else None, thought)
        return True

    def _calls_to_keep(self, answer: Answer) -> tuple[ToolCall, ...]:
        if answer.call_at is None or answer.finish_reason not in ("stop", "tool_calls"):
            return ()  # no calls, or cut short
        if answer.tool_calls or answer.stopped_by_text:
            return answer.tool_calls
        id_ = make_id(answer.seed, 0)
        return (ToolCall(id_, UNREADABLE, {"text": answer.text[answer.call_at :]}),)


class ChatStream(AnswerStream):
    """A running answer in a chat; when it ends, the turn joins the history.

    `is_kept` says whether the turn was added.
    """

    def __init__(
        self,
        chat: Chat,
        text: str | None,
        request: Request,
        builder: AnswerBuilder,
        *,
        replace_last: bool,
    ) -> None:
        super().__init__(chat.engine, request, builder)
        self._chat = chat
        self._text = text
        self._replace_last = replace_last
        self.is_kept = False

    def __iter__(self) -> Iterator[Prefill | Thinking | Delta | Answer]:
        for event in super().__iter__():
            if isinstance(event, Answer):
                self.is_kept = self._chat.keep(self._text, event, replace_last=self._replace_last)
            yield event


def check_no_tools(tools: Sequence[Tool], grammar: Grammar | None) -> None:
    """Refuse tools together with a grammar: a tool call cannot follow a schema.

    Raises:
        UsageError: both are given.
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
    """Build a checked request with its seed, end tokens and banned ids; return it and the seed.

    Args:
        engine: its model may have ids that the tokenizer lacks; these are banned.
        tokenizer: the model's tokenizer.
        ids: tokens of the prompt.
        params: sampling settings; without max_tokens a plain completion stops at 256.
        instruct: whether this is an answer rather than a completion.
        tools: whether tools are offered.
        seed_offset: added to the seed.
        grammar: what the answer must be; None is free text.

    Raises:
        ContextLengthError: the prompt leaves no room for an answer.
        PromptError: the prompt is empty or has ids outside the vocabulary.
        UsageError: a grammar with params that end an answer early or keep it from ending.
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
    mask: TokenMask | None = None
    if grammar is not None:
        mask = grammar.mask(tokenizer, vocab_size)
        if instruct and tokenizer.has_think_marks:
            mask = ThinkingMask(mask, tokenizer, vocab_size)
    request = Request(
        ids=ids,
        params=replace(params, seed=used, max_tokens=max_tokens),
        stop_ids=tokenizer.end_ids,
        banned_ids=tokenizer.banned_ids(vocab_size, tools=tools),
        mask=mask,
    )
    engine.check(request)
    return request, used
