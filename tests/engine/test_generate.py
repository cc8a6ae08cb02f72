"""The interface of mistral-inference: its dense models' tests in our words, and what it promises.

The two batches of `test_generate_scores_*` and their settings are those of the tests of
mistral-inference (tests/test_generate.py), whose users' scripts must go on to work.
"""

import inspect
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral_chat.config import SamplingParams
from mistral_chat.engine.engine import Engine, Prefill, Request
from mistral_chat.engine.ranks.group import Group, Place
from mistral_chat.engine.runner import Runner
from mistral_chat.errors import CheckpointError
from mistral_chat.generate import generate
from mistral_chat.model.operations import Span
from mistral_chat.transformer import Transformer, TransformerArgs
from tests.conftest import TINY

# Prompts run anew in one go differ from step by step by float32 noise alone: 5e-4 is
# mistral-inference's own bound, for logits near 10 of a model of this size.
SAME_LOGPROBS = 5e-4
BOS = 1


def mistral_args(**changes: Any) -> TransformerArgs:
    return TransformerArgs(
        dim=512,
        n_layers=1,
        head_dim=128,
        hidden_dim=2048,
        n_heads=4,
        n_kv_heads=2,
        norm_eps=1e-5,
        vocab_size=32_000,
        max_batch_size=4,
        **changes,
    )


SMALL = TransformerArgs(
    dim=32,
    n_layers=2,
    head_dim=12,
    hidden_dim=48,
    n_heads=4,
    n_kv_heads=2,
    norm_eps=1e-5,
    vocab_size=131,
    max_batch_size=4,
)


def small_model(args: TransformerArgs = SMALL) -> Transformer:
    torch.manual_seed(0)
    return Transformer(args)


def draw_prompts(*lengths: int, seed: int = 0, vocab_size: int = 131) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(n)] for n in lengths]


def joined(prompts: Sequence[list[int]], tokens: Sequence[list[int]]) -> list[list[int]]:
    return [p + t for p, t in zip(prompts, tokens, strict=True)]


def assert_same_logprobs(got: list[list[float]], wanted: list[list[float]], within: float) -> None:
    assert [len(row) for row in got] == [len(row) for row in wanted]
    for row, other in zip(got, wanted, strict=True):
        assert row == pytest.approx(other, abs=within)


@pytest.mark.parametrize("window", [None, 4])
def test_generate_scores_what_it_wrote_as_when_it_wrote_it(window: int | None) -> None:
    torch.manual_seed(42)
    model = Transformer(mistral_args(sliding_window=window)).to("cpu", dtype=torch.float32)
    prompts = [[BOS, 5, 6, 7, 8, 9, 10, 11], [BOS, 4, 5, 6], [BOS, 16, 17, 18], [BOS, 6, 8, 38]]
    tokens, logprobs = generate(prompts, model, temperature=0.0, max_tokens=7)
    assert [len(row) for row in tokens] == [7] * 4
    again, rescored = generate(joined(prompts, tokens), model, temperature=0.0, max_tokens=0)
    assert again == []
    assert_same_logprobs(rescored, logprobs, SAME_LOGPROBS)


def test_generate_scores_the_same_in_chunks() -> None:
    torch.manual_seed(42)
    model = Transformer(mistral_args(max_seq_len=64)).to("cpu", dtype=torch.float32)
    prompts = draw_prompts(7, 9, vocab_size=32_000)
    tokens, logprobs = generate(prompts, model, temperature=0.0, max_tokens=8)
    again, rescored = generate(
        joined(prompts, tokens), model, temperature=0.0, max_tokens=0, chunk_size=5
    )
    assert again == []
    assert_same_logprobs(rescored, logprobs, SAME_LOGPROBS)


def test_generate_keeps_mistral_inferences_signature() -> None:
    parameters = inspect.signature(generate).parameters
    kinds = [(name, p.kind.name, p.default) for name, p in parameters.items()]
    none = inspect.Parameter.empty
    assert kinds == [
        ("encoded_prompts", "POSITIONAL_OR_KEYWORD", none),
        ("model", "POSITIONAL_OR_KEYWORD", none),
        ("max_tokens", "KEYWORD_ONLY", none),
        ("temperature", "KEYWORD_ONLY", none),
        ("chunk_size", "KEYWORD_ONLY", None),
        ("eos_id", "KEYWORD_ONLY", None),
    ]


