"""Where a process stands among the ranks, and how ranks of one run know each other."""

from dataclasses import dataclass, field

__all__ = ["Place"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process stands among the ranks, as the launcher's environment says.

    Args:
        rank: over all nodes.
        world_size: number of ranks over all nodes.
        local_rank: on this node; its GPU.
        local_world_size: ranks on this node.
        master_addr: rank 0's node.
        run: name of the run, unique to it; not a secret.
        secret: ranks on several nodes prove to each other that they know it.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"
    run: str = ""
    secret: bytes = field(default=b"", repr=False)

    @property
    def is_on_one_node(self) -> bool:
        """Whether all ranks are on this node."""
        return self.local_world_size == self.world_size
