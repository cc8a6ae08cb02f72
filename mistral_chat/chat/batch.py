"""Answer many questions at once: each is encoded when a slot is free, answered when it ends.

Built on `Engine.generate_many`, beside `Chat`; `LLM.chat` uses it for one question. Knows nothing
of files. Imports nothing heavy until it runs, so questions can be checked before the model is
loaded.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mistral_chat.config import SamplingParams
from mistral_chat.errors import PromptError, UsageError

if TYPE_CHECKING:
    from mistral_common.protocol.instruct.tool_calls import Tool
    from torch import Tensor

    from mistral_chat.chat.answer import Answer, AnswerBuilder
    from mistral_chat.chat.schema.grammar import Grammar
    from mistral_chat.chat.tokenizer import Tokenizer
    from mistral_chat.engine.engine import Engine, Request, Token, TokenMask

__all__ = ["Question", "answer_many", "prepare"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One prompt of many: a text to continue, or a conversation to answer.

    Args:
        prompt: text to continue (plain completion).
        messages: a conversation in OpenAI's form, for the chat template.
        system: system prompt, if the conversation has no system or developer message.
        tools: this question's own functions; None uses those of the whole batch.
        json_schema: an answer that is not cut short is JSON, valid against this schema.
        json_object: the same for any JSON object; False is free text, None the batch's
            setting.
        reasoning: none or high, where the template knows it; None leaves it to the model.
        params: sampling settings.
    """

    prompt: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    system: str | None = None
    tools: "Sequence[Mapping[str, Any] | Tool] | None" = None
    json_schema: Mapping[str, Any] | None = None
    json_object: bool | None = None
    reasoning: str | None = None
    params: SamplingParams

    def __post_init__(self) -> None:
        assert (self.prompt is None) != (self.messages is None)

    def is_json(self, *, by_default: bool) -> bool:
        """Return whether the answer must be JSON, or `by_default` if the question does not say."""
        if self.json_schema is not None:
            return True
        return by_default if self.json_object is None else self.json_object


class _Guard:
    """A mask whose failure ends only its own answer, since other answers run in the same step.

    Args:
        mask: the mask of an answer.
        request: the request of the same answer; cancelled at the first failure.
        vocab_size: the model's vocabulary size.
    """

    def __init__(self, mask: "TokenMask", request: "Request", vocab_size: int) -> None:
        self._mask = mask
        self._request = request
        self._vocab_size = vocab_size
        self.fault: PromptError | None = None

    def allowed(self) -> "Tensor":
        """Return the allowed tokens; all after a failure, since the answer is then discarded."""
        import torch

        if self.fault is None:
            try:
                return self._mask.allowed()
            except PromptError as error:
                self._fail(error)
        return torch.full((-(-self._vocab_size // 32),), -1, dtype=torch.int32)

    def take(self, token: int) -> None:
        """Pass the token to the mask, unless the mask has failed."""
        if self.fault is None:
            try:
                self._mask.take(token)
            except PromptError as error:
                self._fail(error)

    def _fail(self, error: PromptError) -> None:
        self.fault = error
        self._request.cancelled = True


def answer_many(
    engine: "Engine",
    tokenizer: "Tokenizer",
    questions: Iterable[Question],
    tools: Sequence["Tool"] = (),
    grammar: "Grammar | None" = None,
) -> Iterator[tuple[int, "Token | Answer | PromptError | UsageError"]]:
    """Answer questions, as many at once as the engine has slots.

    Args:
        engine: the engine of the loaded model.
        tokenizer: the tokenizer of the same model.
        questions: read one by one as slots become free.
        tools: offered in conversations that have no tools of their own.
        grammar: for questions that do not say what the answer must be; None is free text.

    Yields:
        the question's number, from 0, with each of its tokens and then its answer; or only the
        error that prevents an answer.
    """
    from mistral_chat.engine.engine import Token

    running: dict[int, tuple[int, Request, AnswerBuilder]] = {}
    refused: deque[tuple[int, PromptError | UsageError]] = deque()

    def requests() -> Iterator["Request"]:
        asked = itertools.count()
        for number, question in enumerate(questions):
            try:
                request, builder = prepare(engine, tokenizer, question, tools, grammar)
            except (PromptError, UsageError) as error:
                refused.append((number, error))
                continue
            if request.mask is not None:
                request.mask = _Guard(request.mask, request, engine.runner.model.args.vocab_size)
            running[next(asked)] = number, request, builder
            yield request

    for index, event in engine.generate_many(requests()):
        while refused:
            yield refused.popleft()
        number, request, builder = running[index]
        builder.add(event)
        if isinstance(event, Token):
            if isinstance(request.mask, _Guard) and request.mask.fault is not None:
                del running[index]
                yield number, request.mask.fault
                continue
            yield number, event
            if event.finish_reason or request.cancelled:  # cancelled by a stop text
                del running[index]
                yield number, builder.finish()[1]
    yield from refused


def prepare(
    engine: "Engine",
    tokenizer: "Tokenizer",
    question: Question,
    tools: Sequence["Tool"] = (),
    grammar: "Grammar | None" = None,
) -> tuple["Request", "AnswerBuilder"]:
    """Return the engine's request for a question, and the builder that reads its tokens.

    Args:
        engine: the engine of the loaded model.
        tokenizer: the tokenizer of the same model.
        question: the question to prepare.
        tools: offered in a conversation that has no tools of its own.
        grammar: used if the question does not say what the answer must be.

    Raises:
        PromptError: it cannot be encoded, leaves no room for an answer, or has a schema that is
            not supported.
        UsageError: a schema together with tools, stop texts or a prefix.
    """
    from mistral_chat.chat.answer import AnswerBuilder
    from mistral_chat.chat.chat import check_no_tools, make_request
    from mistral_chat.chat.messages import encode_messages, ends_with_prefix
    from mistral_chat.chat.schema.grammar import choose_grammar
    from mistral_chat.chat.tools import make_tools

    if question.tools is not None:
        tools = make_tools(question.tools)
    if question.json_schema is not None or question.json_object is not None:
        grammar = choose_grammar(question.json_schema, bool(question.json_object))
    instruct = question.messages is not None
    check_no_tools(tools if instruct else (), grammar)
    if question.messages is None:
        assert question.prompt is not None
        ids = tokenizer.encode(question.prompt)
        continues = True
    else:
        ids = encode_messages(
            tokenizer, question.messages, tools, question.system, question.reasoning
        )
        continues = ends_with_prefix(question.messages)
        if continues and grammar is not None:
            raise UsageError("prefix and a JSON schema: expected one of them")
    request, seed = make_request(
        engine,
        tokenizer,
        ids,
        question.params,
        instruct=instruct,
        tools=instruct and bool(tools),
        grammar=grammar,
    )
    builder = AnswerBuilder(tokenizer, request, seed, instruct=instruct, continues=continues)
    return request, builder
