"""Steps of few tokens on one rank, as CUDA graphs in which each step's token feeds the next.

The host only replays graphs: a decode step takes the token that the previous one chose, on the
device, and rank 0 reads tokens as they arrive. The inputs of a step lie in tensors of fixed
addresses. On a device without graphs the same operations run one by one. Knows nothing of
sequences' histories.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mistral_chat.config import SamplingParams
from mistral_chat.engine.sampling import settings_of
from mistral_chat.engine.step import Chunk, Step
from mistral_chat.kernels import ops
from mistral_chat.model.cache import KVCache
from mistral_chat.model.few_rows import MOST_ROWS, FewRows, HeadTable
from mistral_chat.model.operations import Collective
from mistral_chat.model.transformer import Transformer

__all__ = ["Choosing", "Decoder", "Pending"]

SPAN_COUNTS = (1, 2, 4, 8, 16, MOST_ROWS)
# A verify step of k drafts has k + 1 tokens.
SPAN_LENGTHS = (1, 2, 3, 5, 9, 17, MOST_ROWS)
RING = 64  # tokens on their way to the host


@dataclass(frozen=True, slots=True)
class Choosing:
    """How rank 0 chooses one sequence's tokens on the device.

    Args:
        params: temperature and filters.
        allowed: (ceil(vocabulary / 32),) int32 on CPU, bit i % 32 of word i // 32 for token i.
    """

    params: SamplingParams
    allowed: Tensor


class Pending:
    """Tokens that the device is choosing, one for each chunk.

    Args:
        tokens: (N,) int64, where they arrive on the host.
        arrived: None if they are there already.
    """

    def __init__(self, tokens: Tensor, arrived: torch.cuda.Event | None) -> None:
        self._tokens = tokens
        self._arrived = arrived

    def wait(self) -> list[int]:
        """Wait for the ids."""
        if self._arrived is not None:
            self._arrived.synchronize()
        ids: list[int] = self._tokens.tolist()
        return ids


class _Graph:
    """One captured step.

    Args:
        graph: to replay.
        logits: where rank 0 finds the scores; valid until the next step.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, logits: Tensor | None) -> None:
        self.graph = graph
        self.logits = logits


