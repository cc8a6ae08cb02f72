"""The only message from rank 0 to the others: run these tokens of these sequences.

A step can be packed into a list of integers. Knows nothing of how it is sent.
"""

from dataclasses import dataclass

from mistral_chat.model.operations import Span, WhichLogits

__all__ = ["Chunk", "Step"]

_WHICH: tuple[WhichLogits, ...] = ("none", "last", "all")


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of one sequence.

    Args:
        slot: its place in the cache.
        start: position of the first; the cache is overwritten from there on.
        tokens: ids.
    """

    slot: int
    start: int
    tokens: tuple[int, ...]

    @property
    def span(self) -> Span:
        """The same without ids."""
        return Span(self.slot, self.start, len(self.tokens))


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass over new tokens of one or more sequences, or several decodes in a row.

    Args:
        chunks: at most one per slot. With `n_tokens` one token each, or no chunks to go on with
            the tokens that the previous decodes chose.
        logits: which positions rank 0 wants scored: none, the last of each chunk, or all.
        n_tokens: 0 for logits; else number of decodes in a row, each on the token that rank 0's
            device chose before, without the host.
    """

    chunks: tuple[Chunk, ...]
    logits: WhichLogits = "last"
    n_tokens: int = 0

    def pack(self) -> list[int]:
        """As integers: logits, `n_tokens`, number of chunks; of each slot, start, length, ids."""
        packed = [_WHICH.index(self.logits), self.n_tokens, len(self.chunks)]
        for chunk in self.chunks:
            packed += [chunk.slot, chunk.start, len(chunk.tokens), *chunk.tokens]
        return packed

    @classmethod
    def unpack(cls, packed: list[int]) -> "Step":
        """Reverse `pack`.

        Raises:
            ValueError: these integers are no packed step.
        """
        if len(packed) < 3:
            raise ValueError(f"{len(packed)} integers: expected at least 3")
        which, n_tokens, n_chunks = packed[:3]
        if not 0 <= which < len(_WHICH) or n_tokens < 0 or n_chunks < 0:
            raise ValueError(f"it begins with {packed[:3]}")
        chunks: list[Chunk] = []
        at = 3
        for _ in range(n_chunks):
            slot, start, length = packed[at : at + 3] if at + 3 <= len(packed) else (-1, -1, -1)
            at += 3
            tokens = packed[at : at + length] if length > 0 else []
            if min(slot, start, length) < 0 or len(tokens) != length or min(tokens, default=0) < 0:
                raise ValueError(f"chunk {len(chunks)} of {n_chunks} is cut off, or negative")
            chunks.append(Chunk(slot, start, tuple(tokens)))
            at += length
        if at != len(packed):
            raise ValueError(f"{len(packed) - at} integers after its end")
        return cls(tuple(chunks), _WHICH[which], n_tokens)
