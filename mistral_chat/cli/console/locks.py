"""One process at a time at a file: chats, outputs of batches and downloads are locked alike."""

import fcntl

__all__ = ["lock"]


def lock(handle: int) -> bool:
    """Lock an open file until it is closed.

    Some file systems of clusters know no locks, and files must be written there, too: on them
    every process gets it.

    Returns:
        False where another process has it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
