"""The model against a plain float64 one, and the laws that let steps be cut up at will."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mistral_chat.kernels import reference
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.cache import KVCache, kv_bytes_per_token
from mistral_chat.model.operations import Alone, ManyRows, Span
from mistral_chat.model.rope import QueryScaling, Yarn
from mistral_chat.model.sharding import Shard
from mistral_chat.model.transformer import Transformer, TransformerBlock
from tests.conftest import random_weights

# 9 heads in 3 groups, head_dim that is not dim / n_heads, a prime vocabulary.
ODD = TransformerArgs(
    dim=40,
    n_layers=3,
    head_dim=6,
    hidden_dim=44,
    n_heads=9,
    n_kv_heads=3,
    norm_eps=1e-5,
    vocab_size=131,
    rope_theta=1e4,
)
SHAPES = {
    "odd": ODD,
    "tied": replace(ODD, tied_embeddings=True),
    "one query a KV head": replace(ODD, n_heads=4, n_kv_heads=4, head_dim=10),
    "one KV head": replace(ODD, n_heads=5, n_kv_heads=1, head_dim=2),
    "default theta": replace(ODD, rope_theta=None, n_layers=1),
    "window": replace(ODD, sliding_window=5),
    "windows by layer": replace(ODD, sliding_window=[4, None, 7]),
    "windows repeated": replace(ODD, n_layers=4, sliding_window=[None, 3]),
    # of 5 pairs one is fast, three are between, one is slow
    "yarn": replace(
        ODD,
        head_dim=10,
        yarn=Yarn(factor=8, original_max_position_embeddings=64, beta_fast=8, magnitude=1.2),
        llama_4_scaling=QueryScaling(beta=0.3, original_max_position_embeddings=4),
    ),
}
by_shape = pytest.mark.parametrize("args", SHAPES.values(), ids=SHAPES)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    """Equal up to the order of additions.

    Logits are at most about 5, or 40 where embeddings are tied; float32 sums of 40 products through
    3 layers are right to some 1e-6 of that.
    """
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def make_model(args: TransformerArgs, shard: Shard | None = None) -> Transformer:
    model = Transformer(args, shard, Alone())
    fill(model)
    return model


def fill(model: Transformer) -> None:
    """The shard's slices of `random_weights`, by plain indexing."""
    weights = random_weights(model.args)
    for name, placement in model.placements().items():
        rows = weights[name][placement.rows.start : placement.rows.stop]
        if placement.cols is not None:
            rows = rows[:, placement.cols.start : placement.cols.stop]
        model.destination(placement).copy_(rows)


def make_cache(model: Transformer, n_slots: int = 1, max_seq_len: int = 32) -> KVCache:
    cache = KVCache(model.shard, n_slots, max_seq_len, model.dtype, model.device)
    cache.k.fill_(torch.nan)  # whoever reads what was not written gives itself away
    cache.v.fill_(torch.nan)
    return cache


def draw_tokens(n: int, args: TransformerArgs = ODD, seed: int = 0) -> Tensor:
    return torch.randint(args.vocab_size, (n,), generator=torch.Generator().manual_seed(seed))


def run_whole(model: Transformer, tokens: Tensor) -> Tensor:
    logits = model(tokens, [Span(0, 0, len(tokens))], make_cache(model), "all")
    assert isinstance(logits, Tensor)
    return logits


