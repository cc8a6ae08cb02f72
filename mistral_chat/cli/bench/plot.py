"""`mistral-chat bench --plot`: its figures as a picture, drawn by matplotlib."""

from pathlib import Path
from typing import Any

from mistral_chat.errors import UsageError

__all__ = ["check", "draw"]

SUFFIXES = (".svg", ".png", ".pdf")


def check(path: str) -> None:
    """Refuse a picture that could not be drawn, before anything is measured.

    Raises:
        UsageError: matplotlib is missing, the folder does not exist, or the suffix is unknown.
    """
    if Path(path).suffix not in SUFFIXES:
        raise UsageError(f"--plot is {path!r}: expected a file name in {', '.join(SUFFIXES)}")
    if not Path(path).absolute().parent.is_dir():
        raise UsageError(f"--plot is {path!r}: there is no such folder")
    try:
        import matplotlib  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except ImportError as error:
        raise UsageError("--plot needs matplotlib: pip install 'mistral-chat[plot]'") from error


def draw(result: dict[str, Any], path: str) -> None:
    """Decode time over context for each batch with its floor, and time to first token.

    Args:
        result: what `bench --json` prints.
        path: of the picture; its suffix gives the format.
    """
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

    from mistral_chat.cli.bench.tables import build_of

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    figure.suptitle(
        f"{result['device']}, {result['world_size']} rank(s), {result['dtype']}, "
        f"torch {result['torch']}, {build_of(result)}"
    )
    decode, first = figure.subplots(1, 2)
    for batch in sorted({row["batch"] for row in result["decode"]}):
        rows = [row for row in result["decode"] if row["batch"] == batch]
        contexts = [row["context"] for row in rows]
        (line,) = decode.plot(
            contexts, [row["ms_per_token"] for row in rows], "o-", label=f"{batch} sequence(s)"
        )
        floor = [row["bytes_per_step"] / result["read_gb_per_s"] / 1e6 for row in rows]
        decode.plot(contexts, floor, "--", color=line.get_color(), linewidth=1)
    decode.set(
        title="decode (dashed: bytes over the read ceiling)", xlabel="context", ylabel="ms a step",
        xscale="log", ylim=(0, None),
    )  # fmt: skip
    decode.legend()
    prompts = [row["prompt"] for row in result["first_token"]]
    first.plot(prompts, [1e3 * row["first_token_s"] for row in result["first_token"]], "o-")
    first.set(title="time to first token", xlabel="prompt", ylabel="ms", xscale="log", yscale="log")
    figure.savefig(path)
