"""argparse over the table of flags: values from words, and the text of `--help`.

Knows the table's form and none of its flags. Imports nothing heavy.
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from mistral_chat.errors import UsageError

if TYPE_CHECKING:
    from mistral_chat.cli.flags import Flag

__all__ = ["make_parser"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see mistral-chat --help")


def make_parser(
    groups: Mapping[str, Sequence["Flag"]], prog: str, *, positional: bool
) -> argparse.ArgumentParser:
    """A parser of all flags.

    Args:
        groups: flags by the heading that they stand under.
        prog: the command.
        positional: whether it takes MODEL.
    """
    parser = _Parser(
        prog=prog,
        usage=f"{prog} {'MODEL ' if positional else ''}[PROMPT] [flags]",
        description=(
            "Talk to a Mistral model. Without a prompt, at a terminal: a chat. With a prompt, or "
            "with text on stdin: one answer on stdout."
            if positional
            else "The same on the embedded model, a chat on 2 ranks; --path prints its folder."
        ),
        epilog=(
            "commands: mistral-chat demo talks to a small embedded model, download fetches a "
            "model, inspect says what one is and whether it fits, bench measures, batch answers a "
            "file of prompts; each has its --help. Under torchrun: torchrun --nproc-per-node 8 "
            "--no-python mistral-chat MODEL --instruct. - and _ in flags are the same. Codes: 0 "
            "answered, 1 failed, 2 wrong usage, 130 interrupted."
        ),
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(
            prog, max_help_position=30, width=min(100, shutil.get_terminal_size().columns - 2)
        ),
    )
    if positional:
        where = "a model's folder, or a downloaded repository (owner/name); PROMPT is --prompt"
        parser.add_argument("model", nargs="*", metavar="MODEL", help=where)
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            text = flag.help.replace("%", "%%")
            if flag.convert is None:
                group.add_argument(f"--{flag.name}", action="store_true", help=text)
            else:
                group.add_argument(
                    f"--{flag.name}",
                    type=flag.convert,
                    metavar=flag.metavar,
                    action="append" if flag.repeats else "store",
                    help=text,
                )
    about = parser.add_argument_group("about")
    about.add_argument("--help", "-h", action="store_true", help="this text")
    about.add_argument("--version", action="store_true", help="print the version")
    return parser
