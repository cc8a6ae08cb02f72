"""The Python interface: a model with all its ranks behind one object."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mistral_common.protocol.instruct.tool_calls import Tool

from mistral_chat.chat.answer import Answer, AnswerBuilder
from mistral_chat.chat.batch import Question, prepare
from mistral_chat.chat.chat import Chat, make_request
from mistral_chat.chat.schema.grammar import Grammar, choose_grammar
from mistral_chat.chat.tokenizer import Tokenizer
from mistral_chat.chat.tools import make_tools
from mistral_chat.config import (
    AskedQuantization,
    Device,
    Dtype,
    EngineConfig,
    KVCacheDtype,
    LoadFormat,
    SamplingParams,
)
from mistral_chat.engine.engine import Engine, Request
from mistral_chat.engine.start_up import load_runner
from mistral_chat.engine.worker import Session, serve
from mistral_chat.errors import UsageError
from mistral_chat.model.folder import ModelFolder

__all__ = ["LLM"]


class LLM:
    """A loaded model that answers; a context manager.

    Alone it runs in this process; with `nproc_per_node` it starts the other ranks and later ends
    them. In a script under torchrun every rank creates one: rank 0 continues, the others serve it
    and exit when rank 0 closes its own.

    Ctrl-C is raised between two steps, and the object can still be used. Threads take turns, one
    answer each. A forked process cannot use its parent's object.

    Args:
        model: folder in Mistral's format or Hugging Face's.
        nproc_per_node: ranks; None is one, or torchrun's number.
        device: auto, cuda or cpu.
        dtype: of weights and cache that are floats.
        max_seq_len: context to plan memory for; None is what fits, at most the model's.
        max_batch_size: how many sequences can decode together.
        load_format: auto, consolidated, hf or dummy.
        quantization: of the layers' matrices: auto is as stored; fp8, int8 and int4 quantize a
            checkpoint of floats while it loads.
        kv_cache_dtype: of keys and values: auto or fp8.

    Raises:
        MistralChatError: the model cannot be loaded here; the message says why.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        nproc_per_node: int | None = None,
        device: Device = "auto",
        dtype: Dtype = "auto",
        max_seq_len: int | None = None,
        max_batch_size: int = 8,
        load_format: LoadFormat = "auto",
        quantization: AskedQuantization = "auto",
        kv_cache_dtype: KVCacheDtype = "auto",
    ) -> None:
        config = EngineConfig(
            model=Path(model),
            device=device,
            dtype=dtype,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            load_format=load_format,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
        )
        self._session = Session(config, nproc_per_node)
        group = self._session.group
        if not group.is_leader:
            serve(config, group)
            sys.exit(0)
        try:
            folder = ModelFolder.open(config)
            self.tokenizer = Tokenizer.from_folder(folder)
            runner = load_runner(config, group, folder=folder)
            self._session.guard = runner.guard
            self.engine = Engine(runner)
        except BaseException:
            self._session.abandon()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the other ranks; the object cannot be used afterwards. Safe in signal handlers."""
        self._session.close()

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        json_schema: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        json_object: bool = False,
    ) -> list[Answer]:
        """Continue plain prompts, several at once.

        Args:
            prompts: a text, several texts, or lists of token ids.
            params: one for all prompts, or one for each.
            json_schema: an answer that is not cut short is JSON, valid against this schema; one
                for all prompts or one for each, where None is free text.
            json_object: the same for any JSON object.

        Returns:
            one answer for each prompt, in order.

        Raises:
            ContextLengthError: a prompt leaves no room for an answer.
            PromptError: a schema is not supported.
            UsageError: the number of params or schemas is not that of the prompts, or a schema is
                combined with stop texts.
        """
        listed: list[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else [*prompts]
        encoded = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in listed]
        if json_schema is None or isinstance(json_schema, Mapping):
            grammars = [choose_grammar(json_schema, json_object)] * len(encoded)
        else:
            grammars = [choose_grammar(schema, json_object) for schema in json_schema]
        return self._complete(encoded, params, grammars)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        tools: Sequence[Mapping[str, Any] | Tool] = (),
        *,
        json_schema: Mapping[str, Any] | None = None,
        json_object: bool = False,
        reasoning: str | None = None,
    ) -> Answer:
        """Answer a conversation; only the cache is kept between calls.

        Args:
            messages: OpenAI's form, `{"role": ..., "content": ...}`. With `"prefix": True` on a
                last assistant message the answer continues its text, without repeating it.
            params: sampling settings.
            tools: function schemas.
            json_schema: an answer that is not cut short is JSON, valid against this schema;
                thinking before it is free.
            json_object: the same for any JSON object.
            reasoning: none or high, where the template knows it; None leaves it to the model.

        Raises:
            PromptError: the template does not support the conversation (the message at fault is
                named) or the reasoning effort, or the schema is not supported.
            ContextLengthError: the conversation leaves no room for an answer.
            UsageError: a schema together with tools, stop texts or a prefix.
        """
        question = Question(
            messages=messages,
            tools=tools,
            json_schema=json_schema,
            json_object=json_object or None,
            reasoning=reasoning,
            params=params or SamplingParams(),
        )
        return self._run([prepare(self.engine, self.tokenizer, question)])[0]

    def conversation(
        self,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any] | Tool] = (),
        *,
        reasoning: str | None = None,
    ) -> Chat:
        """Start a chat that keeps its history; `for event in chat.send(text)` streams an answer.

        Args:
            system: system prompt.
            tools: function schemas; results of calls are sent with `chat.send_results`.
            reasoning: none or high, where the template knows it; None leaves it to the model.

        Raises:
            PromptError: not a function schema, or a reasoning effort that the template does not
                know.
        """
        return Chat(
            self.engine,
            self.tokenizer,
            system=system,
            tools=make_tools(tools),
            reasoning=reasoning,
        )

    def _complete(
        self,
        encoded: list[list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        grammars: Sequence[Grammar | None],
    ) -> list[Answer]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(encoded)
        if len(params) != len(encoded):
            raise UsageError(f"{len(params)} SamplingParams for {len(encoded)} prompts")
        if len(grammars) != len(encoded):
            raise UsageError(f"{len(grammars)} JSON schemas for {len(encoded)} prompts")
        prepared = []
        for ids, each, grammar in zip(encoded, params, grammars, strict=True):
            request, seed = make_request(
                self.engine,
                self.tokenizer,
                ids,
                each,
                instruct=False,
                tools=False,
                grammar=grammar,
            )
            builder = AnswerBuilder(self.tokenizer, request, seed, instruct=False, continues=True)
            prepared.append((request, builder))
        return self._run(prepared)

    def _run(self, prepared: Sequence[tuple[Request, AnswerBuilder]]) -> list[Answer]:
        for index, event in self.engine.generate_many([request for request, _ in prepared]):
            prepared[index][1].add(event)
        return [builder.finish()[1] for _, builder in prepared]
