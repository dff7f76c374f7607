"""Text, token by token: with a cache as with the full forward, and choosing among the logits."""
import pytest
import torch

from model import CACHED, Config, Transformer

T = 100      # of 33 blocks of 3 keys, and one that is begun
KINDS = {"sea, S 3": dict(block_size=3, keys_per_query=6), "sea, S 1": dict(block_size=1, keys_per_query=4),
         "sea, S 16": dict(block_size=16), "sea, many keys": dict(block_size=4, keys_per_query=40),
         "dense": dict(attention="dense"), "window": dict(attention="window", keys_per_query=8),
         "paper": dict(attention="paper", block_size=3), "performer": dict(attention="performer")}
KEPT = [kind for kind in KINDS if KINDS[kind].get("attention", "sea") in CACHED]
ARCHITECTURES = dict(opt=dict(n_head=2), llama=dict(n_head=6, n_kv_head=2))


def make(kind, architecture="llama", context=160, dtype=torch.float32, **more):
    """A model whose every part matters: in a fresh one logits are nearly equal."""
    torch.manual_seed(0)
    settings = dict(vocab_size=96, context=context, n_layer=2, n_embd=48, coarse=2, keys_per_query=4,
                    map_width=32, num_features=16)
    settings = {**settings, **KINDS[kind], **ARCHITECTURES[architecture], **more}
    model = Transformer(Config(architecture=architecture, **settings))
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
    return torch.cat([model(piece, cache=cache).logits for piece in idx.split(sizes, 1)], 1)


def logits(model, idx):
    with torch.no_grad():
        return model(idx).logits


def greedy(model, idx, steps):
    """The likeliest next tokens, each by a forward over the whole text."""
    for _ in range(steps):
        idx = torch.cat((idx, logits(model, idx)[:, -1:].argmax(-1)), 1)
    return idx


# ---- the same logits

@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_token_alone_has_the_logits_of_the_full_forward(kind, architecture):
    model = make(kind, architecture, dtype=torch.float64)
    full = logits(model, text(T))
    assert full.std() > 0.5
    for sizes in ([], [1, 2, 30, 1, 1, 5, 50]):
        assert (in_pieces(model, text(T), sizes) - full).abs().max() < 1e-9


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("prefill", [15, 16, 17])
def test_after_a_prefill_in_float32(kind, prefill):
    model, idx = make(kind), text(prefill + 20)
    assert (in_pieces(model, idx, [prefill]) - logits(model, idx)).abs().max() < 1e-4


@pytest.mark.parametrize("forgotten", ["T", "k", "v"])
def test_all_that_a_layer_keeps_is_needed(forgotten):
    """What the tests above would say if the cache lost one thing between two tokens."""
    model, idx = make("sea, S 3"), text(100)
    cache = model.new_cache()
    with torch.no_grad():
        model(idx[:, :50], cache=cache)
        for kept in cache:
            if forgotten == "T":
                kept.T -= 1
            else:
                getattr(kept, forgotten)[:, :, :20] = 0
        out = torch.cat([model(token, cache=cache).logits for token in idx[:, 50:].split(1, 1)], 1)
    assert (out - logits(model, idx)[:, 50:]).abs().max() > 1e-3


# ---- the same text

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", [1, 40])
def test_greedy_text_is_that_of_full_forwards(kind, prompt):
    model, idx = make(kind), text(prompt)
    assert torch.equal(model.generate(idx, 20, temperature=0), greedy(model, idx, 20))


@pytest.mark.parametrize("kind", ["sea, S 3", "dense"])
def test_sequences_of_a_batch_do_not_meet(kind):
    model, idx = make(kind), text(30, B=3)
    together = model.generate(idx, 20, temperature=0)
    apart = torch.cat([model.generate(row, 20, temperature=0) for row in idx.split(1)])
    assert torch.equal(together, apart) and not torch.equal(together[0, 30:], together[1, 30:])


@pytest.mark.parametrize("kind", ["sea, S 3", "dense", "performer"])
@pytest.mark.parametrize("prompt", [1, 24, 40])
def test_a_full_context_goes_on_from_its_last_half(kind, prompt, context=24):
    model, idx = make(kind, context=context), text(prompt)
    expected, window = idx, idx[:, -context:]
    for _ in range(60):
        if window.shape[1] > context:
            window = window[:, -context // 2:]
        token = logits(model, window)[:, -1:].argmax(-1)
        expected = torch.cat((expected, token), 1)
        window = torch.cat((window, token), 1)
    assert torch.equal(model.generate(idx, 60, temperature=0), expected)


def test_a_context_of_one_token():
    assert make("sea, S 3", context=1).generate(text(1), 3).shape == (2, 4)


def test_a_cache_says_when_it_is_full():
    model = make("dense", context=24)
    for cache, room in (model.new_cache(), 24), (model.new_cache(7), 7), (model.new_cache(99), 24):
        with torch.no_grad():
            model(text(room), cache=cache)
            with pytest.raises(ValueError, match=f"{room + 1} tokens"):
                model(text(1), cache=cache)
    with pytest.raises(ValueError, match="performer"):
        make("performer").new_cache()


# ---- choosing among the logits, and among the keys

def test_temperature_and_top_k():
    model, idx = make("dense"), text(20, B=1)
    last = logits(model, idx)[0, -1]

    def draw(**how):
        return {next(model.stream(idx, 1, **how)).item() for _ in range(60)}

    torch.manual_seed(0)
    best = last.topk(3).indices.tolist()
    assert draw(temperature=0) == draw(top_k=1) == draw(temperature=1e-4) == {best[0]}
    assert draw(temperature=1e-30) == draw(temperature=1e-300) == {best[0]}
    assert draw(temperature=5.0, top_k=3) == set(best)
    assert len(draw(temperature=50.0)) > len(draw(temperature=50.0, top_k=30)) > 15
    texts = []
    for top_k in (None, 1000, 5):
        torch.manual_seed(1)
        texts.append(model.generate(idx, 20, temperature=0.9, top_k=top_k))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("how, said", [(dict(top_k=0), "top_k"), (dict(temperature=-1.), "temperature"),
                                       (dict(idx=torch.zeros(1, 0, dtype=torch.long)), "prompt is empty")])
def test_what_cannot_be_sampled(how, said):
    with pytest.raises(ValueError, match=said):
        make("dense").generate(**{"idx": text(3), "max_new_tokens": 2, **how})


def test_only_some_ids_may_be_chosen():
    model, few = make("dense"), torch.tensor([3, 50, 95])
    tokens = torch.cat(list(model.stream(text(5), 30, temperature=9.0, ids=few)))
    assert set(tokens.flatten().tolist()) == set(few.tolist())


def test_a_model_in_training_mode_generates_the_same():
    model, idx = make("sea, S 3"), text(20)
    assert torch.equal(model.generate(idx, 10, temperature=0), model.train().generate(idx, 10, temperature=0))


def test_keys_per_query_may_change_at_any_time():
    model, idx = make("sea, S 3", dtype=torch.float64), text(70)
    few = logits(model, idx)
    model.config.keys_per_query = 30
    many = logits(model, idx)
    assert (many - few).abs().max() > 1e-2
    assert (in_pieces(model, idx, [50]) - many).abs().max() < 1e-9
    assert torch.equal(logits(make("sea, S 3", dtype=torch.float64, keys_per_query=30), idx), many)
