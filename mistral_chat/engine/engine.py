"""Prompts of token ids in, chosen tokens out, several sequences at once. Rank 0 only.

Remembers the ids in each cache slot, so that a prompt that shares a prefix with a slot is run only
from the first token that differs. Knows nothing of text, templates or files.
"""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from mistral_chat.config import SamplingParams
from mistral_chat.engine.decoder import Choosing, Pending
from mistral_chat.engine.runner import Runner
from mistral_chat.engine.sampling import (
    NO_TOKEN,
    Draws,
    allowed_words,
    check_finite,
    choose,
    log_probability,
    no_numbers,
)
from mistral_chat.engine.step import Chunk, Step
from mistral_chat.errors import ContextLengthError, PromptError, UsageError
from mistral_chat.model.few_rows import MOST_ROWS

# Decode steps are started this much ahead of reading their tokens: enough for rank 0 to tell the
# others, and little enough that a stop or Ctrl-C wastes few steps.
AHEAD_S = 0.01
MOST_AT_ONCE = 8

__all__ = ["Engine", "Prefill", "Request", "Token", "TokenMask"]


class TokenMask(Protocol):
    """Says which tokens may come next in one answer."""

    def allowed(self) -> Tensor:
        """The ids that may come next, at least one.

        Returns:
            (ceil(vocabulary / 32),) int32 on CPU, bit i % 32 of word i // 32 for token i.
        """

    def take(self, token: int) -> None:
        """Advance by the chosen token, which was allowed."""


@dataclass(kw_only=True)
class Request:
    """A prompt to continue.

    Args:
        ids: the prompt's tokens.
        params: how to choose the answer's.
        stop_ids: tokens that end the answer.
        banned_ids: tokens never to choose.
        mask: further limits of each token. It must stand at the answer's beginning, so a request
            with a mask runs only once.
        cancelled: may be set at any time; the sequence then ends before its next step.
        checked: `Engine.check` has passed it.
    """

    ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    banned_ids: tuple[int, ...] = ()
    mask: TokenMask | None = None
    cancelled: bool = False
    checked: bool = field(default=False, init=False)


@dataclass(frozen=True, slots=True)
class Prefill:
    """Progress of running the prompt.

    Args:
        done: prompt tokens in the cache.
        total: prompt tokens.
        cached: of `done`, those that were there before.
        logprobs: of the prompt tokens after the first, so far; empty when not asked for.
    """

    done: int
    total: int
    cached: int
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """A chosen token.

    Args:
        id: its id.
        finish_reason: None, except for the last token. `stop`: it is a stop token; `length`:
            max_tokens or the context is reached.
        logprob: in the model's own distribution; None when not asked for.
        top: the most likely ids with log-probabilities.
    """

    id: int
    finish_reason: Literal["stop", "length"] | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


Event = Prefill | Token


class _Sequence:
    """A request that runs in one slot."""

    def __init__(self, index: int, request: Request, slot: int, start: int, room: int) -> None:
        params = request.params
        self.index = index
        self.request = request
        self.slot = slot
        self.done = start  # tokens of `tokens` that are in the cache
        self.cached = start
        self.tokens = list(request.ids)
        self.n_prompt = len(request.ids)
        self.n_left = min(params.max_tokens or room, room)
        self.logprobs: list[float] = []
        self.draws = Draws(params.seed)

    @property
    def prefilling(self) -> bool:
        return self.done < self.n_prompt

    def take(self, chosen: int) -> Literal["stop", "length"] | None:
        """Append the chosen token; the finish reason if it is the last one."""
        self.tokens.append(chosen)
        self.n_left -= 1
        if self.request.mask is not None:
            self.request.mask.take(chosen)
        if chosen in self.request.stop_ids and not self.request.params.ignore_eos:
            return "stop"
        return "length" if self.n_left == 0 else None

    def next_tokens(self, most: int) -> tuple[int, ...]:
        return tuple(self.tokens[self.done : self.done + most])


