"""How well a model predicts a text, and how far it is from another run of the same model.

Perplexity of windows of the text, each on its own; beside the log-probabilities that an earlier run
wrote (the same model unquantized, say) the Kullback-Leibler divergence and how often both find the
same token most likely. Prints nothing.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mistral_chat.engine.runner import Runner
from mistral_chat.engine.step import Chunk, Step
from mistral_chat.errors import OutputError, PromptError

__all__ = ["LEAST_TOKENS", "measure_quality", "read_reference", "windows_of"]

LEAST_TOKENS = 16  # of a text, so that a mean says something
MOST_TOKENS = 16_384  # of a text: 4 GB of log-probabilities for a vocabulary of 131,072
CHUNK = 512  # tokens scored at once: a quarter of a GB for the same vocabulary
P99 = 0.99


def windows_of(ids: list[int], length: int) -> list[list[int]]:
    """A text's first ids in windows, each behind the token that begins a text.

    Args:
        ids: of the whole text, as `Tokenizer.encode` gives them.
        length: most tokens of a window.

    Raises:
        PromptError: the text is too short to say anything.
    """
    bos, *ids = ids[: MOST_TOKENS + 1]
    if len(ids) < LEAST_TOKENS:
        raise PromptError(
            f"--quality: the text has {len(ids)} tokens: expected at least {LEAST_TOKENS}"
        )
    windows = [[bos, *ids[at : at + length - 1]] for at in range(0, len(ids), length - 1)]
    return windows if len(windows[-1]) > 1 else windows[:-1]


def _scored(runner: Runner, window: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Log-probabilities after each token of a window but the last.

    Yields:
        the first token's place, and (tokens, vocabulary) float32.
    """
    each = min(CHUNK, runner.chunk_size)
    for at in range(0, len(window) - 1, each):
        tokens = tuple(window[at : min(at + each, len(window) - 1)])
        logits = runner.run(Step((Chunk(0, at, tokens),), "all"))
        assert logits is not None
        yield at, logits.log_softmax(-1)


def measure_quality(
    runner: Runner,
    windows: list[list[int]],
    written: Path | None,
    reference: Iterator[Tensor] | None,
) -> dict[str, Any]:
    """Run the windows on all ranks, from rank 0.

    Args:
        runner: of the model; its cache holds a window.
        windows: `windows_of` a text.
        written: file for the log-probabilities (float16), for a later run to compare with.
        reference: `read_reference` of such a file.

    Returns:
        `tokens` that were predicted and their `perplexity`; with a reference also
        `reference_perplexity`, the mean divergence `kl` of this run from that one in nats a token,
        its 99th percentile `kl_p99`, and the share `same_top` of equal most likely tokens.

    Raises:
        OutputError: `written` cannot be written.
    """
    kept: dict[str, Tensor] = {}
    losses: list[Tensor] = []
    theirs: list[Tensor] = []
    divergences: list[Tensor] = []
    same: list[Tensor] = []
    for number, window in enumerate(windows):
        parts = []
        wanted = None if reference is None else next(reference)
        for at, scored in _scored(runner, window):
            n = len(scored)
            following = torch.tensor(window[at + 1 : at + 1 + n], device=scored.device)[:, None]
            losses.append(-scored.gather(1, following).flatten().cpu())
            if wanted is not None:
                other = wanted[at : at + n].to(scored.device, torch.float32).log_softmax(-1)
                theirs.append(-other.gather(1, following).flatten().cpu())
                terms = torch.where(other > -math.inf, other.exp() * (other - scored), 0.0)
                divergences.append(terms.sum(-1).cpu())
                same.append((other.argmax(-1) == scored.argmax(-1)).cpu())
            if written is not None:
                parts.append(scored.half().cpu())
        if parts:
            kept[f"window_{number}"] = torch.cat(parts)
            kept[f"ids_{number}"] = torch.tensor(window)
    if written is not None:
        try:
            save_file(kept, written)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"--write_logprobs {written}: {error}") from error
    loss = torch.cat(losses).double()
    result = {"tokens": len(loss), "windows": len(windows), "perplexity": loss.mean().exp().item()}
    if reference is not None:
        divergence = torch.cat(divergences).double()
        result |= {
            "reference_perplexity": torch.cat(theirs).double().mean().exp().item(),
            "kl": divergence.mean().item(),
            "kl_p99": divergence.quantile(P99).item(),
            "same_top": torch.cat(same).double().mean().item(),
        }
    return result


def read_reference(path: Path, windows: list[list[int]], vocab_size: int) -> Iterator[Tensor]:
    """What an earlier run wrote, once it is known to be of the same text: a window at a time.

    Raises:
        PromptError: it is of another text, window or vocabulary, or cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            wanted = {f"{kind}_{n}" for n in range(len(windows)) for kind in ("ids", "window")}
            is_same = set(file.keys()) == wanted and all(
                file.get_tensor(f"ids_{n}").tolist() == window
                and file.get_slice(f"window_{n}").get_shape() == [len(window) - 1, vocab_size]
                for n, window in enumerate(windows)
            )
    except (OSError, SafetensorError) as error:
        raise PromptError(f"--against {path} cannot be read: {error}") from error
    if not is_same:
        raise PromptError(
            f"--against {path} is of another text, window or vocabulary: expected what "
            f"--write_logprobs wrote with the same --quality and --window"
        )
    return _each(path, len(windows))


def _each(path: Path, n_windows: int) -> Iterator[Tensor]:
    with safe_open(path, "pt") as file:
        for n in range(n_windows):
            yield file.get_tensor(f"window_{n}")
