"""Locks on files, so that one process at a time uses a chat, a batch's output or a download."""

import fcntl

__all__ = ["lock"]


def lock(handle: int) -> bool:
    """Lock an open file until it is closed.

    Some cluster file systems do not support locks, but files must be written there as well; on
    these every process gets the lock.

    Returns:
        False if another process has the lock.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
