"""Records the README's picture: `record docs/session.svg` (make recording).

A real shell in a pseudo-terminal runs the real command on the embedded model; what an emulated
screen shows of it becomes an animated SVG. Only pauses are shortened. Nothing is drawn by hand.
"""

import getpass
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html import escape
from itertools import groupby, pairwise
from pathlib import Path

import pyte

from tests.conftest import command_env
from tests.terminal import Terminal

COLUMNS, ROWS = 96, 29
COMMAND = "mistral-chat demo --temperature 0"
SHOWN_EVERY_S = 0.25
LONGEST_PAUSE_S = 1.2
LAST_S = 4.0
MOST_BYTES = 200_000
CELL, LINE, SIZE, MARGIN = 8.0, 17, 13, 14  # pixels
PAPER, INK = "#1d2128", "#d5dae1"
# pyte's names of the 16 colours, as this picture shows them on dark paper.
COLOURS = {"black": "#495162", "red": "#e06c75", "green": "#98c379", "brown": "#d7ba7d",
           "blue": "#61afef", "magenta": "#c792ea", "cyan": "#56b6c2", "white": INK,
           "brightblack": "#8b949e"}  # fmt: skip

Row = tuple[pyte.screens.Char, ...]


@dataclass(frozen=True)
class Frame:
    """What was seen from one moment on."""

    at_s: float
    rows: tuple[Row, ...]
    cursor: tuple[int, int]


@dataclass
class Recorder:
    """Watches a terminal's screen."""

    terminal: Terminal
    frames: list[Frame] = field(default_factory=list)

    def watch(self, until: Callable[[], bool], timeout_s: float = 120) -> None:
        """Keep a frame now and then, until something is so."""
        end = time.monotonic() + timeout_s
        while not until():
            if time.monotonic() > end:
                raise TimeoutError(self.terminal.text)
            self.terminal.read(0.02)
            if not self.frames or time.monotonic() - self.frames[-1].at_s >= SHOWN_EVERY_S:
                self.keep()
        self.keep()

    def wait(self, seconds: float) -> None:
        """Watch for so long."""
        end = time.monotonic() + seconds
        self.watch(lambda: time.monotonic() >= end)

    def keep(self) -> None:
        """Keep a frame, if anything has changed."""
        screen = self.terminal.screen
        rows = tuple(
            tuple(screen.buffer[y][x] for x in range(screen.columns)) for y in range(screen.lines)
        )
        frame = Frame(time.monotonic(), rows, (screen.cursor.x, screen.cursor.y))
        last = self.frames[-1] if self.frames else None
        if last is None or (last.rows, last.cursor) != (frame.rows, frame.cursor):
            self.frames.append(frame)

    def type(self, text: str, end: str = "\r") -> None:
        """Type as a person does, more or less."""
        for piece in re.findall(r".{1,6}", text):
            self.terminal.child.send(piece)
            self.wait(0.12)
        self.wait(0.5)
        self.terminal.child.send(end)

    def wait_for(self, text: str) -> None:
        """Until a text is seen anew."""
        n = self.terminal.text.count(text)
        self.watch(lambda: self.terminal.text.count(text) > n)

    def wait_for_prompt(self) -> None:
        """Until the chat has taken what was typed, and can be typed at again."""
        raw = self.terminal
        n = raw.raw.count(b"\x1b[?2004h")
        self.watch(lambda: raw.raw.count(b"\x1b[?2004h") > n)
        self.wait(1.0)


class _GreyForDim(pyte.HistoryScreen):
    """A screen that shows faint letters in grey: the emulator knows no faintness."""

    def select_graphic_rendition(self, *codes: int, **kwargs: bool) -> None:
        super().select_graphic_rendition(*(90 if code == 2 else code for code in codes), **kwargs)


def record() -> list[Frame]:
    """Run the session; its frames."""
    with tempfile.TemporaryDirectory() as home:
        env = command_env(
            TERM="xterm-256color", PS1="$ ", XDG_DATA_HOME=home,
            PYTHONWARNINGS="ignore", PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin",
        )  # fmt: skip
        shell = ["bash", "--norc", "--noprofile"]
        terminal = Terminal(shell, (COLUMNS, ROWS), env)
        terminal.screen = _GreyForDim(COLUMNS, ROWS, history=10_000)
        # The prompt asks where the cursor is, and shows its bottom line when it is told.
        terminal.screen.write_process_input = terminal.child.send
        terminal.stream = pyte.ByteStream(terminal.screen)
        film = Recorder(terminal)
        film.watch(lambda: "$" in terminal.text)
        film.type(COMMAND)
        film.wait_for_prompt()
        film.type("Write a Python function that reverses a string, with a short example.")
        film.wait_for_prompt()
        film.type("Write a long story about a river.")
        film.wait_for("The river")
        film.wait(3)
        terminal.child.send("\x03")
        film.wait_for_prompt()
        for line in ("/undo", "What is the capital of France?", "/tokens"):
            film.type(line)
            film.wait_for_prompt()
        terminal.child.send("\x04")
        film.watch(lambda: terminal.rows[-1].strip() == "$")
        terminal.child.close(force=True)
    return film.frames