def test_from_folder_keeps_mistral_inferences_signature() -> None:
    parameters = inspect.signature(Transformer.from_folder).parameters
    none = inspect.Parameter.empty
    assert [(name, p.default) for name, p in parameters.items()] == [
        ("folder", none),
        ("max_batch_size", 1),
        ("device", None),
        ("dtype", None),
    ]


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5, 100])
def test_generate_is_the_model_run_anew(chunk_size: int | None) -> None:
    model = small_model()
    prompts = draw_prompts(3, 11, 1, 6)
    tokens, logprobs = generate(prompts, model, max_tokens=5, temperature=0, chunk_size=chunk_size)
    runner = Runner(model, Group(Place()), max_batch_size=1, max_seq_len=32, chunk_size=32)
    for prompt, said, scores in zip(prompts, tokens, logprobs, strict=True):
        whole = prompt + said
        logits = model(torch.tensor(whole), [Span(0, 0, len(whole))], runner.cache, "all")
        assert logits is not None
        assert said == logits.argmax(-1).tolist()[len(prompt) - 1 : -1]
        rows = torch.log_softmax(logits.double(), -1)
        wanted = [float(row[i]) for row, i in zip(rows, whole[1:], strict=False)]
        assert scores == pytest.approx(wanted, abs=1e-4)  # float32 noise of logits near 5


def test_generate_of_a_batch_is_generate_of_each_alone() -> None:
    model = small_model()
    prompts = draw_prompts(3, 11, 1, 6)
    tokens, logprobs = generate(prompts, model, max_tokens=6, temperature=0)
    for n, prompt in enumerate(prompts):
        alone, scores = generate([prompt], model, max_tokens=6, temperature=0)
        assert alone == [tokens[n]]
        assert_same_logprobs(scores, [logprobs[n]], 1e-4)  # as above


def test_generate_scores_prompts_as_the_engine_does() -> None:
    model = small_model()
    (prompt,) = draw_prompts(12)
    engine = Engine(Runner(model, Group(Place()), max_batch_size=1, max_seq_len=32, chunk_size=5))
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=True)
    events = list(engine.generate(Request(ids=prompt, params=params)))
    scores = [e.logprobs for e in events if isinstance(e, Prefill)][-1]
    _, logprobs = generate([prompt], model, max_tokens=0, temperature=0)
    assert_same_logprobs([list(scores)], logprobs, 1e-4)  # chunks add in another order


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_generate_gives_equally_many_tokens_to_all(max_tokens: int) -> None:
    prompts = draw_prompts(3, 9, 1)
    tokens, logprobs = generate(prompts, small_model(), max_tokens=max_tokens, temperature=0.0)
    assert tokens == [] if max_tokens == 0 else [len(row) for row in tokens] == [max_tokens] * 3
    assert [len(row) for row in logprobs] == [n - 1 + max_tokens for n in (3, 9, 1)]


def test_generate_of_one_prompt_ends_before_its_end_token() -> None:
    model, prompts = small_model(), draw_prompts(5)
    (said,), (scores,) = generate(prompts, model, max_tokens=12, temperature=0)
    eos = next(i for n, i in enumerate(said) if n >= 3 and i not in said[:n])
    at = said.index(eos)
    tokens, logprobs = generate(prompts, model, max_tokens=12, temperature=0, eos_id=eos)
    assert tokens == [said[:at]]
    assert_same_logprobs(logprobs, [scores[: 4 + at]], 1e-6)  # the same steps


def test_generate_that_ends_at_once_gives_the_empty_list() -> None:
    model, prompts = small_model(), draw_prompts(5)
    ((eos,),), _ = generate(prompts, model, max_tokens=1, temperature=0)
    tokens, logprobs = generate(prompts, model, max_tokens=12, temperature=0, eos_id=eos)
    assert tokens == []
    assert [len(row) for row in logprobs] == [4]


def test_generate_of_a_batch_ends_when_all_have_chosen_the_end_token() -> None:
    model, prompts = small_model(), draw_prompts(4, 4)
    long, _ = generate(prompts, model, max_tokens=40, temperature=0)
    first_at = {i: [row.index(i) for row in long if i in row] for row in long for i in row}
    eos, places = next(
        (i, at) for i, at in first_at.items() if len(at) == 2 and at[0] != at[1] and min(at) > 0
    )
    tokens, logprobs = generate(prompts, model, max_tokens=40, temperature=0, eos_id=eos)
    # one goes on past its end token until the other has chosen it too
    assert tokens == [row[: max(places)] for row in long]
    assert [len(row) for row in logprobs] == [3 + max(places)] * 2
    assert sum(eos in row for row in tokens) == 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_generate_repeats_itself_under_torchs_seed(seed: int) -> None:
    model, prompts = small_model(), draw_prompts(4, 7)

    def draw(seed: int) -> tuple[list[list[int]], list[list[float]]]:
        torch.manual_seed(seed)
        return generate(prompts, model, max_tokens=12, temperature=1.5)

    assert draw(seed) == draw(seed)
    assert draw(seed)[0] != draw(seed + 1)[0]


