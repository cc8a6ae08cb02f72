"""Entry of every rank that this package starts, before anything heavy is imported.

    python -P .../engine/rank.py launcher|program PARENT MODULE ARGUMENTS

It is run as a file, so that the rank uses the parent's copy of this package and not one in the
current folder or another installation.
"""

import os
import sys
from importlib import import_module, util
from pathlib import Path
from typing import Literal

__all__ = ["command"]


def command(parent: Literal["launcher", "program"], module: str, *arguments: str) -> list[str]:
    """The command line of a rank that this process starts.

    Args:
        parent: what this process is: a launcher, or a program that uses an `LLM`.
        module: the rank runs its `main`.
        arguments: `sys.argv[1:]` of the rank.
    """
    return [sys.executable, "-P", __file__, parent, str(os.getpid()), module, *arguments]


def _import_package() -> None:
    """Import the `mistral_chat` that this file belongs to."""
    folder = Path(__file__).resolve().parent.parent
    spec = util.spec_from_file_location(
        "mistral_chat", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["mistral_chat"] = package = util.module_from_spec(spec)
    spec.loader.exec_module(package)


def main() -> None:
    """Tie this process to its parent and run the module."""
    _import_package()
    from mistral_chat.engine.ranks import parent

    kind, process, module, *arguments = sys.argv[1:]
    if kind == "launcher":
        parent.end_with_launcher(int(process))
    else:
        parent.end_with(int(process))
    sys.argv = ["mistral-chat", *arguments]
    sys.exit(import_module(module).main())


if __name__ == "__main__":
    main()