def draw(frames: list[Frame]) -> str:
    """An SVG that plays frames, with pauses cut."""
    begins = [0.0]
    for before, frame in pairwise(frames):
        begins.append(begins[-1] + min(frame.at_s - before.at_s, LONGEST_PAUSE_S))
    total_s = begins[-1] + LAST_S
    ids: dict[Row, str] = {}
    pictures, moments = [], []
    block = f'width="{CELL:g}" height="{LINE - 2}"'
    for n, frame in enumerate(frames):
        uses = []
        for y, row in enumerate(frame.rows):
            if any(cell.data.strip() or cell.reverse for cell in row):
                name = ids.setdefault(row, f"r{len(ids)}")
                uses.append(f'<use href="#{name}" y="{y * LINE}"/>')
        x, y = frame.cursor
        uses.append(f'<rect class="c" x="{x * CELL:g}" y="{y * LINE}" {block}/>')
        pictures.append(f'<g class="f f{n}">{"".join(uses)}</g>')
        start = 100 * begins[n] / total_s
        end = 100 * (begins[n + 1] if n + 1 < len(frames) else total_s) / total_s
        hidden = "0%{visibility:hidden}" if n else ""
        after = f"{end:.2f}%{{visibility:hidden}}" if n + 1 < len(frames) else ""
        moments.append(
            f"@keyframes f{n}{{{hidden}{start:.2f}%{{visibility:visible}}{after}}}"
            f".f{n}{{animation-name:f{n}}}"
        )
    width, height = COLUMNS * CELL + 2 * MARGIN, ROWS * LINE + 2 * MARGIN
    styles, played = "\n".join(moments), "\n".join(pictures)
    rows = "".join(f'<g id="{name}">{"".join(_draw_row(row))}</g>' for row, name in ids.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height}" '
        f'width="{width:g}" height="{height}" role="img" '
        f'aria-label="A chat with mistral-chat in a terminal">\n'
        f"<style>text{{font:{SIZE}px ui-monospace,SFMono-Regular,Menlo,Consolas,"
        f"'DejaVu Sans Mono',monospace;fill:{INK};white-space:pre}}"
        f".b{{font-weight:bold}}.i{{font-style:italic}}.u{{text-decoration:underline}}"
        f".c{{fill:{INK};opacity:.5}}"
        f".f{{visibility:hidden;animation:{total_s:.1f}s step-end infinite}}"
        f".f{len(frames) - 1}{{visibility:visible}}\n"
        f"{styles}\n"
        f"@media (prefers-reduced-motion:reduce){{.f{{animation:none}}}}</style>\n"
        f"<defs>{rows}</defs>\n"
        f'<rect width="100%" height="100%" rx="8" fill="{PAPER}"/>\n'
        f'<g transform="translate({MARGIN} {MARGIN})">\n{played}\n</g>\n</svg>\n'
    )


def _draw_row(row: Row) -> Iterator[str]:
    """Each run of letters of one style, held to the cells that it stood in."""
    at = 0
    for style, cells in groupby(row, key=lambda cell: cell._replace(data="")):
        run = list(cells)
        start, at = at, at + len(run)
        text = "".join(cell.data for cell in run)
        ink, paper = COLOURS.get(style.fg, INK), COLOURS.get(style.bg, PAPER)
        if style.reverse:
            ink, paper = paper, ink
        if paper != PAPER:
            yield (
                f'<rect x="{start * CELL:g}" width="{len(run) * CELL:g}" height="{LINE}" '
                f'fill="{paper}"/>'
            )
        for word in re.finditer(r"\S+(?: \S+)*", text):
            kinds = [
                name
                for name, has in zip(
                    "biu", (style.bold, style.italics, style.underscore), strict=True
                )
                if has
            ]
            look = f' class="{" ".join(kinds)}"' if kinds else ""
            look += f' style="fill:{ink}"' if ink != INK else ""
            n_cells = len(word[0])
            yield (
                f'<text x="{(start + word.start()) * CELL:g}" y="{LINE - 4}" '
                f'textLength="{n_cells * CELL:g}"{look}>{escape(word[0], quote=False)}</text>'
            )


def main(path: str) -> None:
    """Record, check, write."""
    picture = draw(record())
    shown = re.sub(r"<[^>]*>", "\n", picture)
    places = ("/home", "/root", "/tmp", "/usr", str(Path.cwd()), "site-packages")
    for private in (*places, socket.gethostname(), getpass.getuser(), "Traceback", "error"):
        if private in shown:
            raise SystemExit(f"{private!r} is in the picture: expected nothing of this machine")
    if len(picture.encode()) > MOST_BYTES:
        raise SystemExit(f"{len(picture.encode())} bytes: expected at most {MOST_BYTES}")
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text(picture, encoding="utf-8")
    print(f"{path}: {len(picture.encode()):,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