def test_generate_draws_anew_without_a_seed() -> None:
    model, prompts = small_model(), draw_prompts(4)
    torch.manual_seed(0)
    both = [generate(prompts, model, max_tokens=12, temperature=2.0)[0] for _ in range(2)]
    assert both[0] != both[1]


def test_generate_samples_from_the_likely_four_fifths() -> None:
    model = small_model(replace(SMALL, max_batch_size=200))
    (prompt,) = draw_prompts(4)
    torch.manual_seed(0)
    tokens, logprobs = generate([prompt] * 200, model, max_tokens=1, temperature=1.0)
    chosen = {row[0]: math.exp(scores[-1]) for row, scores in zip(tokens, logprobs, strict=True)}
    runner = Runner(model, Group(Place()), max_batch_size=1, max_seq_len=8, chunk_size=8)
    logits = model(torch.tensor(prompt), [Span(0, 0, 4)], runner.cache, "last")
    assert logits is not None
    probs, ids = torch.softmax(logits[0].double(), -1).sort(descending=True)
    n_kept = int((probs.cumsum(0) < 0.8).sum()) + 1  # mistral-inference samples with top_p 0.8
    assert set(chosen) <= set(ids[:n_kept].tolist())
    assert len(chosen) > n_kept // 3
    for i, probability in chosen.items():
        # log-probabilities are of the model's own distribution, before top_p
        assert probability == pytest.approx(float(probs[ids == i]), rel=1e-3)


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        ([], "0 prompts"),
        ([[1]] * 5, r"5 prompts: expected 1 to max_batch_size \(4\)"),
        ([[]], "an empty prompt"),
        ([[1, 2], [], [3]], "an empty prompt"),
    ],
)
def test_generate_refuses_prompts_that_it_cannot_run(prompts: list[list[int]], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        generate(prompts, small_model(), max_tokens=2, temperature=0)


@pytest.mark.parametrize("bad", [131, -1])
def test_generate_refuses_ids_that_the_model_does_not_have(bad: int) -> None:
    with pytest.raises(ValueError, match=str(bad)):
        generate([[1, bad]], small_model(), max_tokens=2, temperature=0)


def test_generate_refuses_a_negative_number_of_tokens() -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        generate([[1, 2]], small_model(), max_tokens=-1, temperature=0)


def test_generate_computes_no_gradients() -> None:
    model = small_model()
    assert not any(p.requires_grad for p in model.parameters())


def test_transformer_is_random_as_torchs_seed_says() -> None:
    torch.manual_seed(1)
    first = Transformer(SMALL).tok_embeddings
    other = Transformer(SMALL).tok_embeddings
    torch.manual_seed(1)
    assert torch.equal(Transformer(SMALL).tok_embeddings, first)
    assert not torch.equal(first, other)
    assert bool(first.isfinite().all())


def test_transformer_moves_to_another_type() -> None:
    model = small_model(replace(SMALL, tied_embeddings=True)).to("cpu", dtype=torch.bfloat16)
    assert isinstance(model, Transformer)
    assert model.dtype == torch.bfloat16
    tokens, logprobs = generate([[1, 2, 3]], model, max_tokens=3, temperature=0)
    assert len(tokens[0]) == 3
    assert all(map(math.isfinite, logprobs[0]))


@pytest.mark.parametrize("as_text", [False, True])
def test_from_folder_loads_what_the_folder_holds(tiny_folder: Path, as_text: bool) -> None:
    folder = str(tiny_folder) if as_text else tiny_folder
    model = Transformer.from_folder(folder, max_batch_size=3, device="cpu")
    assert model.args == replace(TINY, max_batch_size=3)
    assert model.dtype == torch.float32  # of weights on CPU
    tokens, _ = generate(draw_prompts(4, 2, 9), model, max_tokens=2, temperature=0)
    assert [len(row) for row in tokens] == [2] * 3


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_folder_takes_torchs_devices_and_types(
    tiny_folder: Path, device: str | torch.device, dtype: torch.dtype
) -> None:
    model = Transformer.from_folder(tiny_folder, device=device, dtype=dtype)
    assert model.dtype == dtype
    assert model.device == torch.device("cpu")
    assert model.args.max_batch_size == 1


def test_from_folder_says_what_is_wrong_with_the_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"params.json is missing"):
        Transformer.from_folder(tmp_path)
