"""The environment variables of the process that runs the user's functions: ours, without secrets.

Models decide what runs there, and the code often comes from someone else.
"""

import os
import re
from collections.abc import Sequence

from mistral_chat.errors import UsageError

__all__ = ["is_secret", "split_environment"]

# Words of a name, separated by underscores: HF_TOKEN, but not TOKENIZERS_PARALLELISM.
_SECRET = re.compile(
    r"(^|_)(API_?KEY|KEY|TOKEN|CREDENTIAL|PASS|PASSWD)S?(_|$)|SECRET|PASSWORD"
    r"|^AWS_|^MISTRAL_CHAT_",
    re.IGNORECASE,
)


def is_secret(name: str) -> bool:
    """Return whether a variable's name suggests that its value is secret."""
    return _SECRET.search(name) is not None


def split_environment(asked: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split this process's environment into what functions may see and what is withheld.

    Args:
        asked: names of variables to pass on even if they look secret.

    Returns:
        the variables, and the names of those withheld.

    Raises:
        UsageError: a requested variable does not exist.
    """
    for name in asked:
        if name not in os.environ:
            raise UsageError(f"--tools_env {name}: there is no such variable: export it first")
    withheld = [name for name in os.environ if is_secret(name) and name not in asked]
    return {name: os.environ[name] for name in os.environ if name not in withheld}, withheld
