"""How positions turn heads: the rotary embedding, YaRN's longer context, llama-4's query scaling.

Numbers only: what params.json and config.json say of it, and the frequencies that follow. The
rotations themselves are in `kernels`.
"""

import math
from dataclasses import dataclass

from mistral_chat.model.values import (
    MOST_POSITIONS,
    read_table,
    require_flag,
    require_number,
    require_whole,
)

__all__ = ["QueryScaling", "Yarn", "frequencies", "yarn_magnitude"]


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """What YaRN multiplies queries and keys by, so that attention keeps its sharpness."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """A context that was made longer by slowing down the slow rotations.

    Source: Peng et al. 2023, arXiv 2309.00071; transformers, `modeling_rope_utils.py`.

    Args:
        factor: how many times longer.
        original_max_position_embeddings: positions before.
        beta_fast: pairs that turn more often than this in the original context stay as they are.
        beta_slow: pairs that turn less often are slowed down by the factor; between, in parts.
        magnitude: what queries and keys are multiplied by.

    Raises:
        CheckpointError: a value is out of range; it is named.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float = 1.0

    def __post_init__(self) -> None:
        require_number("factor", self.factor, 1.0, 1e6)
        require_whole(
            "original_max_position_embeddings",
            self.original_max_position_embeddings, 1, MOST_POSITIONS,
        )  # fmt: skip
        for name in ("beta_fast", "beta_slow", "magnitude"):
            require_number(name, getattr(self, name), 1e-3, 1e6)

    @classmethod
    def from_params(cls, table: object) -> "Yarn":
        """Read params.json's `yarn`: {original_max_position_embeddings, factor, beta, alpha,
        apply_scale}.
        """
        keys = {
            "original_max_position_embeddings": "original_max_position_embeddings",
            "factor": "factor", "beta": "beta_fast", "alpha": "beta_slow", "apply_scale": "scaled",
        }  # fmt: skip
        said = read_table("yarn", table, keys, required=2)
        scaled = require_flag("apply_scale", said.pop("scaled", True))
        magnitude = yarn_magnitude(require_number("factor", said["factor"], 1.0, 1e6))
        return cls(**said, magnitude=magnitude if scaled else 1.0)


@dataclass(frozen=True, kw_only=True)
class QueryScaling:
    """Queries that grow with their position, so that long contexts stay sharp (llama 4).

    A query at `position` is multiplied by 1 + beta ln(1 + floor(position / original)).

    Args:
        beta: how fast.
        original_max_position_embeddings: positions that one step of it has.

    Raises:
        CheckpointError: a value out of range; it is named.
    """

    beta: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        require_number("beta", self.beta, 1e-6, 1e3)
        require_whole(
            "original_max_position_embeddings",
            self.original_max_position_embeddings, 1, MOST_POSITIONS,
        )  # fmt: skip

    @classmethod
    def from_params(cls, table: object) -> "QueryScaling | None":
        """Read params.json's `llama_4_scaling`: {original_max_position_embeddings, beta}; a beta
        of 0 is none.
        """
        keys = {
            "original_max_position_embeddings": "original_max_position_embeddings", "beta": "beta"
        }  # fmt: skip
        said = read_table("llama_4_scaling", table, keys, required=2)
        return None if said["beta"] == 0 else cls(**said)


def frequencies(head_dim: int, theta: float, yarn: Yarn | None = None) -> list[float]:
    """Radians that each pair of a head turns by per position.

    Source: Su et al. 2021, arXiv 2104.09864; with YaRN, transformers' `modeling_rope_utils.py`.

    Args:
        head_dim: numbers of a head.
        theta: base of the rotary embedding.
        yarn: None for the context that the model was first trained with.

    Returns:
        `head_dim / 2` numbers, fastest first.
    """
    plain = [theta ** (-2 * pair / head_dim) for pair in range(head_dim // 2)]
    if yarn is None:
        return plain
    original = yarn.original_max_position_embeddings

    def pair_that_turns(times: float) -> float:
        """The pair, between two of them too, that turns so often in the original context."""
        return head_dim * math.log(original / (2 * math.pi * times)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), head_dim - 1)
    width = high - low or 0.001  # as transformers has it
    ramp = [min(max((pair - low) / width, 0.0), 1.0) for pair in range(head_dim // 2)]
    return [f * (slow / yarn.factor + 1 - slow) for f, slow in zip(plain, ramp, strict=True)]
