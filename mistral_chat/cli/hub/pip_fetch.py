"""Fetch a package's wheel with pip, with a progress bar at a terminal.

Knows nothing of the wheel's content.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from mistral_chat.cli.console.progress import byte_bar

__all__ = ["fetch_wheel"]

LOOK_EVERY_S = 0.1


def fetch_wheel(package: str, folder: Path, size: int, *, show: bool) -> str | None:
    """Download a package's wheel into a folder.

    Args:
        package: a requirement, as pip takes it.
        folder: an empty folder, also for pip's temporary files.
        size: size of the wheel, in bytes.
        show: whether to show a bar, if stderr is a terminal.

    Returns:
        why it failed; None on success.
    """
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    command += [str(folder), "--only-binary=:all:", "--disable-pip-version-check", package]
    if show:
        with byte_bar("fetching", size, 0) as on_bytes:
            code, err = _run(command, folder, size, on_bytes)
    else:
        code, err = _run(command, folder, size, lambda n: None)
    if code == 0:
        return None
    lines = [x for x in err.splitlines() if x.strip() and not x.startswith("WARNING")]
    reason = lines[-1].strip() if lines else f"pip ended with code {code}"
    if "No module named pip" in reason:
        reason = "this Python has no pip: run python -m ensurepip"
    return reason


def _run(
    command: list[str], folder: Path, size: int, on_bytes: Callable[[int], None]
) -> tuple[int, str]:
    """Run pip and report its progress; return its exit code and stderr."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(folder)},  # pip writes there before it moves the wheel
    ) as pip:
        seen = 0
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    _, err = pip.communicate(timeout=LOOK_EVERY_S)
                    on_bytes(size - seen if pip.returncode == 0 else 0)
                    return pip.returncode, err
                now = min(_bytes_in(folder), size)
                on_bytes(now - seen)
                seen = now
        except BaseException:
            pip.kill()
            raise


def _bytes_in(folder: Path) -> int:
    """Return the largest file's size; pip copies the wheel once it is complete."""
    largest = 0
    for parent, _, names in os.walk(folder):  # which passes over folders that pip has removed
        for name in names:
            with contextlib.suppress(OSError):  # removed in the meantime
                largest = max(largest, (Path(parent) / name).stat().st_size)
    return largest
