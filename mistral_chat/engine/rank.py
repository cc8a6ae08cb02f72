"""The first lines of every rank that this package starts, before anything heavy is imported.

    python -P .../engine/rank.py launcher|program PARENT MODULE ARGUMENTS

Run as a file, so that neither the current folder nor another installation can stand in the place
of this package: it is the one that the parent runs, wherever that came from.
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
        parent: what this process is, a launcher or any program that uses an `LLM`.
        module: whose `main` the rank runs.
        arguments: in `sys.argv`, after the program's name.
    """
    return [sys.executable, "-P", __file__, parent, str(os.getpid()), module, *arguments]


def _import_package() -> None:
    """Have `mistral_chat` be the package that this file belongs to."""
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
