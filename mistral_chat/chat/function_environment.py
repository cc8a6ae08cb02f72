"""The environment of a person's Python functions: this process's, without its secrets.

What runs there was asked for by a model, and its code is often somebody else's.
"""

import os
import re
from collections.abc import Sequence

from mistral_chat.errors import UsageError

__all__ = ["is_secret", "split_environment"]

# Words of a name, between underscores: HF_TOKEN, but not TOKENIZERS_PARALLELISM.
_SECRET = re.compile(
    r"(^|_)(API_?KEY|KEY|TOKEN|CREDENTIAL|PASS|PASSWD)S?(_|$)|SECRET|PASSWORD"
    r"|^AWS_|^MISTRAL_CHAT_",
    re.IGNORECASE,
)


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value is for few eyes."""
    return _SECRET.search(name) is not None


def split_environment(asked: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """What functions see of this process's environment, and what is withheld.

    Args:
        asked: names of variables to hand on whatever they are called.

    Returns:
        the variables, and the names of those that are left out.

    Raises:
        UsageError: a name that is asked for and not there.
    """
    for name in asked:
        if name not in os.environ:
            raise UsageError(f"--tools_env {name}: there is no such variable: export it first")
    withheld = [name for name in os.environ if is_secret(name) and name not in asked]
    return {name: os.environ[name] for name in os.environ if name not in withheld}, withheld