class Engine:
    """Answers one or many requests in the runner's slots.

    Args:
        runner: rank 0's; the other ranks must be in `Runner.follow`.
        cached: ids whose keys and values the cache holds already, slot by slot.
    """

    def __init__(self, runner: Runner, cached: Iterable[Sequence[int]] = ()) -> None:
        self.runner = runner
        self._held: list[list[int]] = [[] for _ in range(runner.cache.n_slots)]
        for held, ids in zip(self._held, cached, strict=False):
            held.extend(ids)
        self._allowed_words: dict[tuple[int, ...], Tensor] = {}
        self._step_s = AHEAD_S  # of recent steps
        self._turn = threading.Lock()  # one generation at a time has the slots
        self._turn_of: int | None = None  # its thread

    @property
    def max_seq_len(self) -> int:
        """Most tokens of one sequence, prompt and answer together."""
        return self.runner.max_seq_len

    def generate(self, request: Request) -> Iterator[Event]:
        """Continue one prompt.

        Yields:
            Prefill after each chunk of the prompt, then Token after Token until one carries a
            finish reason. A cancelled request just ends.

        Raises:
            CheckpointError: the model's logits are NaN or infinite.
            ContextLengthError: the prompt leaves no room for an answer.
            PromptError: the prompt is empty or has ids outside the vocabulary.
        """
        for _, event in self.generate_many([request]):
            yield event

    def generate_many(self, requests: Iterable[Request]) -> Iterator[tuple[int, Event]]:
        """Continue many prompts, as many at once as there are slots.

        Args:
            requests: taken one by one as slots become free.

        Yields:
            the request's number, in the order given, and an event of it.

        Raises:
            CheckpointError: the model's logits are NaN or infinite.
            ContextLengthError: a prompt leaves no room for an answer.
            PromptError: a prompt is empty or has ids outside the vocabulary.
            UsageError: this thread has begun another generation and not ended it. (Another
                thread's is waited for.)
        """
        if self._turn_of == threading.get_ident():
            raise UsageError(
                "another answer of this model is on its way in this thread: take it to its end, "
                "or close it, before the next is asked for"
            )
        with self._turn:
            self._turn_of = threading.get_ident()
            try:
                yield from self._generate_many(requests)
            finally:
                self._turn_of = None

    def _generate_many(self, requests: Iterable[Request]) -> Iterator[tuple[int, Event]]:
        waiting = enumerate(requests)
        running: list[_Sequence] = []
        free = deque(range(len(self._held)))
        try:
            while True:
                for sequence in [s for s in running if s.request.cancelled]:
                    running.remove(sequence)
                    free.append(sequence.slot)
                while free and (entry := next(waiting, None)) is not None:
                    if not entry[1].cancelled:
                        running.append(self._admit(*entry, free))
                if not running:
                    return
                ahead = self._decodes_ahead(running)
                for sequence, event in (self._decode_ahead if ahead else self._step)(running[:]):
                    if isinstance(event, Token) and event.finish_reason:
                        running.remove(sequence)
                        free.append(sequence.slot)
                    yield sequence.index, event
        finally:
            running.clear()

    def check(self, request: Request) -> None:
        """Refuse a request that cannot be run.

        Raises:
            ContextLengthError: the prompt leaves no room for an answer.
            PromptError: the prompt is empty or has ids outside the vocabulary.
            MistralChatError: why the model can run nothing any more.
        """
        self.runner.guard.check()
        vocab_size = self.runner.model.args.vocab_size
        if not request.ids:
            raise PromptError("the prompt is empty: expected at least one token")
        if min(request.ids) < 0 or max(request.ids) >= vocab_size:
            raise PromptError(
                f"the prompt has token ids outside 0 to {vocab_size - 1}: does the tokenizer "
                f"belong to this model?"
            )
        if len(request.ids) >= self.max_seq_len:
            raise ContextLengthError(len(request.ids), self.max_seq_len)
        request.checked = True

    def _admit(self, index: int, request: Request, free: deque[int]) -> _Sequence:
        """Give a request the free slot that shares the longest prefix with it."""
        if not request.checked:
            self.check(request)
        shared = {slot: _common_prefix(self._held[slot], request.ids) for slot in free}
        slot = max(free, key=lambda s: (shared[s], -len(self._held[s])))
        free.remove(slot)
        # The last prompt token is always run: its logits choose the first token of the answer.
        start = 0 if request.params.prompt_logprobs else min(shared[slot], len(request.ids) - 1)
        return _Sequence(index, request, slot, start, self.max_seq_len - len(request.ids))

    def _step(self, running: list[_Sequence]) -> list[tuple[_Sequence, Event]]:
        """Run one step: a token of each sequence that decodes, and as much prompt as has room."""
        room = self.runner.chunk_size
        chunks: list[tuple[_Sequence, Chunk]] = []
        for sequence in sorted(running, key=lambda s: s.prefilling):
            tokens = sequence.next_tokens(room)
            if tokens:
                chunks.append((sequence, Chunk(sequence.slot, sequence.done, tokens)))
                room -= len(tokens)
        scored = [s for s, c in chunks if s.done + len(c.tokens) == len(s.tokens)]
        all_logits = any(s.prefilling and s.request.params.prompt_logprobs for s, _ in chunks)
        which = "all" if all_logits else "last" if scored else "none"
        for sequence, chunk in chunks:
            del self._held[sequence.slot][chunk.start :]
        logits = self.runner.run(Step(tuple(c for _, c in chunks), which))  # type: ignore[arg-type]
        # The device is still running the step, so that computing the masks takes no extra time.
        allowed = {sequence.index: self._allowed_next(sequence.request) for sequence in scored}
        events: list[tuple[_Sequence, Event]] = []
        row = 0
        for sequence, chunk in chunks:
            self._held[sequence.slot].extend(chunk.tokens)
            n_rows = len(chunk.tokens) if which == "all" else 1
            rows = None if logits is None else logits[row : row + n_rows]
            row += n_rows
            found = self._advance(sequence, chunk, rows, allowed.get(sequence.index))
            events += ((sequence, event) for event in found)
        return events

    def _allowed_next(self, request: Request) -> Tensor:
        """The ids that may come next, as `allowed_words` packs them."""
        words = self._allowed(request)
        return words if request.mask is None else words & request.mask.allowed()

    def _advance(
        self, sequence: _Sequence, chunk: Chunk, rows: Tensor | None, allowed: Tensor | None
    ) -> list[Event]:
        """Record what a step ran of one sequence, and choose its next token if it is due."""
        events: list[Event] = []
        was_prefilling = sequence.prefilling
        sequence.done += len(chunk.tokens)
        if was_prefilling:
            if sequence.request.params.prompt_logprobs:
                assert rows is not None
                following = sequence.tokens[chunk.start + 1 : sequence.done + 1]
                check_finite(rows)
                known = rows[: len(following)]
                sequence.logprobs += log_probability(
                    known, torch.tensor(following, dtype=torch.int64)
                )
            events.append(
                Prefill(sequence.done, sequence.n_prompt, sequence.cached, tuple(sequence.logprobs))
            )
        if sequence.done == len(sequence.tokens):
            assert rows is not None
            assert allowed is not None
            uniform = sequence.draws.next()
            choice = choose(rows[-1], sequence.request.params, allowed, uniform)
            reason = sequence.take(choice.id)
            events.append(Token(choice.id, reason, choice.logprob, choice.top))
        return events

    def _decodes_ahead(self, running: list[_Sequence]) -> bool:
        """Whether the device can choose the next tokens of all sequences without the host."""
        return (
            self.runner.decoder is not None
            and len(running) <= MOST_ROWS
            and not any(
                s.prefilling or s.request.params.logprobs is not None or s.request.mask is not None
                for s in running
            )
        )

    def _decode_ahead(self, running: list[_Sequence]) -> Iterator[tuple[_Sequence, Token]]:
        """Decode until a sequence ends, starting steps before the tokens of earlier ones are read.

        When a sequence ends, a few surplus steps are under way: their tokens are dropped, and their
        keys and values lie past the sequence's end.
        """
        left = min(sequence.n_left for sequence in running)
        chunks = tuple(Chunk(s.slot, s.done, tuple(s.tokens[s.done :])) for s in running)
        choosing = [Choosing(s.request.params, self._allowed(s.request)) for s in running]
        for chunk in chunks:
            assert len(chunk.tokens) == 1
            assert len(self._held[chunk.slot]) == chunk.start
        pending: deque[Pending] = deque()
        going = list(running)
        n_asked = 0
        read_at = time.perf_counter()
        while True:
            at_once = min(MOST_AT_ONCE, max(1, int(AHEAD_S / self._step_s)))
            while (
                n_asked < left
                and len(pending) < 2 * at_once
                and len(going) == len(running)
                and not any(s.request.cancelled for s in going)
            ):
                n = min(at_once, left - n_asked)
                uniforms = [[s.draws.next() for s in running] for _ in range(n)]
                step = Step(() if n_asked else chunks, n_tokens=n)
                pending += self.runner.decode(step, choosing, uniforms)
                n_asked += n
            if not pending or not going:
                return
            ids = pending.popleft().wait()
            if NO_TOKEN in ids:
                raise no_numbers()
            now = time.perf_counter()
            self._step_s += 0.2 * (now - read_at - self._step_s)
            read_at = now
            events = []
            for sequence, chosen in zip(running, ids, strict=True):
                if sequence in going and not sequence.request.cancelled:
                    self._held[sequence.slot].append(sequence.tokens[sequence.done])
                    sequence.done += 1
                    events.append((sequence, Token(chosen, sequence.take(chosen))))
            going = [s for s, event in events if not event.finish_reason]
            yield from events

    def _allowed(self, request: Request) -> Tensor:
        if request.banned_ids not in self._allowed_words:
            words = allowed_words(self.runner.vocab_size, request.banned_ids)
            self._allowed_words[request.banned_ids] = words
        return self._allowed_words[request.banned_ids]


def _common_prefix(a: list[int], b: list[int]) -> int:
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])
