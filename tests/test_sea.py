"""sea.py against definitions written the long way, in float64, and inside other people's models."""
import math
import multiprocessing
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import sea
from conftest import HOW


def error(x, reference):
    """Relative norm of the difference; NaN anywhere gives NaN, which no bound accepts."""
    x = x.detach().double()
    reference = reference.detach().double()
    assert x.shape == reference.shape
    return ((x - reference).norm() / reference.norm().clamp(min=1e-3)).item()


def heads(B, H, HKV, T, D, dtype=torch.float64, R=None):
    """q, k, v as a model has them: (B, H, T, D) views of (B, T, H, D)."""
    generator = torch.Generator().manual_seed(T + D)
    shapes = [(B, R or T, H, D), (B, T, HKV, D), (B, T, HKV, D)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(dtype).transpose(1, 2) for x in tensors]


def halves(x):
    """Multiples of 1/2: float32 has their scores without an error, and equal ones are ties."""
    return (x * 2).round() / 2


# ---- the definition, one query at a time

def moments_by_hand(keys, size):
    """Mean and variance of each complete block of keys (T, D)."""
    blocks = []
    for c in range(len(keys) // size):
        block = keys[c * size:(c + 1) * size]
        mean = block.sum(0) / size
        variance = ((block - mean) ** 2).sum(0) / size
        blocks.append((mean, variance))
    return blocks


def select_by_hand(scores, own, n):
    """Block 0, the one before, and beside them the n best of scores, {block: score}."""
    fixed = {0, own - 1} if own > 0 else set()
    rivals = [c for c in scores if c not in fixed]
    rivals.sort(key=lambda c: (-scores[c], c))
    return fixed | set(rivals[:n])


def brute_force(q, k, v, block_size=8, keys_per_query=48, coarse=8, scale=None):
    """DESIGN.md's definition, in a loop over queries.

    -> the output (B, H, R, D), the chosen blocks (B, H, R, W), and for how many queries one look at
    all blocks would have chosen others.
    """
    B, H, R, D = q.shape
    HKV, T = k.shape[1:3]
    wide = block_size * coarse
    scale = 1 / math.sqrt(D) if scale is None else scale
    n = max(1, keys_per_query // block_size)
    n_coarse = max(8, keys_per_query // min(16, wide))

    def score(query, blocks):
        if not blocks:
            return []
        means = torch.stack([mean for mean, _ in blocks])
        variances = torch.stack([variance for _, variance in blocks])
        return (means @ query + variances @ query ** 2 / 2).tolist()

    rows = []
    chosen = torch.zeros(B, H, R, T // block_size, dtype=torch.bool)
    changed = 0
    for b in range(B):
        for h in range(H):
            keys = k[b, h // (H // HKV)]
            values = v[b, h // (H // HKV)]
            fine_blocks = moments_by_hand(keys.detach(), block_size)
            wide_blocks = moments_by_hand(keys.detach(), wide)
            for row in range(R):
                t = T - R + row
                own = t // block_size
                query = q[b, h, row] * scale

                # First look: the best coarse blocks, and the one that the query is in.
                scores = score(query.detach(), wide_blocks[:t // wide])
                near = select_by_hand(dict(enumerate(scores)), t // wide, n_coarse) | {t // wide}

                # Second look: the best blocks inside them.
                scores = dict(enumerate(score(query.detach(), fine_blocks[:own])))
                inside = {c: scores[c] for c in scores if c // coarse in near}
                blocks = select_by_hand(inside, own, n)
                changed += blocks != select_by_hand(scores, own, n)
                chosen[b, h, row, sorted(blocks)] = True

                # Exact attention to the keys of those blocks and of the own one, up to the query.
                seen = [j for j in range(t + 1) if j // block_size in blocks | {own}]
                probabilities = (keys[seen] @ query).softmax(0)
                rows.append(probabilities @ values[seen])
    return torch.stack(rows).view(B, H, R, D), chosen, changed


def check(inputs, bound, **settings):
    """sea_attention, its choice and its gradients against brute force.

    -> for how many queries the first look mattered.
    """
    exact = [x.detach().double().contiguous().requires_grad_() for x in inputs]
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = sea.sea_attention(*inputs, **settings)
    wanted, chosen, changed = brute_force(*exact, **settings)
    assert out.dtype == inputs[0].dtype
    assert error(out, wanted) < bound

    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad(out, inputs, weight.to(out.dtype))
    wanted_grads = torch.autograd.grad(wanted, exact, weight)
    for name, x, y in zip("qkv", grads, wanted_grads):
        assert error(x, y) < bound, name

    q, k, _ = [x.detach() for x in inputs]
    sizes = dict(block_size=8, keys_per_query=48, coarse=8, scale=q.shape[3] ** -0.5) | settings
    scale = sizes.pop("scale")
    assert torch.equal(sea.look_twice(q * scale, k, **sizes), chosen)
    return changed


@pytest.mark.parametrize("B, H, HKV, T, D, S, K, coarse, first_look_matters", [
    (1, 1, 1, 1, 16, 8, 48, 8, False),
    (2, 2, 1, 7, 80, 2, 4, 2, False),
    (1, 3, 1, 63, 16, 4, 8, 8, False),
    (2, 2, 2, 100, 128, 32, 32, 2, False),
    (1, 4, 2, 129, 24, 8, 16, 8, False),
    (1, 2, 1, 129, 16, 2, 40, 2, True),        # n1 is 10: K // 4, not K // 16
    (1, 3, 1, 257, 16, 2, 8, 8, True),
    (1, 1, 1, 257, 64, 16, 64, 1, False),      # the same look twice
    (1, 1, 1, 257, 80, 3, 1, 5, True),
    (1, 1, 1, 300, 32, 2, 8, 8, True)])        # 18 coarse blocks, of which 10 are kept
def test_brute_force(B, H, HKV, T, D, S, K, coarse, first_look_matters):
    inputs = heads(B, H, HKV, T, D)
    changed = check(inputs, 1e-11, block_size=S, keys_per_query=K, coarse=coarse)
    assert (changed > 0) == first_look_matters


def test_the_defaults(T=100):
    inputs = heads(1, 2, 1, T, 16)
    check(inputs, 1e-11)
    sizes = dict(block_size=8, keys_per_query=48, coarse=8, scale=0.25)
    assert torch.equal(sea.sea_attention(*inputs), sea.sea_attention(*inputs, **sizes))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float16, 3e-3),
                                          (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("H, HKV, T, D, S, K, coarse", [
    (2, 1, 129, 16, 4, 12, 8), (3, 1, 63, 64, 2, 6, 3)])
def test_lower_precision_with_many_ties(H, HKV, T, D, S, K, coarse, dtype, bound):
    inputs = [halves(x).to(dtype) for x in heads(1, H, HKV, T, D)]
    check(inputs, bound, block_size=S, keys_per_query=K, coarse=coarse)


def test_float32_at_a_width_that_is_no_power_of_two():
    inputs = heads(1, 1, 1, 100, 80, torch.float32)
    check(inputs, 1e-5, block_size=8, keys_per_query=8)


@pytest.mark.parametrize("R", [1, 5, 40])
def test_the_last_rows_and_a_scale(R):
    q, k, v = heads(1, 2, 1, 150, 16, R=R)
    check((q, k, v), 1e-11, block_size=2, keys_per_query=6, scale=0.7)
    q = torch.cat((torch.randn(1, 2, 150 - R, 16, dtype=q.dtype), q), 2)
    whole = sea.sea_attention(q, k, v, 2, 6, scale=0.7)
    part = sea.sea_attention(q[:, :, -R:], k, v, 2, 6, scale=0.7)
    assert error(part, whole[:, :, -R:]) < 1e-12


def test_any_strides(T=60):
    q, k, v = heads(2, 2, 2, 2 * T, 32)
    q = q[:, :, ::2, :16]                           # sliced
    k = k.mT.contiguous().mT[:, :, ::2, 16:]        # its last dimension is not the dense one
    v = v[:, :1, T:, ::2].expand(2, 2, T, 16)       # both heads are one
    assert not q.is_contiguous() and k.stride(3) != 1 and v.stride(1) == 0
    check((q, k, v), 1e-11, block_size=4, keys_per_query=8)


def test_an_empty_batch(T=61):
    q, k, v = [x[:0].requires_grad_() for x in heads(1, 2, 1, T, 16)]
    out = sea.sea_attention(q, k, v, 2, 4, 2)
    out.sum().backward()
    assert out.shape == q.shape and k.grad.shape == k.shape


def test_autocast_takes_its_type(T=61):
    q, k, v = heads(1, 2, 1, T, 16, torch.float32)
    wanted = sea.sea_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):                 # rotary positions make float32 of q and k
        out = sea.sea_attention(q, k, v.bfloat16())
    assert out.dtype == torch.bfloat16 and torch.equal(out, wanted)


def test_every_budget(T=61):
    q, k, v = heads(1, 1, 1, T, 16)
    for K in range(1, T + 4):
        wanted, _, _ = brute_force(q, k, v, 2, K, 2)
        assert error(sea.sea_attention(q, k, v, 2, K, 2), wanted) < 1e-12, K


def test_rows_in_chunks_give_the_same(monkeypatch, T=150):
    q, k, v = heads(1, 2, 1, T, 16)
    whole = sea.sea_attention(q, k, v, 2, 8)
    monkeypatch.setattr(sea, "ROWS", 37)
    assert error(sea.sea_attention(q, k, v, 2, 8), whole) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, S, K, coarse, rows", [(300, 2, 8, 8, 128), (130, 8, 16, 8, 256),
                                                   (70, 3, 1, 2, 16)])
def test_nothing_depends_on_a_later_token(T, S, K, coarse, rows, dtype, monkeypatch):
    monkeypatch.setattr(sea, "ROWS", rows)
    inputs = heads(1, 2, 1, T, 16, dtype)
    out = sea.sea_attention(*inputs, S, K, coarse)
    for t in (1, S, S * coarse + 1, T // 2, T - 1):
        changed = [torch.cat((x[:, :, :t], 3 * torch.randn_like(x[:, :, t:])), 2) for x in inputs]
        changed_out = sea.sea_attention(*changed, S, K, coarse)
        assert torch.equal(changed_out[:, :, :t], out[:, :, :t])
        assert (changed_out[:, :, t:] != out[:, :, t:]).any()


@pytest.mark.parametrize("T", [1, 63, 129, 257])
@pytest.mark.parametrize("S, coarse", [(1, 3), (2, 8), (8, 8), (5, 1), (32, 2)])
def test_a_budget_that_covers_the_past_is_dense_attention(T, S, coarse):
    q, k, v = heads(2, 4, 2, T, 16, torch.float32)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for K in (T, 2 * T + 50):
        assert error(sea.sea_attention(q, k, v, S, K, coarse), dense) < 1e-6


# ---- its parts

@pytest.mark.parametrize("T, S", [(1, 2), (7, 8), (16, 4), (101, 8), (60, 1)])
def test_moments(T, S):
    _, k, _ = heads(2, 3, 3, T, 16)
    result = sea.moments(k, S)
    W = T // S
    assert result.shape == (2, 3, W, 32)
    for c in range(W):
        block = k[:, :, c * S:(c + 1) * S]
        variance = block.var(2, correction=0)
        assert torch.allclose(result[:, :, c, :16], block.mean(2), rtol=0, atol=1e-14)
        assert torch.allclose(result[:, :, c, 16:], variance / 2, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_moments_have_float32_sums(dtype):
    torch.manual_seed(0)
    k = (torch.randn(1, 2, 256, 16) + 30).to(dtype)     # the mean's square far above the variance
    result = sea.moments(k, 32)
    assert result.dtype == torch.float32
    assert error(result[..., 16:], sea.moments(k.double(), 32)[..., 16:]) < 1e-5


@pytest.mark.parametrize("T, S, R", [(1, 8, 1), (40, 8, 40), (41, 4, 10), (30, 7, 30)])
def test_block_scores(T, S, R):
    q, k, _ = heads(2, 4, 2, T, 16, R=R)
    scores = sea.block_scores(q, sea.moments(k, S), S, T - R)
    assert scores.shape == (2, 4, R, T // S)
    for row in range(R):
        own = (T - R + row) // S
        assert (scores[:, :, row, own:] == -torch.inf).all()
        for c in range(own):
            block = k[:, :, c * S:(c + 1) * S].repeat_interleave(2, 1)      # (B, H, S, D)
            x = q[:, :, row]
            wanted = (x * block.mean(2)).sum(-1) + (x ** 2 * block.var(2, correction=0)).sum(-1) / 2
            assert torch.allclose(scores[:, :, row, c], wanted, rtol=0, atol=1e-12)


def test_block_scores_keep_their_digits_under_autocast():
    q, k, _ = heads(1, 2, 1, 64, 16, torch.float32)
    moments = sea.moments(k, 4)
    exact = sea.block_scores(q, moments, 4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert error(sea.block_scores(q, moments, 4, 64), exact) < 1e-6


@pytest.mark.parametrize("S", [8, 16, 32])
def test_the_variance_brings_the_estimate_nearer_to_the_mass(S, T=256, D=32):
    q, k, _ = heads(1, 4, 4, T, D)
    generator = torch.Generator().manual_seed(S)
    spread = 1 + torch.rand(1, 4, T // S, 1, generator=generator)
    k = k * spread.repeat_interleave(S, 2)                      # some blocks vary more than others
    q = q * D ** -0.5
    target = sea.block_mass(q, k, S)
    moments = sea.moments(k, S)
    scores = sea.block_scores(q, moments, S)
    mean_alone = sea.block_scores(q, moments * (torch.arange(2 * D) < D), S)
    distance = sea.block_kl(target, scores).mean().item()
    assert distance < 0.8 * sea.block_kl(target, mean_alone).mean().item()


@pytest.mark.parametrize("kind", ["random", "few values", "all the same", "masked"])
@pytest.mark.parametrize("T, S, n, R", [
    (1, 8, 3, 1), (63, 4, 3, 63), (100, 8, 1, 20), (60, 2, 50, 60), (400, 1, 30, 4)])
def test_select(kind, T, S, n, R):
    W = T // S
    scores = torch.randn(2, 3, R, W, generator=torch.Generator().manual_seed(T))
    own = (T - R + torch.arange(R))[:, None] // S
    scores = scores.masked_fill(torch.arange(W) >= own, -torch.inf)
    if kind == "few values":
        scores = scores.round()
    if kind == "all the same":
        scores = scores.masked_fill(scores != -torch.inf, 0.5)
    if kind == "masked":                                        # as the second look has it
        scores = scores.masked_fill(scores < 0.5, -torch.inf)
    chosen = sea.select(scores, S, n, T - R)
    assert chosen.shape == scores.shape
    for b in range(2):
        for h in range(3):
            for row in range(R):
                values = enumerate(scores[b, h, row].tolist())
                free = {c: value for c, value in values if value != -math.inf}
                wanted = select_by_hand(free, own[row].item(), n)
                assert chosen[b, h, row].nonzero().flatten().tolist() == sorted(wanted)


def test_a_nan_is_the_highest_score():
    scores = torch.tensor([5, 1, math.inf, 2, math.nan, 3, 4, -math.inf])[None, None, None]
    order = [4, 2, 5, 3, 1]                                     # beside the fixed 0 and 6
    for n in range(1, 8):
        taken = sea.select(scores, 1, n, 7)[0, 0, 0].nonzero().flatten().tolist()
        assert taken == sorted([0, 6] + order[:n])


def test_attend_to_chosen_keys(T=30, S=4):
    q, k, v = heads(2, 4, 2, T, 16, R=11)
    chosen = torch.rand(2, 4, 11, T // S, generator=torch.Generator().manual_seed(0)) < 0.3
    chosen &= torch.arange(T // S) < (T - 11 + torch.arange(11))[:, None] // S
    key = torch.arange(T)
    row = key[-11:, None]
    own = (key // S == row // S) & (key <= row)                 # (R, T)
    mask = own.repeat(2, 4, 1, 1)
    mask[..., :T // S * S] |= chosen.repeat_interleave(S, -1)
    assert torch.equal(sea.chosen_keys(chosen, T, S), mask)
    scores = q @ k.repeat_interleave(2, 1).mT
    wanted = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    assert error(sea.attend(q, k, v, chosen, S), wanted) < 1e-12


# ---- mistakes

@pytest.mark.parametrize("q, k, v, message", [
    ((4, 9, 16), (1, 4, 9, 16), (1, 4, 9, 16), "^q has shape"),
    ((1, 4, 9, 16), (4, 9, 16), (4, 9, 16), "k .* must be"),
    ((1, 4, 9, 16), (1, 4, 9, 16), (1, 4, 8, 16), "v must have the shape of k"),
    ((1, 4, 9, 16), (1, 4, 9, 16), (1, 2, 9, 16), "v must have the shape of k"),
    ((1, 4, 9, 16), (1, 4, 9, 16), (1, 4, 9, 8), "v must have the shape of k"),
    ((2, 4, 9, 16), (1, 4, 9, 16), (1, 4, 9, 16), "B and D of k"),
    ((1, 4, 9, 16), (1, 4, 9, 8), (1, 4, 9, 8), "B and D of k"),
    ((1, 4, 9, 16), (1, 3, 9, 16), (1, 3, 9, 16), "heads of q"),
    ((1, 2, 9, 16), (1, 4, 9, 16), (1, 4, 9, 16), "heads of q"),
    ((1, 2, 9, 16), (1, 0, 9, 16), (1, 0, 9, 16), "heads of q"),
    ((1, 4, 10, 16), (1, 4, 9, 16), (1, 4, 9, 16), "1 to T rows"),
    ((1, 4, 0, 16), (1, 4, 9, 16), (1, 4, 9, 16), "1 to T rows")])
def test_a_wrong_shape_is_named(q, k, v, message):
    with pytest.raises(ValueError, match=message):
        sea.sea_attention(torch.randn(q), torch.randn(k), torch.randn(v))


@pytest.mark.parametrize("name", ["block_size", "keys_per_query", "coarse"])
@pytest.mark.parametrize("value", [0, -8, 8.0, 2.5, None, "8", True])
def test_a_wrong_setting_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}"):
        sea.sea_attention(*heads(1, 2, 1, 9, 16), **{name: value})


# ---- memory and the switch

def largest_memory():
    """Bytes that this program had at most. Not of getrusage on Linux: that counts what it was forked from, too."""
    if sys.platform == "linux":
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss                    # bytes on macOS


def grow_by_a_long_text(connection, T=8192):
    """In a process of its own: tell by how many bytes its largest memory grew."""
    torch.set_num_threads(1)
    q = torch.randn(1, 4, T, 16)
    k, v = torch.randn(2, 1, 2, T, 16)
    before = largest_memory()
    with torch.no_grad():
        out = sea.sea_attention(q, k, v)
    assert out.isfinite().all()
    connection.send(largest_memory() - before)


def test_memory_does_not_grow_with_the_square():
    """T x T in float32 is 1 GiB for 4 heads; this takes a sixth of that."""
    processes = multiprocessing.get_context(HOW)
    connection, theirs = processes.Pipe()
    process = processes.Process(target=grow_by_a_long_text, args=(theirs,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    grown = connection.recv()
    assert 0 < grown < 0.4 * 2 ** 30, grown


def test_the_backend_is_chosen_once_and_can_be_changed(monkeypatch):
    on_gpu = torch.cuda.is_available() and hasattr(sea, "kernels")
    assert sea.backend == ("triton" if on_gpu else "torch")
    monkeypatch.setattr(sea, "backend", sea.backend)            # so that it is put back
    inputs = heads(1, 2, 1, 40, 16)
    outs = []
    for on, name in [(True, "triton"), (False, "torch")]:
        sea.use_kernels(on)
        assert sea.backend == name
        outs.append(sea.sea_attention(*inputs, 4, 8))       # CPU tensors: sea.py's own both times
    assert torch.equal(*outs)


# ---- for looking at

@pytest.mark.parametrize("T, S, K, scale", [
    (60, 4, 8, None), (33, 8, 8, 0.5), (3, 4, 4, None), (1, 8, 8, None)])
def test_estimated_attention_shows_what_is_used(T, S, K, scale):
    q, k, v = heads(2, 4, 2, T, 16)
    estimate, mask, probabilities = sea.estimated_attention(q, k, S, K, 2, scale)
    assert estimate.shape == mask.shape == probabilities.shape == (2, 4, T, T)

    _, chosen, _ = brute_force(q, k, v, S, K, 2, scale)
    assert torch.equal(mask, sea.chosen_keys(chosen, T, S))
    assert mask.dtype == torch.bool and not mask.triu(1).any()

    assert not probabilities[~mask].any()
    assert error(probabilities.sum(-1), torch.ones(2, 4, T)) < 1e-6
    out = sea.sea_attention(q, k, v, S, K, 2, scale)
    assert error(probabilities.double() @ v.repeat_interleave(2, 1), out) < 1e-6

    own_start = torch.arange(T)[:, None] // S * S
    has_past = (torch.arange(T) >= S).double().expand(2, 4, T)
    assert error(estimate.sum(-1), has_past) < 1e-6             # zero where no block is past
    assert not estimate[(torch.arange(T) >= own_start).expand_as(estimate)].any()
    complete = estimate[..., :T // S * S].unflatten(-1, (T // S, S))
    assert torch.equal(complete, complete[..., :1].expand_as(complete))


# ---- the paper's estimator

@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
def test_kernel_attention_is_its_quadratic_form(T, D=16, E=24):
    torch.manual_seed(0)
    q, k, _ = heads(2, 2, 2, T, D, torch.float32)
    v = torch.randn(2, 2, T, E)
    omega = sea.orthogonal_features(D, 40)
    phi_q, phi_k = [F.relu(x.double() @ omega.double()) + 1e-3 for x in (q, k)]
    weights = (phi_q @ phi_k.mT).tril()
    wanted = weights @ v.double() / weights.sum(-1, keepdim=True)
    assert error(sea.kernel_attention(q, k, v, omega), wanted) < 1e-5
    assert error(sea.kernel_attention(q, k, v, omega, chunk=7), wanted) < 1e-5


def test_features_are_orthogonal_and_of_one_norm():
    torch.manual_seed(0)
    omega = sea.orthogonal_features(16, 24)
    assert omega.shape == (16, 24)
    assert error(omega[:, :16].mT @ omega[:, :16], 16 * torch.eye(16)) < 1e-5
    assert error(omega.norm(dim=0), torch.full((24,), 4.0)) < 1e-5


@pytest.mark.parametrize("T, S, R", [(1, 4, 1), (63, 4, 63), (100, 8, 30), (41, 16, 41)])
def test_block_mass_is_the_softmax_over_past_keys_summed_in_blocks(T, S, R):
    q, k, _ = heads(2, 4, 2, T, 16, R=R)
    mass = sea.block_mass(q, k, S, T - R)
    wanted = torch.zeros(2, 4, R, T // S, dtype=torch.float64)
    scores = q @ k.repeat_interleave(2, 1).mT
    for row in range(R):
        own = (T - R + row) // S
        if own:
            dense = scores[:, :, row, :T - R + row + 1].softmax(-1)
            past = dense[..., :own * S].unflatten(-1, (own, S)).sum(-1)
            wanted[:, :, row, :own] = past / past.sum(-1, keepdim=True)
    assert error(mass, wanted) < 1e-6


def test_block_kl_by_hand():
    target = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [0.25, 0.75, 0.0]])[None, None]
    scores = torch.tensor([[0.0, 0.0, -math.inf], [-math.inf] * 3, [0.0, 0.0, -math.inf]])
    scores = scores[None, None]
    wanted = torch.tensor([0.0, 0.0, 0.25 * math.log(0.5) + 0.75 * math.log(1.5)])[None, None]
    assert error(sea.block_kl(target, scores), wanted) < 1e-6


def estimator(n_head=4, head_dim=16, width=32):
    """With gates that are not constant, so that everything can be seen in the output."""
    torch.manual_seed(0)
    layer = sea.PaperEstimator(n_head, head_dim, width, num_features=24)
    nn.init.normal_(layer.gates.weight, std=0.5)
    nn.init.zeros_(layer.gates.bias)
    return layer


def paper_inputs(T, HKV=4):
    q, k, v = heads(2, 4, HKV, T, 16, torch.float32)
    return q * 0.5, k, v


@pytest.mark.parametrize("T", [1, 63, 300])
@pytest.mark.parametrize("HKV", [4, 2, 1])
def test_paper_estimator_in_chunks_of_rows(T, HKV, monkeypatch):
    layer = estimator()
    q, k, v = paper_inputs(T, HKV)
    out, kl = layer(q, k, v, 8, 16, teacher=(q, k))
    assert out.shape == (2, 4, T, 16)
    assert kl.shape == () and (kl > 0) == (T > 8)
    assert layer(q, k, v, 8, 16)[1] is None
    monkeypatch.setattr(sea, "ROWS", 37)
    chunked, chunked_kl = layer(q, k, v, 8, 16, teacher=(q, k))
    assert error(chunked, out) < 1e-5
    assert error(chunked_kl, kl) < 1e-5
    monkeypatch.undo()
    repeated = [x.repeat_interleave(4 // HKV, 1) for x in (k, v)]
    assert error(layer(q, *repeated, 8, 16)[0], out) < 1e-5


def test_paper_estimator_needs_all_rows():
    q, k, v = paper_inputs(20, 2)
    with pytest.raises(ValueError, match="q has 5 rows; this estimator needs all 20"):
        estimator()(q[:, :, -5:], k, v, 8, 16)


@pytest.mark.parametrize("S", [2, 8])
def test_paper_estimator_looks_at_no_later_token(S, T=150):
    layer = estimator()
    inputs = paper_inputs(T)
    out, _ = layer(*inputs, S, 8)
    picture, gates = layer.draw(*inputs)
    for t in (1, S, 66, T - 1):
        changed = [torch.cat((x[:, :, :t], 3 * torch.randn_like(x[:, :, t:])), 2) for x in inputs]
        changed_out, _ = layer(*changed, S, 8)
        changed_picture, changed_gates = layer.draw(*changed)
        assert error(changed_picture[:, :, :t], picture[:, :, :t]) < 1e-5
        assert error(changed_gates[:, :, :t], gates[:, :, :t]) < 1e-5
        assert error(changed_out[:, :, :t], out[:, :, :t]) < 1e-5
        assert error(changed_out[:, :, t:], out[:, :, t:]) > 1e-2


@pytest.mark.parametrize("S", [1, 4])
def test_a_block_reads_the_column_that_its_middle_falls_in(S, width=32, first_row=30):
    layer = estimator(width=width)
    picture = torch.randn(1, 4, 20, width)
    scores = layer.read(picture, first_row, S)
    assert scores.shape == (1, 4, 20, 50 // S)
    for row in range(20):
        t = first_row + row
        for c in range(50 // S):
            column = math.floor((c + 0.5) * S * width / (t + 1))
            past = c < t // S
            wanted = picture[:, :, row, column] if past else torch.full((1, 4), -math.inf)
            assert torch.equal(scores[:, :, row, c], wanted)


def test_with_open_gates_and_a_covering_budget_it_is_dense_attention(T=100):
    layer = estimator()
    nn.init.zeros_(layer.gates.weight)
    nn.init.constant_(layer.gates.bias, 1e9)
    q, k, v = paper_inputs(T, 2)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)
    assert error(layer(q, k, v, 8, T)[0], dense) < 1e-6
    nn.init.constant_(layer.gates.bias, -1e9)                   # and closed, the mean of v so far
    mean = v.cumsum(2) / torch.arange(1, T + 1)[:, None]
    assert error(layer(q, k, v, 8, T)[0], mean.repeat_interleave(2, 1)) < 1e-6


def test_the_kl_teaches_the_estimator_alone(T=70):
    layer = estimator()
    q, k, v = [x.detach().requires_grad_() for x in paper_inputs(T, 2)]
    teacher = [x.detach().requires_grad_() for x in (q * 2, k)]
    _, kl = layer(q, k, v, 8, 16, teacher=teacher)
    kl.backward()
    assert all(x.grad is None for x in (q, k, v, *teacher))
    for name, p in layer.named_parameters():
        if name.startswith("gates"):
            assert p.grad is None or not p.grad.any()
        elif name == "norm.bias" or name == "to_heads.bias":
            assert p.grad.isfinite().all(), name
        else:
            assert p.grad.isfinite().all() and p.grad.norm() > 0, name


def test_the_gradient_of_the_kl_is_finite_in_every_row(T=70, S=8):
    q, k, _ = paper_inputs(T)
    target = sea.block_mass(q, k, S)
    past = torch.arange(T // S) < torch.arange(T)[:, None] // S
    scores = torch.randn(target.shape).masked_fill(~past, -torch.inf).requires_grad_()
    sea.block_kl(target, scores).sum().backward()
    assert error(scores.grad[:, :, S:], scores.softmax(-1)[:, :, S:] - target[:, :, S:]) < 1e-5
    assert not scores.grad[:, :, :S].any()


def test_the_output_teaches_q_k_v_and_the_gates(T=70):
    layer = estimator()
    q, k, v = [x.detach().requires_grad_() for x in paper_inputs(T, 2)]
    out, _ = layer(q, k, v, 8, 16)
    out.square().sum().backward()
    for x in (q, k, v, layer.gates.weight, layer.gates.bias, layer.linear.weight):
        assert x.grad.isfinite().all() and x.grad.norm() > 0


def test_the_kl_falls(T=100):
    layer = estimator()
    q, k, v = paper_inputs(T, 2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        _, kl = layer(q, k, v, 8, 16, teacher=(2 * q, k))
        optimizer.zero_grad()
        kl.backward()
        optimizer.step()
        losses.append(kl.item())
    assert losses[-1] < 0.8 * losses[0]


# ---- in other people's models

class GPT(nn.Module):
    """One line away from a GPT with scaled_dot_product_attention."""

    def __init__(self, vocab=32, width=32, n_head=4, n_layer=2, context=128):
        super().__init__()
        self.n_head = n_head
        self.token = nn.Embedding(vocab, width)
        self.position = nn.Embedding(context, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(n_layer))
        self.mlp = nn.ModuleList(nn.Linear(width, width) for _ in range(n_layer))
        self.head = nn.Linear(width, vocab)

    def forward(self, ids, attention):
        x = self.token(ids) + self.position.weight[:ids.shape[1]]
        for qkv, mlp in zip(self.qkv, self.mlp):
            heads = qkv(F.layer_norm(x, x.shape[-1:])).unflatten(-1, (3, self.n_head, -1))
            q, k, v = heads.permute(2, 0, 3, 1, 4)                              # (B, H, T, D) each
            out = attention(q, k, v)
            x = x + out.transpose(1, 2).flatten(2)
            x = x + mlp(F.gelu(F.layer_norm(x, x.shape[-1:])))
        return self.head(x)


def test_a_small_gpt_trains(T=96):
    torch.manual_seed(0)
    model = GPT()
    ids = torch.randint(32, (4, T // 8)).repeat_interleave(8, 1)        # each token eight times
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        logits = model(ids, lambda q, k, v: sea.sea_attention(q, k, v, 4, 8))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3 and losses[-1] < 0.5 * losses[0]

    dense = model(ids, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    covering = model(ids, lambda q, k, v: sea.sea_attention(q, k, v, 4, T))
    assert error(covering, dense) < 1e-5


def test_in_transformers_llama(monkeypatch, T=150):
    monkeypatch.setitem(sys.modules, "kernels", None)   # transformers knows another of that name
    transformers = pytest.importorskip("transformers")
    settings = {}

    def attention(module, q, k, v, attention_mask, scaling=None, **kwargs):
        out = sea.sea_attention(q, k, v, scale=scaling, **settings)
        return out.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("sea", attention)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(100, (2, T))

    @torch.no_grad()
    def logits(ids, kind):
        model.set_attn_implementation(kind)
        return model(input_ids=ids, use_cache=False).logits

    dense = logits(ids, "sdpa")
    settings.update(keys_per_query=T)
    assert error(logits(ids, "sea"), dense) < 1e-5

    settings.update(block_size=4, keys_per_query=4)
    sparse = logits(ids, "sea")
    assert sparse.isfinite().all()
    assert error(sparse, dense) > 1e-4                          # it is SEA that runs
    changed = ids.clone()
    changed[:, 90:] = (changed[:, 90:] + 1) % 100
    changed_logits = logits(changed, "sea")
    assert torch.equal(changed_logits[:, :90], sparse[:, :90])
    assert error(changed_logits[:, 90:], sparse[:, 90:]) > 1e-2
