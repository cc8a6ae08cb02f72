"""What ranks agree on before they meet in a place that has no way out."""

import pytest
import torch
from torch.distributed import _symmetric_memory as symmetric_memory

from mistral_chat.engine.group import Group, Place


@pytest.mark.parametrize("failing", ["this", "another"])
def test_rank_without_memory_to_share_is_waited_for_by_nobody(
    monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def empty(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if failing == "this":
            raise RuntimeError("no memory of that kind\nstack")
        return torch.empty(size, dtype=dtype, device=device)

    def rendezvous(*_: object) -> None:
        pytest.fail("the others would wait here")

    monkeypatch.setattr(symmetric_memory, "empty", empty)
    monkeypatch.setattr(symmetric_memory, "rendezvous", rendezvous)
    agreed = []

    def minimum(value: int) -> int:
        agreed.append(value)
        return 0

    group = Group(Place())
    monkeypatch.setattr(group, "minimum", minimum)
    why_not = group.share_memory(64, torch.device("cpu"))
    assert agreed == [int(failing == "another")]
    assert (
        why_not
        == {
            "this": "no memory of that kind",
            "another": "another rank cannot share its memory",
        }[failing]
    )
