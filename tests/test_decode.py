"""Decoding with a cache gives what the forward over the whole text gives, token for token."""
import pytest
import torch

import sea
from model import OPT, OPTConfig

T, M16 = 130, 16      # nine blocks of 16 queries, the last one begun
KINDS = {"sea, M 1": dict(query_block=1), "sea, M 16": dict(query_block=M16),
         "sea, M 1, no cell keys": dict(query_block=1, cell_keys=False),
         "sea, M 16, no cell keys": dict(query_block=M16, cell_keys=False),
         "dense": dict(attention="dense"), "window": dict(attention="window"),
         "performer": dict(attention="performer")}
SEA = [kind for kind in KINDS if "sea" in kind]


def make(kind, context=160, seed=0, dtype=torch.float32, **more):
    """A model whose every part matters: in a fresh one gates are near 1 and logits nearly equal."""
    torch.manual_seed(seed)
    config = dict(vocab_size=96, context=context, n_layer=2, n_head=2, n_embd=32, map_width=32,
                  keys_per_query=4, num_features=16, **KINDS[kind])
    model = OPT(OPTConfig(**{**config, **more}))
    for name, p in model.named_parameters():
        p.data = p.data * ("gates" not in name) + (0.1 if p.dim() == 1 else 0.4) * torch.randn_like(p)
    return model.eval().to(dtype)


def text(T, B=2):
    return torch.randint(96, (B, T), generator=torch.Generator().manual_seed(T))


@torch.no_grad()
def in_pieces(model, idx, sizes):
    """Logits of idx, fed through a cache in pieces of these sizes, then a token at a time."""
    cache = model.new_cache()
    sizes = [*sizes, *[1] * (idx.shape[1] - sum(sizes))]
    return torch.cat([model(piece, cache=cache)[0] for piece in idx.split(sizes, 1)], 1)


def logits(model, idx):
    with torch.no_grad():
        return model(idx)[0]


def greedy(model, idx, steps):
    """The likeliest next tokens, each by a forward over the whole text."""
    for _ in range(steps):
        idx = torch.cat([idx, logits(model, idx)[:, -1:].argmax(-1)], 1)
    return idx


# ---- the same logits

@pytest.mark.parametrize("kind", KINDS)
def test_every_token_alone_has_the_logits_of_the_full_forward(kind):
    model, idx = make(kind), text(T)
    full = logits(model, idx)
    assert full.std() > 0.5
    assert (in_pieces(model, idx, []) - full).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefill", [1, M16 - 1, M16, M16 + 1, 100])
