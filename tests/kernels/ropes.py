"""Ropes for tests: plain, with YaRN's magnitude, and with queries that grow with their position."""

import torch

from mistral_chat.kernels.reference import Rope
from mistral_chat.model.rope import frequencies

PLAIN: dict[str, float] = {}
SCALED = {"magnitude": 1.4, "beta": 0.1}


def rope_of(
    head_dim: int,
    theta: float,
    device: torch.device | str = "cpu",
    original: int = 1,
    **more: float,
) -> Rope:
    turns = torch.tensor(frequencies(head_dim, theta), dtype=torch.float32, device=device)
    return Rope(turns, original=original, **more)
