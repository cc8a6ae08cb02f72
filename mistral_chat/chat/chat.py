"""One prompt or a chat: text in, a stream of text out, and a history that keeps what was said.

The middle of the three generators: over `Engine.generate`'s ids, under the terminal's printing.
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
from mistral_chat.chat.grammar import Grammar, choose_grammar
from mistral_chat.chat.tokenizer import Tokenizer
from mistral_chat.chat.tools import UNREADABLE, ToolCall, make_id
from mistral_chat.config import COMPLETION_MAX_TOKENS, SamplingParams
from mistral_chat.engine.engine import Engine, Prefill, Request
from mistral_chat.errors import UsageError

__all__ = ["Answer", "Chat", "ChatStream", "Delta", "check_no_tools", "make_request"]


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
        replace_last: bool = False,
    ) -> "ChatStream":
        """Say something and stream the answer, which joins the history when its stream ends.

        Calls of the last answer that got no result (`send_results`) get one that says so.

        Args:
            text: the next message, or a plain prompt.
            params: how to sample; a seed of its own is drawn where it has none. Later answers of
                a chat use the seed plus their number, so that a seed repeats a whole chat.
            json_schema: an answer that ends by itself is JSON, valid against this schema.
            json_object: the same for any JSON object.
            replace_last: say it in place of the last exchange, which stays where this one comes
                to nothing.

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
            before = self.conversation.copy()
            if replace_last:
                before.undo()
            ids = before.encode(self.tokenizer, [UserMessage(content=text)])
        else:
            ids = self.tokenizer.encode(text)
        return self._stream(text, ids, params, grammar, replace_last=replace_last)

    def exchanges_to_drop(self, text: str, n_answer: int) -> int | None:
        """The least number of oldest exchanges without which a message fits the context.

        Args:
            text: the message.
            n_answer: tokens to leave for its answer.

        Returns:
            0 where it fits as it is; None where it does not fit by itself.
        """
        room = self.engine.max_seq_len - n_answer

        def fits(n: int) -> bool:
            rest = self.conversation.copy()
            rest.drop(n)
            return len(rest.encode(self.tokenizer, [UserMessage(content=text)])) <= room

        counts = range(self.conversation.n_exchanges + 1)
        n = bisect_left(counts, True, key=fits)
        return n if n < len(counts) else None

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
        builder = AnswerBuilder(self.tokenizer, request, seed, continues=not self.instruct)
        return ChatStream(self, text, request, builder, replace_last=replace_last)

    def keep(self, text: str | None, answer: Answer, *, replace_last: bool = False) -> bool:
        """Add a finished answer to the history; one that is empty is not kept.

        Args:
            text: what it answers; None are results of calls, which are there already.
            replace_last: take back the last exchange first.
            answer: with its calls; calls that cannot be read are kept as one, by the name
                `UNREADABLE`, so that the model can be told.

        Returns:
            whether it was kept.
        """
        self._n_answers += 1
        if not self.instruct:
            return False
        own: tuple[int, ...] | None = answer.token_ids
        if own and own[-1] in self.tokenizer.end_ids:
            own = own[:-1]
        calls = self._calls_to_keep(answer)
        if not calls and not answer.said:
            return False
        if replace_last:
            self.conversation.undo()
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
        return True

    def _calls_to_keep(self, answer: Answer) -> tuple[ToolCall, ...]:
        if answer.call_at is None or answer.finish_reason not in ("stop", "tool_calls"):
            return ()  # none, or cut short
        if answer.tool_calls or answer.stopped_by_text:
            return answer.tool_calls
        id_ = make_id(answer.seed, 0)
        return (ToolCall(id_, UNREADABLE, {"text": answer.text[answer.call_at :]}),)


class ChatStream(AnswerStream):
    """An answer of a chat on its way; at its end the exchange joins the history.

    `is_kept` says whether it has.
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

    def __iter__(self) -> Iterator[Prefill | Delta | Answer]:
        for event in super().__iter__():
            if isinstance(event, Answer):
                self.is_kept = self._chat.keep(self._text, event, replace_last=self._replace_last)
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
    """A checked request with its seed drawn, its end tokens and its banned ids; and the seed.

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
        ContextLengthError: the prompt leaves no room for an answer.
        PromptError: the prompt is empty or has ids outside the vocabulary.
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
        stop_ids=tokenizer.end_ids,
        banned_ids=tokenizer.banned_ids(vocab_size, tools=tools),
        mask=None if grammar is None else grammar.mask(tokenizer, vocab_size),
    )
    engine.check(request)
    return request, used
