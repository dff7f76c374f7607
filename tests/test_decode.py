"""Text, token by token: with a cache as with the full forward, and choosing among the logits."""
import pytest
import torch

import sea
from model import ATTENTIONS, Config, Transformer

T = 100      # of 33 blocks of 3 keys, and one that is begun
KINDS = {"sea, S 3": dict(block_size=3, keys_per_query=6), "sea, S 1": dict(block_size=1, keys_per_query=4),
         "sea, S 16": dict(block_size=16), "sea, many keys": dict(block_size=4, keys_per_query=40),
         "dense": dict(attention="dense"), "window": dict(attention="window", keys_per_query=8),
         "paper": dict(attention="paper", block_size=3), "performer": dict(attention="performer")}
KEPT = [kind for kind in KINDS if hasattr(ATTENTIONS[KINDS[kind].get("attention", "sea")], "decode")]
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
def token_by_token(model, idx, prompt, room=None):
    """Logits (B, T - prompt + 1, V) of idx from the prompt's last token on, each from the cache."""
    last, caches = model.prefill(idx[:, :prompt], room or idx.shape[1])
    out = [last]
    for i in range(prompt, idx.shape[1]):
        out.append(model.decode(idx[:, i:i + 1], torch.tensor([i]), caches))
    return torch.stack(out, 1)


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
    for B, prompt, room in (1, 1, None), (3, 50, None), (3, T - 1, 160):
        full = logits(model, text(T, B))
        assert full.std() > 0.5
        one = token_by_token(model, text(T, B), prompt, room)
        assert (one - full[:, prompt - 1:]).abs().max() < 1e-9


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("prompt", [15, 16, 17])
def test_after_a_prompt_in_float32(kind, prompt):
    model, idx = make(kind), text(prompt + 20)
    full = logits(model, idx)[:, prompt - 1:]
    assert (token_by_token(model, idx, prompt) - full).abs().max() < 1e-4


def test_room_for_fewer_tokens_than_there_are():
    with pytest.raises(ValueError, match="room is 9, and there are 10"):
        sea.Cache(*torch.randn(2, 1, 1, 10, 16), room=9, block_size=3, coarse=4)


@pytest.mark.parametrize("kept", ["k", "v", "moments", "wide_moments"])
def test_all_that_a_layer_keeps_is_needed(kept):
    """What the tests above would say if the cache lost one thing between two tokens."""
    model, idx = make("sea, S 3", n_layer=1), text(100)
    model.config.keys_per_query = 3
    _, caches = model.prefill(idx[:, :99], 100)
    for cache in caches:
        getattr(cache, kept)[:, :, :8] *= -1
    out = model.decode(idx[:, 99:], torch.tensor([99]), caches)
    assert (out - logits(model, idx)[:, 99]).abs().max() > 1e-3


@pytest.mark.parametrize("S, K, Z", [(1, 1, 1), (3, 6, 2), (4, 8, 3), (8, 48, 8), (16, 64, 4), (4, 200, 2)])
@pytest.mark.parametrize("group", [1, 3])
def test_decode_is_the_last_row_of_sea_attention(S, K, Z, group):
    """Also where coarse blocks are many, so that the first look leaves some out."""
    torch.manual_seed(S)
    q, k, v = torch.randn(3, 2, 2 * group, 400, 16, dtype=torch.float64)
    k, v = k[:, :2], v[:, :2]
    cache = sea.Cache(k[:, :, :380], v[:, :, :380], 400, S, Z)
    for i in range(380, 400):
        position = torch.tensor([i])
        cache.append(k[:, :, i:i + 1], v[:, :, i:i + 1], position)
        out = sea.decode(q[:, :, i:i + 1], cache, position, K)
        full = sea.sea_attention(q[:, :, i:i + 1], k[:, :, :i + 1], v[:, :, :i + 1], S, K, Z)
        assert (out - full).abs().max() < 1e-12


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


def test_a_text_longer_than_the_context():
    model = make("dense", context=24)
    with pytest.raises(ValueError, match="25 tokens"):
        model.prefill(text(25), 30)


def test_weights_that_are_no_numbers_are_told():
    model = make("sea, S 3")
    model.embed_tokens.weight.data[5] = torch.nan
    with pytest.raises(FloatingPointError, match="no numbers"):
        model.generate(torch.tensor([[5, 6]]), 3)


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
    assert (token_by_token(model, idx, 50) - many[:, 49:]).abs().max() < 1e-9
    assert torch.equal(logits(make("sea, S 3", dtype=torch.float64, keys_per_query=30), idx), many)
