"""One rank's model and cache, run step by step.

The same on every rank; rank 0's answers carry logits. Knows nothing of sequences' histories, nor of
where weights come from.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mistral_chat.engine.collectives import PeerCollective, decode_collective
from mistral_chat.engine.decoder import Choosing, Decoder, Pending
from mistral_chat.engine.memory import Plan
from mistral_chat.engine.ranks.group import Group
from mistral_chat.engine.step import Step
from mistral_chat.engine.step_guard import StepGuard
from mistral_chat.errors import UsageError
from mistral_chat.kernels import ops
from mistral_chat.model.cache import KVCache
from mistral_chat.model.few_rows import supports
from mistral_chat.model.operations import Collective
from mistral_chat.model.transformer import Transformer

__all__ = ["Runner", "StartUp", "why_no_decoder"]


@dataclass(frozen=True, kw_only=True)
class StartUp:
    """Seconds of each part of loading; kernels are compiled while weights are read.

    Args:
        load_s: the whole.
        check_s: reading the shape, checking files and planning memory.
        weights_s: reading this rank's weights.
        weights_bytes: their size; 0 for random weights.
        kernels_s: compiling or loading kernels, by their first use.
        capture_s: capturing the first graph.
        meanwhile_s: whatever else was done during the reading.
    """

    load_s: float
    check_s: float
    weights_s: float
    weights_bytes: int
    kernels_s: float
    capture_s: float
    meanwhile_s: float


class Runner:
    """A loaded model with its cache; runs steps on this rank.

    Args:
        model: this rank's share, weights in place.
        group: the ranks.
        max_batch_size: slots of the cache.
        max_seq_len: positions of a slot.
        chunk_size: most tokens of a step.
        plan: bytes by purpose; None if memory was not planned.
        cache_dtype: of keys and values; None is the model's.

    `vocab_size` is the width of the logits on rank 0.
    """

    def __init__(
        self,
        model: Transformer,
        group: Group,
        *,
        max_batch_size: int,
        max_seq_len: int,
        chunk_size: int,
        plan: Plan | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self._model: Transformer | None = model
        self.group = group
        self.guard = StepGuard(group.world_size)
        self.max_seq_len = max_seq_len
        self.chunk_size = chunk_size
        self.plan = plan
        self._cache: KVCache | None = KVCache(
            model.shard, max_batch_size, max_seq_len, cache_dtype or model.dtype, model.device
        )
        self.decoder: Decoder | None = None
        self.decode_collective: Collective | None = None
        self.start_up: StartUp | None = None
        # One share that is measured alone scores its own part of the vocabulary.
        self.vocab_size = sum(len(model.shard.vocab_of(r)) for r in range(group.world_size))
        group.close_with_me(self)

    @property
    def model(self) -> Transformer:
        """This rank's share.

        Raises:
            UsageError: this runner is closed.
        """
        if self._model is None:
            raise UsageError("this model has been closed: load it again to go on")
        return self._model

    @property
    def cache(self) -> KVCache:
        """Keys and values of every slot."""
        assert self._cache is not None
        return self._cache

    def close(self) -> None:
        """Release weights, cache and graphs (which hold communicators), also while this is kept."""
        self.decoder = self.decode_collective = None
        self._model = self._cache = None

    def open_decoder(self) -> None:
        """Run steps of few tokens with `Decoder` from now on; every rank must call it."""
        self.decode_collective = self.decode_collective or decode_collective(self.group, self.model)
        self.decoder = Decoder(
            self.model, self.cache, self.decode_collective,
            vocab_size=self.vocab_size, is_leader=self.group.is_leader,
        )  # fmt: skip
        self.decoder.warm_up()

    @property
    def path(self) -> str:
        """How decode steps run here, for people."""
        if self.decoder is None:
            return f"reference ({why_no_decoder(self.model)})"
        graphs = "CUDA graphs" if self.model.device.type == "cuda" else "one by one"
        if self.group.world_size == 1:
            return graphs
        assert self.decode_collective is not None
        return f"{graphs}, sums through {self.decode_collective.path}"

    @property
    def notice(self) -> str | None:
        """What to tell the user if decode takes a slower path than GPUs offer; else None."""
        if self.model.device.type != "cuda":
            return None
        on_peers = self.group.world_size == 1 or isinstance(self.decode_collective, PeerCollective)
        if self.decoder is None or not on_peers:
            return f"decode takes a slower path here: {self.path}"
        return None

    def run(self, step: Step) -> Tensor | None:
        """Rank 0: run a step on all ranks.

        Returns:
            float32 logits (scored positions, vocabulary), or None for a step that scores none.
        """
        with self.guard.whole():
            self.group.send(step)
            return self.forward(step)

    def decode(
        self, step: Step, choosing: Sequence[Choosing], uniforms: Sequence[Sequence[float]]
    ) -> list[Pending]:
        """Rank 0: have the device choose `step.n_tokens` tokens for each sequence.

        Args:
            step: its chunks, or none to go on with the sequences of the previous step.
            choosing: how, for each chunk.
            uniforms: a random number in [0, 1) for each token and sequence.

        Returns:
            one `Pending` for each of the `n_tokens`.
        """
        assert self.decoder is not None
        with self.guard.whole():
            self.group.send(step)
            if step.chunks:
                self.decoder.begin(step.chunks, choosing)
            return self.decoder.advance(step.n_tokens, uniforms)

    def forward(self, step: Step) -> Tensor | None:
        """Run a step on this rank; only rank 0 gets logits, which the next step may overwrite."""
        if self.decoder is not None and self.decoder.fits(step):
            return self.decoder.score(step.chunks)
        ids = [token for chunk in step.chunks for token in chunk.tokens]
        tokens = torch.tensor(ids, device=self.model.device)
        spans = [chunk.span for chunk in step.chunks]
        part = self.model(tokens, spans, self.cache, step.logits)
        return None if part is None else self.model.collective.gather_columns(part)

    def follow(self) -> None:
        """Run the steps that rank 0 sends until it ends the loop; for the other ranks."""
        while (step := self.group.receive()) is not None:
            if step.n_tokens:
                assert self.decoder is not None
                if step.chunks:
                    self.decoder.begin(step.chunks)
                self.decoder.advance(step.n_tokens)
            else:
                self.forward(step)


def why_no_decoder(model: Transformer) -> str | None:
    """Why this model has no `Decoder` here; None if it has."""
    why = ops.why_no_kernels(model.device)
    if why is None and not supports(model):
        why = f"no kernels for heads of {model.args.head_dim}"
    return why
