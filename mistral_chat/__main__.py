"""`mistral-chat` and `python -m mistral_chat`: what must be so before anything else is imported."""

import os
import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line; the code to end with."""
    _leave_out_the_current_folder()
    from mistral_chat.engine.ranks import parent

    parent.end_with_launcher()
    try:
        from mistral_chat.cli.main import main as run

        return run()
    except KeyboardInterrupt:  # while that was imported
        return 130


def _leave_out_the_current_folder() -> None:
    """Import nothing more from the folder that `python -m` or a script in it put first.

    This package is found already; a `torch.py` or `json.py` that lies there is not to be run.
    """
    if not sys.flags.safe_path and sys.path and sys.path[0] in ("", os.getcwd()):  # noqa: PTH109
        del sys.path[0]


if __name__ == "__main__":
    sys.exit(main())
