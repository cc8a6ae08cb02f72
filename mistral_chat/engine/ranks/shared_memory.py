"""GPU memory that all ranks of a node can write, through torch's symmetric memory.

torch finds a group by its name, and numbers the keys of a rendezvous with a counter of the whole
process. A process that opens a second model would therefore wait forever, holding the GIL, for keys
that its new ranks write under numbers from 0. Here every rendezvous is renumbered from 0, and each
group has its own name. Knows nothing of what is written there.
"""

import re
import secrets
import threading
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import (
    ProcessGroup,
    _register_process_group,
    _SymmetricMemory,
    _unregister_process_group,
)

from mistral_chat.engine.ranks.group import Group
from mistral_chat.engine.ranks.notes import Notes, NotesStore

__all__ = ["SharedMemory", "share_memory", "why_no_peer_access"]

OTHERS_CANNOT_SHARE = "another rank cannot share its memory"
_TURN = threading.Lock()  # torch's counter, and the names of its sockets, are of the process
_COUNTED = re.compile(r"([^/]+)/(\d+)(?=/|$)")


class _MeetingStore(NotesStore):
    """A store that renumbers the keys of one rendezvous from 0."""

    def __init__(self, notes: Notes, prefix: str) -> None:
        super().__init__(notes, prefix)
        self._first: dict[str, int] = {}

    def name(self, key: str) -> str:
        """The key as all ranks write it: what is `CUDASymmetricMemory/17/1` here may be
        `CUDASymmetricMemory/2/1` on another rank.
        """

        def renumber(found: re.Match[str]) -> str:
            what, number = found[1], int(found[2])
            return f"{what}/{number - self._first.setdefault(what, number)}"

        return super().name(_COUNTED.sub(renumber, key, count=1))


class SharedMemory:
    """Zeroed memory on this rank's GPU, and where the others' lies in this address space.

    Every rank makes one of the same size at the same time, and calls `meet` once all could.

    Args:
        n_bytes: a multiple of 8.
        device: this rank's GPU.

    Raises:
        RuntimeError: this machine or container does not offer such memory.
    """

    def __init__(self, n_bytes: int, device: torch.device) -> None:
        self._memory = _SymmetricMemory.empty_strided_p2p(
            (n_bytes // 8,), (1,), torch.int64, device
        )
        self._handle: _SymmetricMemory | None = None

    def meet(self, notes: Notes, rank: int, world_size: int, number: int) -> Tensor:
        """Map the others' memory.

        Args:
            notes: where ranks find each other.
            rank: this one.
            world_size: of them.
            number: tells this memory from others of the group; the same on all ranks.

        Returns:
            (world_size,) int64 on the device: where each rank's begins.

        Raises:
            RuntimeError: it cannot be mapped, such as in a container that forbids sharing it.
        """
        name: Any = f"mistral_chat-{secrets.token_hex(8)}"
        with _TURN:
            store = _MeetingStore(notes, f"shared-memory-{number}/")
            group = ProcessGroup(store, rank, world_size)
            group._set_group_name(name)
            _register_process_group(name, group)
            try:
                self._handle = _SymmetricMemory.rendezvous(self._memory, name)
            finally:
                _unregister_process_group(name)
        self._memory.zero_()
        torch.cuda.synchronize(self._memory.device)
        return torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64, device=self._memory.device)

    def close(self) -> None:
        """Unmap; no rank may write to it any more."""
        del self._memory, self._handle


def why_no_peer_access(group: Group) -> str | None:
    """Why the GPUs cannot write each other's memory, the same on all ranks; None when they can.

    Every rank must call it.
    """
    if group.place.local_world_size != group.world_size:
        return "ranks on several nodes"
    here = group.place.local_rank
    others = [gpu for gpu in range(group.world_size) if gpu != here]
    all_can = all(torch.cuda.can_device_access_peer(here, gpu) for gpu in others)
    return None if group.minimum(int(all_can)) else "GPUs without peer access"


def share_memory(group: Group, n_bytes: int, device: torch.device) -> Tensor | str:
    """Make zeroed GPU memory that all ranks of this node can write.

    Every rank must call it; the memory stays until the group is closed.

    Returns:
        (world_size,) int64 on the device: where each rank's begins in this address space; or,
        on all ranks, why there is none.
    """
    why_not = ""
    memory: SharedMemory | None = None
    try:
        memory = SharedMemory(n_bytes, device)
    except RuntimeError as error:
        why_not = str(error).splitlines()[0]
    number = group.lifeline.new_topic()
    if not group.minimum(int(not why_not)):  # else the others would wait in `meet`
        return why_not or OTHERS_CANNOT_SHARE
    assert memory is not None
    found: Tensor | str
    try:
        found = memory.meet(group.notes, group.rank, group.world_size, number)
    except RuntimeError as error:
        found = str(error).splitlines()[0]
    # No rank may write before all have cleared theirs.
    if group.minimum(int(isinstance(found, Tensor))):
        group.hold(memory)
        return found
    return found if isinstance(found, str) else OTHERS_CANNOT_SHARE
