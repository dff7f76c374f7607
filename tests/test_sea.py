"""sea.py against definitions written the long way."""
import pytest
import torch
import torch.nn.functional as F

import sea
from sea import SEAConfig, SEAttention

SIZES = [1, 63, 100, 257]


def error(x, reference):
    """Relative norm of the difference; NaN anywhere gives NaN, which no bound accepts."""
    return ((x.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-30)).item()


def qkv(B, H, T, D, dtype=torch.float32, seed=0):
    q, k, v = torch.randn(3, B, H, T, D, dtype=dtype, generator=torch.Generator().manual_seed(seed)).unbind()
    return q * D ** -0.5, k, v


def attention(T, M, H=3, D=16, W=32, keys=8, **more):
    torch.manual_seed(0)
    return SEAttention(SEAConfig(H, D, map_width=W, keys_per_query=keys, query_block=M, **more))


def masked_attention(q, k, v, allowed):
    return (q @ k.mT).masked_fill(~allowed, -torch.inf).softmax(-1) @ v


# ---- geometry

@pytest.mark.parametrize("T, M, W", [(1, 1, 4), (63, 1, 32), (100, 4, 8), (257, 16, 64)])
def test_every_past_key_lies_in_one_cell(T, M, W):
    past, cell = sea.cell_of_key(torch.arange(T), T, M, W)
    bounds = sea.cell_bounds(torch.arange(T) // M * M, W)
    for t in range(T):
        assert past[t].nonzero().flatten().tolist() == list(range(t // M * M))
        for j in range(t // M * M):
            assert bounds[t, cell[t, j]] <= j < bounds[t, cell[t, j] + 1]


def test_budget():
    anchor = torch.tensor([0, 1, 16, 64, 128, 4096, 10 ** 6])
    # 2 heads x 8 keys, 32 cells: all while the past is short, then 16 keys' worth of cells, at least one
    assert sea.cell_budget(anchor, 2, 32, 8).tolist() == [0, 2, 16, 8, 4, 1, 1]
    assert sea.cell_budget(torch.tensor([80, 48]), 1, 32, 5).tolist() == [2, 3]        # 2.0; 3.33
    assert sea.cell_budget(torch.tensor([64, 64]), 1, 32, 5).tolist() == [2, 2]        # 2.5, half to even


# ---- select

def by_hand(mass, M, keys):
    """The chosen cells (B, H, T, W), one query at a time."""
    B, H, T, W = mass.shape
    chosen = torch.zeros(B, H, T, W, dtype=torch.bool)
    for b in range(B):
        for t in range(T):
            a = t // M * M
            cells = [(h, c) for h in range(H) for c in range(W) if (c + 1) * a // W > c * a // W]
            budget = min(max(1, round(H * keys / max(1, a / W))), H * min(W, a)) if a else 0
            for h, c in sorted(cells, key=lambda hc: -mass[b, hc[0], t, hc[1]].item())[:budget]:
                chosen[b, h, t, c] = True
    return chosen


@pytest.mark.parametrize("kind", ["random", "few values", "zeros"])
@pytest.mark.parametrize("T, M, H, W, keys", [(1, 16, 2, 8, 4), (63, 1, 3, 16, 4), (100, 4, 1, 8, 6),
                                              (100, 16, 3, 32, 5), (70, 32, 2, 4, 1000)])
def test_select_takes_the_largest_of_all_heads(kind, T, M, H, W, keys):
    mass = torch.rand(2, H, T, W, generator=torch.Generator().manual_seed(T))
    mass = {"random": mass, "few values": (mass * 3).round(), "zeros": 0 * mass}[kind]
    mask = sea.select(mass, M, keys)
    assert torch.equal(sea.selected_cells(mask)[:, :, :T], by_hand(mass, M, keys))
    assert not sea.selected_cells(mask)[:, :, T:].any()


@pytest.mark.parametrize("T, M", [(1, 1), (63, 4), (257, 16), (100, 32)])
def test_flat_csr_holds_what_it_promises(T, M, B=2, H=3, W=16, keys=5):
    mask = sea.select(torch.rand(B, H, T, W, generator=torch.Generator().manual_seed(1)), M, keys)
    anchor = sea.anchors(0, T, M)
    budget, sizes = sea.cell_budget(anchor, H, W, keys), sea.cell_bounds(anchor, W).diff()
    counts = torch.zeros(B, len(anchor), M, dtype=torch.long)
    for b in range(B):
        for n in range(len(anchor)):
            run = mask.crow[b, n].tolist()
            cells, queries = mask.cells[b, run[0]:run[-1]].tolist(), mask.queries[b, run[0]:run[-1]].tolist()
            assert cells == sorted(set(cells)) and 0 not in queries
            for h in range(H):
                assert all(cell // W == h for cell in mask.cells[b, run[h]:run[h + 1]].tolist())
            assert all(sizes[n, cell % W] > 0 for cell in cells)
            for bits in queries:
                counts[b, n] += torch.tensor([bits >> m & 1 for m in range(M)])
    real = torch.arange(len(anchor))[:, None] * M + torch.arange(M) < T
    assert torch.equal(counts, (budget[:, None] * real).expand(B, -1, -1))
    dense = sea.flat_csr_to_dense(mask, B, H)
    t, j = torch.arange(T)[:, None], torch.arange(T)
    assert not (dense & (j > t)).any() and (dense | (j > t) | (j < t // M * M)).all()


@pytest.mark.parametrize("first_row", [0, 1, 16, 37])
def test_rows_of_a_map_select_as_in_the_whole_map(first_row, T=90, M=16, keys=5):
    mass, (q, k, v) = torch.rand(2, 3, T, 16), qkv(2, 3, T, 8)
    whole, part = sea.select(mass, M, keys), sea.select(mass[:, :, first_row:], M, keys, first_row)
    out = sea.attend(q[:, :, first_row:], k, v, part)
    assert error(out, sea.attend(q, k, v, whole)[:, :, first_row:]) < 1e-6
    pieces = [sea.select(mass[:, :, :64], M, keys), sea.select(mass[:, :, 64:], M, keys, 64)]
    assert all(torch.equal(x, y) for x, y in zip(sea.join(pieces)[:3], whole[:3]))


# ---- attend

@pytest.mark.parametrize("T, M, D", [(1, 1, 64), (63, 1, 80), (100, 4, 64), (257, 16, 80)])
def test_attend_is_masked_attention(T, M, D, B=2, H=2):
    q, k, v = (x.requires_grad_() for x in qkv(B, H, T, D, torch.float64))
    mask = sea.select(torch.rand(B, H, T, 32), M, 6)
    out = sea.attend(q, k, v, mask)
    reference = masked_attention(q, k, v, sea.flat_csr_to_dense(mask, B, H))
    assert error(out, reference) < 1e-12
    weight = torch.randn_like(out)
    for x, y in zip(torch.autograd.grad((out * weight).sum(), (q, k, v)),
                    torch.autograd.grad((reference * weight).sum(), (q, k, v))):
        assert error(x, y) < 1e-10 or y.norm() == 0


@pytest.mark.parametrize("M", [1, 4, 16])
@pytest.mark.parametrize("T", SIZES)
@pytest.mark.parametrize("D", [64, 80])
def test_a_budget_that_covers_the_past_gives_dense_attention(M, T, D):
    q, k, v = qkv(2, 3, T, D)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    layer = attention(T, M, D=D, keys=T)
    assert error(layer(q, k, v), dense) < 2e-2
    layer.gates.bias.data.fill_(1e9)
    assert error(layer(q, k, v), dense) < 1e-5


# ---- pool and the KL

@pytest.mark.parametrize("T, M, W", [(1, 1, 4), (63, 1, 32), (100, 4, 8), (257, 16, 64)])
def test_pool_is_the_dense_softmax_summed_over_cells(T, M, W):
    q, k, _ = qkv(2, 2, T, 16, torch.float64)
    past, cell = sea.cell_of_key(torch.arange(T), T, M, W)
    dense = (q @ k.mT).masked_fill(~past, -torch.inf).softmax(-1).nan_to_num()
    expected = torch.zeros(2, 2, T, W, dtype=torch.float64)
    for c in range(W):
        expected[..., c] = (dense * (past & (cell == c))).sum(-1)
    assert error(sea.pool(q, k, M, W), expected) < 1e-10 or T == 1
    assert T > 1 or not sea.pool(q, k, M, W).any()
    last = -(-T // M) - 1
    padded = F.pad(expected, (0, 0, 0, -T % M)).unflatten(2, (-1, M))
    two = sea.pool(q, k, M, W, torch.tensor([last, 0]))
    assert torch.allclose(two, padded[:, :, [last, 0]].flatten(2, 3))


@pytest.mark.parametrize("M", [1, 8])
def test_the_kl_over_cells_has_the_gradient_of_the_kl_over_keys(M, T=41, W=8):
    q, k, _ = qkv(1, 2, T, 16, torch.float64)
    scores = torch.randn(1, 2, T, W, dtype=torch.float64, requires_grad=True)
    past, cell = sea.cell_of_key(torch.arange(T), T, M, W)
    sizes = sea.cell_bounds(torch.arange(T) // M * M, W).diff()
    log_mass = (scores + sizes.double().clamp(min=1e-37).log()).log_softmax(-1)
    narrow = sea.attention_kl(log_mass, sea.pool(q, k, M, W))
    wide = scores.gather(-1, cell.expand(1, 2, T, T)).masked_fill(~past, -torch.inf)[:, :, M:].log_softmax(-1)
    teacher = (q @ k.mT).masked_fill(~past, -torch.inf)[:, :, M:].softmax(-1)
    wide = torch.where(past[M:], teacher * (teacher.clamp(min=1e-300).log() - wide), 0).sum(-1)
    x, y = (torch.autograd.grad(loss.sum(), scores)[0] for loss in (narrow, wide))
    assert error(x, y) < 1e-12
    assert (narrow >= -1e-12).all() and not narrow[:, :, :M].any()


# ---- estimate

@pytest.mark.parametrize("T", SIZES)
def test_kernel_attention_is_its_quadratic_form(T, D=16):
    (q, k, v), omega = qkv(2, 2, T, D, torch.float64), sea.orthogonal_features(D, 24).double()
    weights = ((F.relu(q @ omega) + 1e-3) @ (F.relu(k @ omega) + 1e-3).mT).tril()
    expected = weights / weights.sum(-1, keepdim=True) @ v
    out, context, norm = sea.kernel_attention(q, k, v.split(10, -1), omega)
    assert error(out, expected) < 1e-12
    if T > 50:  # in two pieces, the second from the first one's sums
        first, *sums = sea.kernel_attention(q[:, :, :50], k[:, :, :50], [v[:, :, :50]], omega)
        second, *sums = sea.kernel_attention(q[:, :, 50:], k[:, :, 50:], [v[:, :, 50:]], omega, *sums)
        assert error(torch.cat([first, second], 2), expected) < 1e-12
        assert error(sums[0], context) < 1e-12 and error(sums[1], norm) < 1e-12


@pytest.mark.parametrize("T, M, W", [(1, 1, 4), (63, 1, 16), (100, 16, 8)])
def test_cell_key_scores_are_products_with_mean_keys(T, M, W):
    q, k, _ = qkv(2, 2, T, 8, torch.float64)
    scores = sea.cell_key_scores(q, sea.running_sum(k), M, W)
    for t in range(T):
        bounds = sea.cell_bounds(torch.tensor([t // M * M]), W)[0].tolist()
        for c, (low, high) in enumerate(zip(bounds, bounds[1:])):
            expected = (q[:, :, t] * k[:, :, low:high].mean(2)).sum(-1) if high > low else torch.zeros(2, 2)
            assert torch.allclose(scores[:, :, t, c], expected.double(), atol=1e-12)


@pytest.mark.parametrize("T", SIZES)
def test_sums_over_tokens(T, monkeypatch):
    x, start = qkv(2, 3, T, 16)[0].double(), torch.randn(2, 3, 1, 16).double()
    assert error(sea.cumulative_sum(x, start), start + x.cumsum(2)) < 1e-14
    assert error(sea.cumulative_sum(x.float()), x.cumsum(2)) < 1e-6
    assert error(sea.cumulative_sum(x.bfloat16()), x.bfloat16().double().cumsum(2)) < 1e-6     # in float32
    monkeypatch.setattr(sea, "MAP_ROWS", 48)
    sums = sea.running_sum(x, start)
    assert torch.equal(sums[:, :, :1], start) and error(sums[:, :, 1:], start + x.cumsum(2)) < 1e-14


def test_sums_keep_their_digits_under_autocast(T=600):
    q, k, _ = qkv(1, 2, T, 16)
    k_sum = sea.running_sum(k + 1)
    with torch.autocast("cpu", torch.bfloat16):
        scores = sea.cell_key_scores(q.bfloat16(), k_sum, 8, 16)
    assert error(scores, sea.cell_key_scores(q, k_sum, 8, 16)) < 1e-2


@pytest.mark.parametrize("T, M, share", [(1, 4, 4), (63, 1, 4), (100, 16, 1), (257, 16, 8)])
@pytest.mark.parametrize("cell_keys", [True, False])
def test_log_mass_is_the_softmax_over_keys_summed_in_cells(T, M, share, cell_keys, H=2, W=16):
    q, k, _ = qkv(2, H, T, 8, torch.float64)
    score, scale, bias, weight = (torch.randn(shape, dtype=torch.float64) for shape in (
        (2, H, T, W // share), (H, W), (H, W), (H,)))
    keys = (sea.running_sum(k), weight) if cell_keys else (None, None)
    mass = sea.log_mass(score, scale, bias, q, *keys, M).exp()
    s = score.repeat_interleave(share, -1) * scale[:, None] + bias[:, None]
    if cell_keys:
        s = s + weight[:, None, None] * sea.cell_key_scores(q, keys[0], M, W)
    past, cell = sea.cell_of_key(torch.arange(T), T, M, W)
    p = s.gather(-1, cell.expand(2, H, T, T)).masked_fill(~past, -torch.inf).softmax(-1)      # of each key
    wanted = torch.zeros_like(mass).scatter_add(-1, cell.expand(2, H, T, T), p.masked_fill(~past, 0))
    rows = past.any(-1)
    assert torch.allclose(mass[:, :, rows], wanted[:, :, rows], atol=1e-12)


@pytest.mark.parametrize("T", [1, 8, 25, 32, 100])
def test_the_kl_is_that_of_every_fourth_block_with_the_last(T, M=8, W=16):
    layer, (q, k, _) = attention(T, M, W=W), qkv(2, 3, T, 16)
    log_mass = torch.randn(2, 3, T, W).log_softmax(-1)
    every = sea.attention_kl(log_mass, sea.pool(q, k, M, W))
    block = torch.arange(T) // M
    chosen = (block[-1] - block) % 4 == 0
    assert every.shape == (2, 3, T) and (T <= M or every[:, :, -1].min() > 0)
    assert torch.allclose(layer.distance(log_mass, (q, k), 0), every[:, :, chosen], atol=1e-6)


@pytest.mark.parametrize("M", [1, 16])
def test_rows_go_through_in_chunks_with_the_same_result(M, monkeypatch):
    layer, (q, k, v) = attention(257, M), qkv(2, 3, 257, 16)
    whole = layer(q, k, v, teacher=(q, k))
    kl = layer.kl
    monkeypatch.setattr(sea, "MAP_ROWS", 85)             # of whole blocks, and their number no multiple of 4
    assert error(layer(q, k, v, teacher=(q, k)), whole) < 1e-5
    assert error(layer.kl, kl) < 1e-5


@pytest.mark.parametrize("cell_keys", [True, False])
@pytest.mark.parametrize("M", [1, 16])
def test_nothing_looks_ahead(M, cell_keys, T=70):
    layer, (q, k, v) = attention(T, M, cell_keys=cell_keys), qkv(1, 3, T, 16)
    estimate, mask, _ = layer.look(q, k, v)
    out = layer(q, k, v)
    for t in (1, M, 33, T - 1):
        changed = [torch.cat([x[:, :, :t], torch.randn_like(x[:, :, t:])], 2) for x in (q, k, v)]
        estimate2, mask2, _ = layer.look(*changed)
        assert torch.equal(estimate[:, :, :t], estimate2[:, :, :t])
        assert torch.equal(mask[:, :, :t], mask2[:, :, :t])
        assert torch.equal(out[:, :, :t], layer(*changed)[:, :, :t])
        assert not torch.equal(out[:, :, t:], layer(*changed)[:, :, t:])


def test_gradients_reach_q_k_v_and_every_parameter():
    layer, (q, k, v) = attention(100, 4), (x.requires_grad_() for x in qkv(2, 3, 100, 16))
    out = layer(q, k, v, teacher=(q.detach(), k.detach()))
    (out.square().mean() + layer.kl).backward()
    for name, x in [("q", q), ("k", k), ("v", v), *layer.named_parameters()]:
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.norm() > 0, name


def test_look_shows_the_attention_that_is_used(T=60):
    layer, (q, k, v) = attention(T, 4), qkv(1, 3, T, 16)
    estimate, mask, probabilities = layer.look(q, k, v)
    layer.gates.bias.data.fill_(1e9)
    assert error(probabilities @ v, layer(q, k, v)) < 1e-5
    assert not probabilities[~mask].any()
    assert torch.allclose(estimate[:, :, 4:].sum(-1), torch.ones(1, 3, T - 4))
    assert not estimate[:, :, :4].any()


@pytest.mark.parametrize("wrong", [dict(map_width=30), dict(map_width=0), dict(query_block=33),
                                   dict(query_block=0), dict(head_dim=12), dict(keys_per_query=0),
                                   dict(num_features=0)])
def test_a_configuration_that_cannot_work_says_so(wrong):
    with pytest.raises(ValueError):
        SEAConfig(**{"n_head": 2, "head_dim": 64, **wrong})