def test_after_a_prefill(kind, prefill):
    model, idx = make(kind), text(prefill + 20)
    assert (in_pieces(model, idx, [prefill]) - logits(model, idx)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_in_float64_only_rounding_is_left(kind, monkeypatch):
    model, idx = make(kind, dtype=torch.float64), text(T)
    full = logits(model, idx)
    monkeypatch.setattr(sea, "MAP_ROWS", 32)     # the map of a piece is made in several parts
    for sizes in ([], [1, 2, 30, 1, 1, 5, 64], [100, 30]):
        assert (in_pieces(model, idx, sizes) - full).abs().max() < 1e-9


@pytest.mark.parametrize("forgotten", ["T", "sums", "k_sum", "v_sum", "codes", "k", "v"])
def test_all_that_a_layer_keeps_is_needed(forgotten):
    """What the tests above would say if the cache lost one thing between two tokens."""
    model, idx = make("sea, M 16, no cell keys" if forgotten == "codes" else "sea, M 16"), text(100)
    cache, fresh = model.new_cache(), sea.Cache(160)
    with torch.no_grad():
        model(idx[:, :50], cache=cache)
        for kept in cache:
            if hasattr(kept, forgotten):
                setattr(kept, forgotten, getattr(fresh, forgotten))
            else:
                kept.rows[forgotten][:, :, :20] = 0
        out = torch.cat([model(token, cache=cache)[0] for token in idx[:, 50:].split(1, 1)], 1)
    assert (out - logits(model, idx)[:, 50:]).abs().max() > 1e-3


def test_a_query_alone_attends_as_among_others(B=2, H=3, D=16, W=16):
    for M, T, keys in (1, 1, 4), (1, 90, 5), (16, 90, 5), (16, 97, 1), (16, 80, 1000), (32, 1000, 2):
        q, k, v = torch.randn(3, B, H, T, D, dtype=torch.float64)
        mask = sea.select(torch.rand(B, H, T, W), M, keys)
        alone = sea.attend(q[:, :, -1:], k, v, mask)
        allowed = sea.flat_csr_to_dense(mask, B, H)[:, :, -1:]
        expected = (q[:, :, -1:] @ k.mT).masked_fill(~allowed, -torch.inf).softmax(-1) @ v
        assert (alone - expected).abs().max() < 1e-12
        k[~allowed[:, :, 0]] = v[~allowed[:, :, 0]] = torch.nan
        assert torch.equal(sea.attend(q[:, :, -1:], k, v, mask), alone)      # no other key is read


# ---- the same text

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", [1, 40])
def test_greedy_text_is_the_same_with_and_without_a_cache(kind, prompt):
    model, idx = make(kind), text(prompt)
    assert torch.equal(model.generate(idx, 40, temperature=0), greedy(model, idx, 40))


@pytest.mark.parametrize("kind", ["sea, M 16", "dense"])
def test_sequences_of_a_batch_do_not_meet(kind):
    model, idx = make(kind), text(30, B=3)
    together = model.generate(idx, 20, temperature=0)
    apart = torch.cat([model.generate(row, 20, temperature=0) for row in idx.split(1)])
    assert torch.equal(together, apart) and not torch.equal(together[0, 30:], together[1, 30:])


@pytest.mark.parametrize("kind", ["sea, M 16", "dense", "performer"])
@pytest.mark.parametrize("prompt", [1, 24, 40])
def test_a_full_context_goes_on_from_its_last_half(kind, prompt, context=24):
    model, idx = make(kind, context), text(prompt)
    expected, window = idx, idx[:, -context:]
    for _ in range(60):
        if window.shape[1] > context:
            window = window[:, -context // 2:]
        token = logits(model, window)[:, -1:].argmax(-1)
        expected, window = torch.cat([expected, token], 1), torch.cat([window, token], 1)
    assert torch.equal(model.generate(idx, 60, temperature=0), expected)


def test_a_context_of_one_token():
    model = make("sea, M 1", context=1)
    assert model.generate(text(1), 3).shape == (2, 4)


def test_a_cache_says_when_it_is_full():
    model = make("dense", context=24)
    for cache, room in (model.new_cache(), 24), (model.new_cache(7), 7), (model.new_cache(99), 24):
        with torch.no_grad():
            model(text(room), cache=cache)
            with pytest.raises(ValueError, match=f"{room + 1} tokens"):
                model(text(1), cache=cache)


# ---- choosing among the logits, and among the keys

def test_temperature_and_top_k():
    model, idx = make("dense"), text(20, B=1)
    last = logits(model, idx)[0, -1]
    draw = lambda **how: {next(model.stream(idx, 1, **how)).item() for _ in range(100)}
    torch.manual_seed(0)
    best = last.topk(3).indices.tolist()
    assert draw(temperature=0) == draw(top_k=1) == draw(temperature=1e-4) == {best[0]}
    assert draw(temperature=5.0, top_k=3) == set(best)
    assert len(draw(temperature=50.0)) > len(draw(temperature=50.0, top_k=30)) > 20
    texts = []
    for top_k in (None, 1000, 5):
        torch.manual_seed(1)
        texts.append(model.generate(idx, 20, temperature=0.9, top_k=top_k))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_a_model_in_training_mode_generates_the_same():
    model, idx = make("sea, M 16"), text(20)
    assert torch.equal(model.generate(idx, 10, temperature=0), model.train().generate(idx, 10, temperature=0))


@pytest.mark.parametrize("kind", SEA)
def test_keys_per_query_may_change_at_any_time(kind):
    model, idx = make(kind), text(100)
    few = logits(model, idx)
    model.set_keys_per_query(12)
    many = logits(model, idx)
    assert model.config.keys_per_query == 12 and (many - few).abs().max() > 1e-2
    assert (in_pieces(model, idx, [50]) - many).abs().max() < 1e-4
    for block in model.layers:
        block.self_attn.attention.config.keys_per_query = 4
    assert (in_pieces(model, idx, [50]) - few).abs().max() < 1e-4
    same = make(kind, keys_per_query=12)
    assert torch.equal(logits(same, idx), many)


@pytest.mark.parametrize("kind, keys", [("dense", 4), ("window", 4), ("performer", 4), ("sea, M 1", 0)])
def test_keys_per_query_that_cannot_be(kind, keys):
    model = make(kind)
    with pytest.raises(ValueError):
        model.set_keys_per_query(keys)
    assert model.config.keys_per_query == 4