class Decoder:
    """Runs steps of few tokens on this rank.

    Args:
        model: this rank's share.
        cache: its keys and values.
        collective: how ranks sum, gather and broadcast.
        vocab_size: tokens that rank 0 has the scores of.
        is_leader: whether this is rank 0, which chooses.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        collective: Collective,
        *,
        vocab_size: int,
        is_leader: bool,
    ) -> None:
        device = model.device
        self._model = model
        self._cache = cache
        self._collective = collective
        self._heads = HeadTable.of(model.shard, device)
        self._is_leader = is_leader
        self._graphs: dict[tuple[int, int, bool], _Graph] = {}
        self._has_graphs = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._has_graphs else None
        n_words = -(-vocab_size // 32)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._tokens = zeros(MOST_ROWS, dtype=torch.int64)
        self._slots = zeros(MOST_ROWS, dtype=torch.int32)
        self._starts = zeros(MOST_ROWS, dtype=torch.int32)
        self._lengths = zeros(MOST_ROWS, dtype=torch.int32)
        self._params = zeros(MOST_ROWS, 4, dtype=torch.float32)
        self._uniforms = zeros(MOST_ROWS, dtype=torch.float32)
        self._allowed = zeros(MOST_ROWS, n_words, dtype=torch.int32)
        self._host = torch.zeros(RING, MOST_ROWS, dtype=torch.int64, pin_memory=self._has_graphs)
        self._next = 0
        self._n_chunks = 0
        self._n_spans = 1
        self.kernels_s = 0.0  # what the first step took: compiling and loading its kernels
        self.capture_s = 0.0

    @staticmethod
    def fits(step: Step) -> bool:
        """Whether a step is one for `score` or `choose`: one token of each of several sequences,
        or a few of one that are all scored.
        """
        lengths = [len(chunk.tokens) for chunk in step.chunks]
        if max(lengths, default=0) <= 1:
            return 0 < len(lengths) <= MOST_ROWS and step.logits != "none"
        return len(lengths) == 1 and lengths[0] <= SPAN_LENGTHS[-1] and step.logits == "all"

    def warm_up(self) -> None:
        """Compile, load and capture the step of one token; all ranks together."""
        self._lengths.zero_()
        self._allowed.fill_(-1)
        started = time.perf_counter()
        self._step(1, 1, choose=True)
        if self._has_graphs:
            torch.cuda.synchronize(self._tokens.device)
            self.kernels_s = time.perf_counter() - started
            self._capture(1, 1, choose=True)
            self.capture_s = time.perf_counter() - started - self.kernels_s

    def score(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """Run new tokens.

        Args:
            chunks: one token of each of several sequences, or a few of one.

        Returns:
            on rank 0 float32 logits (number of tokens, vocabulary), valid until the next step.
        """
        n_tokens = sum(len(chunk.tokens) for chunk in chunks)
        n_spans, length = self._load(chunks)
        logits = self._run(n_spans, length, choose=False)
        return None if logits is None else logits[:n_tokens]

    def begin(self, chunks: Sequence[Chunk], choosing: Sequence[Choosing] = ()) -> None:
        """Take the sequences that `advance` goes on with.

        Args:
            chunks: one token of each.
            choosing: rank 0: how to go on with each.
        """
        self._n_spans, _ = self._load(chunks)
        if choosing:
            n = len(choosing)
            settings = [settings_of(c.params) for c in choosing]
            self._params[:n].copy_(torch.tensor(settings, dtype=torch.float32))
            self._allowed[:n].copy_(torch.stack([c.allowed for c in choosing]))

    def advance(self, n_tokens: int, uniforms: Sequence[Sequence[float]] = ()) -> list[Pending]:
        """Run steps, each on the tokens that the one before chose.

        Args:
            n_tokens: how many steps.
            uniforms: rank 0: for each step and sequence a random number in [0, 1).

        Returns:
            rank 0: the tokens of each step, on their way.
        """
        pending = []
        for n in range(n_tokens):
            if uniforms:
                draws = torch.tensor(uniforms[n], dtype=torch.float32)
                self._uniforms[: len(draws)].copy_(draws, non_blocking=True)
            self._run(self._n_spans, 1, choose=True)
            if self._is_leader:
                pending.append(self._fetch())
        return pending

    def _load(self, chunks: Sequence[Chunk]) -> tuple[int, int]:
        """Put a step's tokens and places where the graphs read them; its spans and their length."""
        self._n_chunks = len(chunks)
        n_spans = next(n for n in SPAN_COUNTS if n >= len(chunks))
        longest = max(len(chunk.tokens) for chunk in chunks)
        length = next(n for n in SPAN_LENGTHS if n >= longest)
        empty = [0] * (n_spans - len(chunks))
        tokens = [t for c in chunks for t in (*c.tokens, *[0] * (length - len(c.tokens)))]
        for into, values in (
            (self._tokens, tokens + empty * length),
            (self._slots, [c.slot for c in chunks] + empty),
            (self._starts, [c.start for c in chunks] + empty),
            (self._lengths, [len(c.tokens) for c in chunks] + empty),
        ):
            into[: len(values)].copy_(torch.tensor(values, dtype=into.dtype), non_blocking=True)
        return n_spans, length

    def _fetch(self) -> Pending:
        host = self._host[self._next, : self._n_chunks]
        self._next = (self._next + 1) % RING
        host.copy_(self._tokens[: self._n_chunks], non_blocking=True)
        if not self._has_graphs:
            return Pending(host, None)
        arrived = torch.cuda.Event(blocking=True)
        arrived.record()
        return Pending(host, arrived)

    def _run(self, n_spans: int, length: int, *, choose: bool) -> Tensor | None:
        """One step of a shape: replayed, or at first run and captured for the next time."""
        key = (n_spans, length, choose)
        if (captured := self._graphs.get(key)) is not None:
            captured.graph.replay()
            return captured.logits
        logits = self._step(*key)
        if self._has_graphs:
            self._capture(*key)
        return logits

    def _capture(self, n_spans: int, length: int, choose: bool) -> None:
        """Capture a step that has run before, so that its kernels are loaded; runs nothing."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._step(n_spans, length, choose)
        self._graphs[n_spans, length, choose] = _Graph(graph, logits)

    @torch.inference_mode()
    def _step(self, n_spans: int, length: int, choose: bool) -> Tensor | None:
        n_rows = n_spans * length
        tokens = self._tokens[:n_rows]
        starts, lengths = self._starts[:n_spans], self._lengths[:n_spans]
        rows = FewRows(
            self._slots[:n_spans], starts, lengths, length,
            self._cache, self._heads, self._collective,
        )  # fmt: skip
        part = self._model.run(tokens, rows)
        assert part is not None
        logits = self._collective.gather_columns(part)
        if not choose:
            return logits
        if self._is_leader:
            assert logits is not None
            allowed, params = self._allowed[:n_rows], self._params[:n_rows]
            ops.sample(logits, allowed, params, self._uniforms[:n_rows], tokens)
        self._collective.broadcast(tokens)
        starts += lengths
        return logits