def logits_by_hand(args: TransformerArgs, tokens: Tensor) -> Tensor:
    """The whole model from its definition, in float64: no cache, a mask, one head at a time."""
    w = {name: tensor.double() for name, tensor in random_weights(args).items()}
    length, d = len(tokens), args.head_dim
    position = torch.arange(length)
    theta = args.rope_theta or 1e6
    frequency = theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    growth, magnitude = torch.ones(length, dtype=torch.float64), 1.0
    if yarn := args.yarn:
        magnitude = yarn.magnitude
        low, high = (
            rounded(d * math.log(yarn.original_max_position_embeddings / (2 * math.pi * turns))
                    / (2 * math.log(theta)))
            for rounded, turns in ((math.floor, yarn.beta_fast), (math.ceil, yarn.beta_slow))
        )  # fmt: skip
        assert 0 <= low < high < d
        slow = ((torch.arange(d // 2).double() - low) / (high - low)).clamp(0, 1)
        frequency = slow * frequency / yarn.factor + (1 - slow) * frequency
    if scaling := args.llama_4_scaling:
        steps = position // scaling.original_max_position_embeddings
        growth = 1 + scaling.beta * torch.log(1 + steps.double())
    cos, sin = (
        magnitude * f(position.double().unsqueeze(1) * frequency) for f in (torch.cos, torch.sin)
    )

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + args.norm_eps).sqrt() * weight

    def turn(head: Tensor) -> Tensor:  # (length, d): pairs of neighbours
        even, odd = head[:, 0::2], head[:, 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(1)

    x = w["tok_embeddings.weight"][tokens]
    for layer, window in enumerate(args.window_by_layer):
        p = f"layers.{layer}."
        h = norm(x, w[p + "attention_norm.weight"])
        q, k, v = (h @ w[f"{p}attention.w{part}.weight"].T for part in "qkv")
        seen = position <= position.unsqueeze(1)
        if window is not None:
            seen &= position > position.unsqueeze(1) - window
        heads = []
        for i in range(args.n_heads):
            kv = i // (args.n_heads // args.n_kv_heads)
            mine, shared = slice(i * d, (i + 1) * d), slice(kv * d, (kv + 1) * d)
            scores = turn(q[:, mine]) * growth[:, None] @ turn(k[:, shared]).T / math.sqrt(d)
            heads.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[:, shared])
        x = x + torch.cat(heads, 1) @ w[p + "attention.wo.weight"].T
        h = norm(x, w[p + "ffn_norm.weight"])
        gate, up = (h @ w[f"{p}feed_forward.w{part}.weight"].T for part in "13")
        x = x + (F.silu(gate) * up) @ w[p + "feed_forward.w2.weight"].T
    output = w["tok_embeddings.weight" if args.tied_embeddings else "output.weight"]
    logits: Tensor = norm(x, w["norm.weight"]) @ output.T
    return logits


@by_shape
@pytest.mark.parametrize("length", [1, 2, 20])
def test_transformer_is_its_definition(args: TransformerArgs, length: int) -> None:
    tokens = draw_tokens(length, args)
    got = run_whole(make_model(args), tokens)
    assert got.dtype == torch.float32
    assert_close(got.double(), logits_by_hand(args, tokens))


@by_shape
def test_a_cache_in_fp8_is_the_same_for_any_cut_and_near_to_floats(args: TransformerArgs) -> None:
    tokens, model = draw_tokens(20, args), make_model(args)
    whole = run_whole(model, tokens)
    runs = []
    for cuts in ([20], [1] * 20, [7, 1, 12]):
        cache = KVCache(model.shard, 2, 32, torch.float8_e4m3fn, model.device)
        parts, at = [], 0
        for n in cuts:
            logits = model(tokens[at : at + n], [Span(1, at, n)], cache, "all")
            assert logits is not None
            parts.append(logits)
            at += n
        runs.append(torch.cat(parts))
    for other in runs[1:]:
        assert_close(other, runs[0])
    # Keys and values are right to a sixteenth or better; logits are about 1, or 6 where tied.
    apart = (runs[0] - whole).abs()
    assert 0 < apart.mean() < 0.03 * whole.abs().max()


def test_a_cache_in_fp8_has_the_bytes_that_are_planned() -> None:
    shard = Shard(ODD, 2, 1)
    cache = KVCache(shard, 3, 7, torch.float8_e4m3fn, torch.device("cpu"))
    keys, values = cache.of_layer(0)
    assert keys.scale is not None
    taken = ODD.n_layers * 2 * (keys.data.nbytes + keys.scale.nbytes)
    assert cache.n_bytes == taken == 3 * 7 * kv_bytes_per_token(shard, torch.float8_e4m3fn)
    cache.fill_random()
    assert 0.9 < keys[2].floats(0, 7, torch.float32).std() < 1.1
    assert 0.9 < values[0].floats(0, 7, torch.float32).std() < 1.1


def test_transformer_windows_change_the_answer() -> None:
    tokens = draw_tokens(20)
    plain = run_whole(make_model(ODD), tokens)
    for window, first_changed in ((5, 5), ([7, None, 9], 7)):
        cut = run_whole(make_model(replace(ODD, sliding_window=window)), tokens)
        assert_close(cut[:first_changed], plain[:first_changed])
        assert (cut[first_changed:] - plain[first_changed:]).abs().amax(-1).min() > 1e-2


@by_shape
def test_chunked_prefill_is_whole_prefill_for_every_chunk_size(args: TransformerArgs) -> None:
    model, tokens = make_model(args), draw_tokens(17, args)
    whole = run_whole(model, tokens)
    for size in range(1, 18):
        cache = make_cache(model)
        parts = [
            model(part, [Span(0, i * size, len(part))], cache, "all")
            for i, part in enumerate(tokens.split(size))
        ]
        assert_close(torch.cat(parts), whole)


@by_shape
@pytest.mark.parametrize("start", [0, 1, 6, 15])
def test_rewound_sequence_is_one_that_was_never_there(args: TransformerArgs, start: int) -> None:
    model, tokens = make_model(args), draw_tokens(16, args)
    cache = make_cache(model)
    # another continuation, longer than what comes, is left in the cache past `start`
    other = torch.cat([tokens[:start], draw_tokens(25 - start, args, seed=1)])
    model(other, [Span(0, 0, len(other))], cache, "none")
    again = model(tokens[start:], [Span(0, start, 16 - start)], cache, "all")
    assert_close(again, run_whole(model, tokens)[start:])


@by_shape
def test_sequences_of_one_step_are_what_they_are_alone(args: TransformerArgs) -> None:
    model = make_model(args)
    lengths, starts = (9, 1, 4, 12), (0, 8, 11, 3)  # prefill, decode, more prefill, a long chunk
    sequences = [
        draw_tokens(start + length, args, seed=i)
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    alone = [run_whole(model, s) for s in sequences]
    cache = make_cache(model, n_slots=6)
    slots = (4, 0, 5, 2)
    for tokens, slot, start in zip(sequences, slots, starts, strict=True):
        if start:
            model(tokens[:start], [Span(slot, 0, start)], cache, "none")
    step = torch.cat([s[start:] for s, start in zip(sequences, starts, strict=True)])
    spans = [Span(*place) for place in zip(slots, starts, lengths, strict=True)]
    got = model(step, spans, cache, "all")
    assert got is not None
    for part, whole, start in zip(got.split(lengths), alone, starts, strict=True):
        assert_close(part, whole[start:])


@pytest.mark.parametrize(
    "spans",
    [
        [Span(0, 0, 6)],
        [Span(0, 0, 1)],
        [Span(0, 0, 1), Span(1, 0, 1), Span(2, 0, 1)],
        [Span(1, 0, 2), Span(0, 0, 1), Span(2, 0, 5)],
    ],
)
def test_last_logits_are_those_after_each_span(spans: list[Span]) -> None:
    model = make_model(ODD)
    tokens = draw_tokens(sum(s.length for s in spans))
    everything = model(tokens, spans, make_cache(model, n_slots=3), "all")
    last = model(tokens, spans, make_cache(model, n_slots=3), "last")
    assert everything is not None
    assert last is not None
    ends = [sum(s.length for s in spans[: i + 1]) - 1 for i in range(len(spans))]
    assert last.shape == (len(spans), ODD.vocab_size)
    assert_close(last, everything[ends])
    assert model(tokens, spans, make_cache(model, n_slots=3), "none") is None


def test_no_logits_still_fill_the_cache() -> None:
    model, tokens = make_model(ODD), draw_tokens(9)
    caches = [make_cache(model), make_cache(model)]
    model(tokens, [Span(0, 0, 9)], caches[0], "none")
    model(tokens, [Span(0, 0, 9)], caches[1], "all")
    assert torch.equal(caches[0].k[:, :, :, :9], caches[1].k[:, :, :, :9])
    assert torch.equal(caches[0].v[:, :, :, :9], caches[1].v[:, :, :, :9])
    assert bool(caches[0].k[:, :, :, 9:].isnan().all())


def test_cache_takes_what_memory_planning_says() -> None:
    for rank in range(2):
        shard = Shard(ODD, 2, rank)
        cache = KVCache(shard, 3, 7, torch.bfloat16, torch.device("cpu"))
        taken = cache.k.nbytes + cache.v.nbytes
        assert taken == 3 * 7 * kv_bytes_per_token(shard, torch.bfloat16)


def test_logits_of_low_precision_are_float32_and_near() -> None:
    model = make_model(ODD)
    tokens = draw_tokens(12)
    exact = run_whole(model, tokens)
    rough = run_whole(model.to(torch.bfloat16), tokens)
    assert rough.dtype == torch.float32
    # bfloat16 keeps 8 bits: each layer adds some 2^-8 of values near 1, logits are sums of 40
    assert (rough - exact).abs().max() < 0.3
    assert (rough - exact).abs().max() > 1e-3  # it did run in bfloat16


def shards(args: TransformerArgs, world_size: int) -> list[Transformer]:
    return [make_model(args, Shard(args, world_size, rank)) for rank in range(world_size)]


class Ranks:
    """All ranks of a model in one process, in lockstep: each sum is taken over all of them."""

    def __init__(self, models: Sequence[Transformer], n_slots: int = 1) -> None:
        self.models = models
        self.caches = [make_cache(model, n_slots) for model in models]

    def forward(self, tokens: Tensor, spans: list[Span]) -> Tensor:
        """What `Transformer.forward` does with a collective, from its own modules."""
        args = self.models[0].args
        runs = [ManyRows(spans, cache, Alone()) for cache in self.caches]
        rotations = runs[0].rotations(self.models[0].rope)

        def summed(parts: list[Tensor]) -> Tensor:
            return torch.stack(parts).sum(0)

        x = summed(
            [reference.embed(tokens, m.tok_embeddings, m.shard.vocab.start) for m in self.models]
        )

        def block(model: Transformer, layer: int) -> TransformerBlock:
            found = model.layers[layer]
            assert isinstance(found, TransformerBlock)
            return found

        for n in range(args.n_layers):
            blocks = [block(model, n) for model in self.models]
            h = reference.rms_norm(x, blocks[0].attention_norm, args.norm_eps)
            x = x + summed(
                [each.attention(h, rotations, run) for each, run in zip(blocks, runs, strict=True)]
            )
            h = reference.rms_norm(x, blocks[0].ffn_norm, args.norm_eps)
            x = x + summed([each.feed_forward(h, runs[0]) for each in blocks])
        h = reference.rms_norm(x, self.models[0].norm, args.norm_eps)
        return torch.cat(
            [h @ (m.tok_embeddings if m.output is None else m.output).T for m in self.models], 1
        )


@by_shape
def test_partial_outputs_of_all_ranks_sum_to_the_whole(args: TransformerArgs) -> None:
    tokens = draw_tokens(14, args)
    whole = run_whole(make_model(args), tokens)
    for world_size in range(1, args.n_heads + 1):
        ranks = Ranks(shards(args, world_size))
        first = ranks.forward(tokens[:9], [Span(0, 0, 9)])
        rest = [ranks.forward(tokens[i : i + 1], [Span(0, i, 1)]) for i in range(9, 14)]
        assert_close(torch.cat([first, *rest]), whole)


@pytest.mark.parametrize("world_size", range(2, 10))
def test_init_weights_is_the_same_model_for_any_number_of_ranks(world_size: int) -> None:
    whole = Transformer(ODD)
    whole.init_weights(5)
    for rank in range(world_size):
        shard = Transformer(ODD, Shard(ODD, world_size, rank), Alone())
        shard.init_weights(5)
        for name, placement in shard.placements().items():
            full = whole.destination(whole.placements()[name])
            wanted = full[placement.rows.start : placement.rows.stop]
            if placement.cols is not None:
                wanted = wanted[:, placement.cols.start : placement.cols.stop]
            assert torch.equal(shard.destination(placement), wanted), name


def test_init_weights_follows_its_seed_and_keeps_tensors_apart() -> None:
    models = [Transformer(ODD) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.init_weights(seed)
    first, same, other = (
        {n: m.destination(p) for n, p in m.placements().items() if p.cols is not None}
        for m in models
    )
    for name, tensor in first.items():
        assert torch.equal(tensor, same[name])
        assert not torch.equal(tensor, other[name])
    flat = [tensor.flatten()[:200] / tensor.std() for tensor in first.values()]
    # correlation of 200 independent draws is below 5 / sqrt(200) but for one pair in a million
    for i, a in enumerate(flat):
        for b in flat[:i]:
            assert abs(float((a * b).mean())) < 0.36


def test_init_weights_has_the_scale_that_it_says() -> None:
    model = Transformer(replace(ODD, dim=256, hidden_dim=512, n_layers=1))
    model.init_weights(0)
    for name, placement in model.placements().items():
        tensor = model.destination(placement)
        if placement.cols is None:
            assert torch.equal(tensor, torch.ones_like(tensor))
            continue
        scale = 1 if name.startswith("tok_embeddings") else placement.shape[1] ** -0.5
        # the deviation of at least 4,608 draws is right to 1 in 96 (one sigma)
        assert float(tensor.std()) == pytest.approx(scale, rel=0.05)


@pytest.mark.parametrize("tied", [False, True])
def test_model_made_without_memory_and_filled_later_is_its_definition(tied: bool) -> None:
    args = replace(ODD, tied_embeddings=tied)
    with torch.device("meta"):
        model = Transformer(args)
    # moving a module gives each of its names memory of its own: a tied matrix must have only one
    model = model.to(torch.float32).to_empty(device="cpu")
    fill(model)
    tokens = draw_tokens(8)
    assert_close(run_whole(model, tokens).double(), logits_by_hand(args, tokens))
