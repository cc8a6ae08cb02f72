"""Ranks that work together through peer memory, as many on one GPU as there are GPUs too few.

`torchrun --nproc-per-node W tests/scripts/peers.py`; rank 0 prints OK at the end.
"""

import os

import torch

os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")

from mistral_chat.config import SamplingParams
from mistral_chat.engine.collectives import PeerCollective
from mistral_chat.engine.decoder import Choosing, Decoder
from mistral_chat.engine.ranks.group import Group
from mistral_chat.engine.ranks.launch import place
from mistral_chat.engine.ranks.shared_memory import share_memory
from mistral_chat.engine.sampling import allowed_words
from mistral_chat.engine.step import Chunk
from mistral_chat.kernels import peer
from mistral_chat.kernels.elementwise import Scaled
from mistral_chat.model.args import TransformerArgs
from mistral_chat.model.cache import KVCache
from mistral_chat.model.operations import Alone, Span
from mistral_chat.model.sharding import Shard
from mistral_chat.model.transformer import Transformer

DIM = 576
ARGS = TransformerArgs(
    dim=DIM, n_layers=3, head_dim=64, hidden_dim=1536, n_heads=9, n_kv_heads=3,
    norm_eps=1e-5, vocab_size=2000,
)  # fmt: skip
N_STEPS = int(os.environ.get("STEPS", "50"))


def draw(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def open_peers(group: Group, widths: tuple[int, ...], device: torch.device) -> PeerCollective:
    addresses = share_memory(group, peer.bytes_needed(DIM, widths), device)
    assert isinstance(addresses, torch.Tensor), addresses
    return PeerCollective(group.rank, DIM, widths, addresses)


def check_sums(collective: PeerCollective, group: Group) -> None:
    """Sums equal those in rank order, bit for bit, whatever shapes follow each other."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for n in range(N_STEPS):
            n_rows = (1, 5, 1, 17, 2)[n % 5]
            parts = [draw(100 * n + r, n_rows, DIM, dtype=dtype) for r in range(group.world_size)]
            residual = draw(100 * n + 77, n_rows, DIM, dtype=dtype)
            gain = 1 + draw(5, DIM, dtype=dtype) / 8
            total = parts[0].float()
            for part in parts[1:]:
                total = total + part.float()
            expected = residual + total.to(dtype)
            normed, found = collective.reduce_add_norm(parts[group.rank], residual, gain, 1e-5)
            assert torch.equal(found, expected), (dtype, n, n_rows)
            reference = torch.nn.functional.rms_norm(expected, (DIM,), gain, 1e-5)
            if isinstance(normed, Scaled):
                size = (normed.squares.sum(1, keepdim=True) / DIM + normed.eps).sqrt()
                normed = (normed.rows / size).to(dtype)
            torch.testing.assert_close(normed, reference, rtol=2e-2, atol=1e-2)


def check_long_run(collective: PeerCollective, group: Group) -> None:
    """Ranks stay equal to the last bit over 1,000 sums, each of what the one before gave."""
    device = torch.cuda.current_device()
    residual = draw(1, 1, DIM, dtype=torch.bfloat16)
    gain = torch.ones(DIM, dtype=torch.bfloat16, device=device)
    mine = draw(2 + group.rank, DIM, dtype=torch.bfloat16)
    for _ in range(1000):
        _, residual = collective.reduce_add_norm((residual * mine).tanh(), residual / 2, gain, 1e-5)
    assert residual.isfinite().all()
    of_rank_0 = residual.cpu().view(torch.uint8)
    with group.collectives() as groups:
        groups.broadcast(of_rank_0)
    assert torch.equal(of_rank_0, residual.cpu().view(torch.uint8))


def check_gather(collective: PeerCollective, group: Group, widths: list[int]) -> None:
    """Columns arrive in rank order, and tokens at every rank."""
    ones = torch.ones(1, DIM, device="cuda")
    for n in range(N_STEPS):
        n_rows = (1, 9, 2)[n % 3]
        parts = [draw(n + 7 * r, n_rows, w, dtype=torch.float32) for r, w in enumerate(widths)]
        whole = collective.gather_columns(parts[group.rank])
        if group.is_leader:
            assert whole is not None
            assert torch.equal(whole, torch.cat(parts, 1)), n
        tokens = torch.full((n_rows,), n if group.is_leader else -1, device="cuda")
        collective.broadcast(tokens)
        assert tokens.tolist() == [n] * n_rows
        collective.reduce_add_norm(ones, None, ones[0], 1e-5)


def check_decoder(group: Group) -> None:
    """Sharded decode equals the whole model's, and ranks' tokens and logits agree."""
    device = torch.device("cuda", torch.cuda.current_device())
    with device:
        whole = Transformer(ARGS)
        mine = Transformer(ARGS, Shard(ARGS, group.world_size, group.rank), Alone())
    whole.init_weights(3)
    mine.init_weights(3)
    widths = tuple(len(mine.shard.vocab_of(r)) for r in range(group.world_size))
    collective = open_peers(group, widths, device)
    cache = KVCache(mine.shard, 2, 256, torch.float32, device)
    decoder = Decoder(
        mine, cache, collective, vocab_size=ARGS.vocab_size, is_leader=group.is_leader
    )
    decoder.warm_up()
    reference = KVCache(whole.shard, 2, 256, torch.float32, device)
    prompt = [5, 900, 77, 1999, 3, 42, 8, 1]
    # a few tokens at once, then one by one
    logits = decoder.score((Chunk(1, 0, tuple(prompt)),))
    span = Span(1, 0, len(prompt))
    expected = whole(torch.tensor(prompt, device=device), [span], reference, "all")
    assert expected is not None
    if group.is_leader:
        assert logits is not None
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    chosen = [int(expected[-1].argmax())]
    for n in range(N_STEPS):
        position = len(prompt) + n
        row = whole(torch.tensor(chosen[-1:], device=device), [Span(1, position, 1)], reference)
        assert row is not None
        chosen.append(int(row[0].argmax()))
    choosing = Choosing(SamplingParams(temperature=0), allowed_words(ARGS.vocab_size, ()))
    decoder.begin((Chunk(1, len(prompt), (chosen[0],)),), [choosing] if group.is_leader else ())
    pending = decoder.advance(N_STEPS, [[0.5]] * N_STEPS if group.is_leader else ())
    if group.is_leader:
        found = [p.wait()[0] for p in pending[-40:]]
        assert found == chosen[1:][-40:], (found, chosen)


def main() -> None:
    torch.cuda.set_device(place().local_rank % torch.cuda.device_count())
    group = Group(place())
    torch.cuda.set_device(place().local_rank % torch.cuda.device_count())
    widths = [1000 + 8 * r for r in range(group.world_size)]
    device = torch.device("cuda", torch.cuda.current_device())
    collective = open_peers(group, tuple(widths), device)
    check_sums(collective, group)
    check_long_run(collective, group)
    check_gather(collective, group, widths)
    check_decoder(group)
    torch.cuda.synchronize()
    if group.is_leader:
        print("OK")
    group.close()


if __name__ == "__main__":
    main()
