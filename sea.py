"""
SEA: sparse linear attention with an estimated attention mask (ICLR 2024, arXiv 2310.01777).

    estimate   the attention matrix at block resolution: T x W numbers instead of T x T
    select     for each query and head the blocks with the most estimated mass
    attend     exact softmax attention, to the keys of those blocks alone

The paper learns its estimate with a small network (PaperEstimator, at the end). Here it is
computed, without parameters, from the mean and the variance of each block's keys.

B batch, H query heads, Hkv key heads (H is a multiple of Hkv), T tokens, D head width. The R
queries are the last R tokens. Block c holds the S keys from cS on; there are W = T // S complete
blocks, and query t lies in block t // S, its own.

This file is the definition, in plain PyTorch: it computes every score and masks what is not
chosen, so it is no faster than dense attention. kernels.py has sea_attention, attend and
decode once more, in Triton, with the same results up to rounding, and skips that work.
"""
import importlib.util

import torch
import torch.nn as nn
import torch.nn.functional as F

if importlib.util.find_spec("triton"):
    import kernels
else:
    kernels = None

backend = "triton" if kernels and torch.cuda.is_available() else "torch"

ROWS = 256    # queries handled at a time, which bounds the memory of inference


def use_kernels(on):
    """Send CUDA tensors to kernels.py, or keep them here, so that edits of this file count."""
    global backend
    backend = "triton" if on and kernels else "torch"


# --------------------------------------------------------------------------------------------------
# SEA

def sea_attention(q, k, v, block_size=8, keys_per_query=48, coarse=8, scale=None):
    """Causal attention of each query to the blocks of keys with the most estimated mass.

    q (B, H, R, D), k and v (B, Hkv, T, D) -> (B, H, R, D). keys_per_query: keys that a query
    chooses, in whole blocks, beside the first block, the one before its own, and its own. coarse:
    blocks in a coarse block. scale: a number, D ** -0.5 if None. What does not fit raises a
    ValueError. Under autocast it takes its type, as PyTorch's attention does.
    """
    q, k, v = under_autocast(q, k, v)
    check(q, k, v, block_size, keys_per_query, coarse)
    if q.is_cuda and backend == "triton":
        return kernels.sea_attention(q, k, v, block_size, keys_per_query, coarse, scale)

    q = q * (q.shape[3] ** -0.5 if scale is None else scale)
    end = k.shape[2] - q.shape[2]
    out = []
    for rows in q.split(ROWS, 2):                                   # (B, H, r, D)
        end += rows.shape[2]                                        # no later key is looked at
        chosen = look_twice(rows, k[:, :, :end], block_size, keys_per_query, coarse)
        out.append(attend(rows, k[:, :, :end], v[:, :, :end], chosen, block_size))
    return torch.cat(out, 2)


@torch.no_grad()
def look_twice(q, k, block_size, keys_per_query, coarse):
    """Choose coarse blocks, then blocks inside those: q (B, H, R, D), scaled, k (B, Hkv, T, D) ->
    (B, H, R, W) bool.

    kernels.py scores T / (S coarse) coarse blocks, then blocks whose number does not grow with T;
    here all are scored, and masked.
    """
    fine = moments(k, block_size)                                                # (B, Hkv, W, 2D)
    wide = moments(k, block_size * coarse)
    return choose(q, fine, wide, block_size, keys_per_query, coarse, k.shape[2] - q.shape[2])


def choose(q, fine_moments, wide_moments, block_size, keys_per_query, coarse, first_row):
    """look_twice by given moments; first_row: position of the first query, an int or (1,)."""
    W_wide = wide_moments.shape[2]
    n, n_wide = budgets(block_size, keys_per_query, coarse)
    scores = block_scores(q, fine_moments, block_size, first_row)                # (B, H, R, W)

    # First look: the coarse blocks that are worth a closer one, and the own one, which may be
    # incomplete, hence the extra column. If there are few, all would be kept: skip the look.
    if W_wide > n_wide + 2:
        wide = block_size * coarse                                  # keys in a coarse block
        wide_scores = block_scores(q, wide_moments, wide, first_row)             # (B, H, R, W_wide)
        near = F.pad(select(wide_scores, wide, n_wide, first_row), (0, 1))
        own = own_block(q.shape[2], first_row, wide, q.device)                   # (R, 1)
        near |= torch.arange(W_wide + 1, device=q.device) == own
        near = near.repeat_interleave(coarse, -1)[..., :scores.shape[3]]         # (B, H, R, W)
        scores = scores.masked_fill(~near, -torch.inf)

    # Second look, inside them. All were scored above; kernels.py skips what is masked.
    return select(scores, block_size, n, first_row)


def budgets(block_size, keys_per_query, coarse=8):
    """How many blocks a query chooses, and how many coarse blocks it looks into for them."""
    n = max(1, keys_per_query // block_size)
    # Several times what n blocks fill, since the best ones are scattered: one for each 16 keys of
    # the budget, and 8 at least. If a coarse block holds fewer keys, one for as many as it holds:
    # so a budget of T keeps all.
    n_wide = max(8, keys_per_query // min(16, block_size * coarse))
    return n, n_wide


def moments(k, block_size):
    """Mean and half the variance of each complete block's keys (B, Hkv, T, D): (B, Hkv, W, 2D)."""
    W = k.shape[2] // block_size
    blocks = k[:, :, :W * block_size].unflatten(2, (W, block_size))              # (B, Hkv, W, S, D)
    blocks = blocks.to(torch.promote_types(k.dtype, torch.float32))              # or float64
    mean = blocks.mean(3)                                                        # (B, Hkv, W, D)
    variance = (blocks - mean.unsqueeze(3)).square().mean(3)
    return torch.cat((mean, variance / 2), -1)


def block_scores(q, block_moments, block_size, first_row=0):
    """Log of the estimated mass of each block, up to a constant of the row.

    For the keys k of a block, log mean exp(q.k) = q.mean + var(q.k) / 2 + ..., the cumulants (exact
    if they are normal). With a diagonal covariance it is (q, q*q) . (mean, variance / 2): features
    of q times features of the keys, summed before any query is known, as in linear attention.

    q (B, H, R, D), scaled, rows first_row .. of T, block_moments (B, Hkv, W, 2D) -> (B, H, R, W),
    -inf from the query's own block on.
    """
    B, H, R, D = q.shape
    HKV, W = block_moments.shape[1:3]
    q = q.to(block_moments.dtype)
    # Heads of q that share a head of k become further rows of one product.
    features = torch.cat((q, q * q), -1)
    features = features.view(B, HKV, R * H // HKV, 2 * D)                        # (B, Hkv, .., 2D)
    with torch.autocast(q.device.type, enabled=False):              # small differences decide
        scores = (features @ block_moments.mT).view(B, H, R, W)
    block = torch.arange(W, device=q.device)
    future = block >= own_block(R, first_row, block_size, q.device)              # (R, W)
    return scores.masked_fill(future, -torch.inf)


def select(scores, block_size, n, first_row=0):
    """Block 0, the block before the own one, and beside these the n with the largest scores.

    scores (B, H, R, W), which must be -inf from the own block on -> (B, H, R, W) bool. A block of
    score -inf is never one of the n. Of equal scores the lower block wins, NaN is above all
    numbers; all are taken if fewer than n remain.
    """
    R, W = scores.shape[2:]
    block = torch.arange(W, device=scores.device)
    own = own_block(R, first_row, block_size, scores.device)                     # (R, 1)
    # A pretrained model parks attention on its first token, and neighbours matter to any model.
    fixed = (block < own) & ((block == 0) | (block == own - 1))                  # (R, W)

    rivals = scores.masked_fill(fixed, -torch.inf)
    best = rivals.argsort(dim=-1, descending=True, stable=True)[..., :n]         # (B, H, R, n)
    chosen = torch.zeros_like(rivals, dtype=torch.bool).scatter(-1, best, True)
    return fixed | (chosen & (rivals != -torch.inf))


def attend(q, k, v, chosen, block_size):
    """Exact softmax attention to the chosen blocks and, up to the query itself, to its own block.

    q (B, H, R, D), scaled, k and v (B, Hkv, T, D), chosen (B, H, R, W) bool, complete blocks before
    the own one -> (B, H, R, D).
    """
    if q.is_cuda and backend == "triton":
        return kernels.attend(q, k, v, chosen, block_size)
    mask = chosen_keys(chosen, k.shape[2], block_size)                           # (B, H, R, T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0, enable_gqa=True)


def chosen_keys(chosen, T, block_size):
    """The keys that each query attends to: chosen (B, H, R, W) bool -> (B, H, R, T) bool."""
    key = torch.arange(T, device=chosen.device)
    row = key[T - chosen.shape[2]:, None]                                        # (R, 1)
    keys = F.pad(chosen, (0, 1)).repeat_interleave(min(block_size, T), -1)[..., :T]
    return (keys | (key // block_size == row // block_size)) & (key <= row)


def own_block(R, first_row, block_size, device):
    """The block of each of R rows from first_row on, an int or a tensor (1,): (R, 1)."""
    return (first_row + torch.arange(R, device=device))[:, None] // block_size


def under_autocast(*tensors):
    """The tensors, of autocast's type where that is on."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return [x.to(torch.get_autocast_dtype(device)) for x in tensors]


def check(q, k, v, block_size, keys_per_query, coarse=1):
    """A ValueError that names the argument, where shapes or settings cannot work."""
    shapes = f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(shapes + "q must be (B, H, R, D), k and v (B, Hkv, T, D)")
    if v.shape != k.shape:
        raise ValueError(shapes + "v must have the shape of k")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(shapes + "B and D of k must be those of q")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(shapes + "the heads of q must be a multiple of those of k")
    if not 1 <= q.shape[2] <= k.shape[2]:
        raise ValueError(shapes + "q must have 1 to T rows, the last ones of k's")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; they must be of one type")
    settings = dict(block_size=block_size, keys_per_query=keys_per_query, coarse=coarse)
    for name, value in settings.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value}; it must be a whole number, 1 or more")


# --------------------------------------------------------------------------------------------------
# One token at a time

class KeysAndValues:
    """k, v (B, Hkv, T, D) of a layer's tokens so far, then zeros up to `room` tokens, or to the
    next multiple of `unit`."""

    def __init__(self, k, v, room, unit=1):
        if room < k.shape[2]:
            raise ValueError(f"room is {room}, and there are {k.shape[2]} tokens already")
        rest = -(-room // unit) * unit - k.shape[2]
        self.k = F.pad(k, (0, 0, 0, rest)).contiguous()             # (B, Hkv, room, D)
        self.v = F.pad(v, (0, 0, 0, rest)).contiguous()

    def append(self, k, v, position):
        """Keep k, v (B, Hkv, 1, D) of the token at position (1,)."""
        self.k.index_copy_(2, position, k)
        self.v.index_copy_(2, position, v)


class Cache(KeysAndValues):
    """What decode needs: keys, values, and the moments of blocks and of coarse blocks.

    Those of a block that is not complete are wrong, and are not looked at.
    """

    def __init__(self, k, v, room, block_size=8, coarse=8):
        wide = block_size * coarse
        super().__init__(k, v, room, wide)                          # whole coarse blocks
        self.block_size = block_size
        self.coarse = coarse
        if k.is_cuda and backend == "triton":
            both = kernels.moments(self.k, block_size, coarse)
        else:
            both = moments(self.k, block_size), moments(self.k, wide)
        self.moments, self.wide_moments = both                      # (B, Hkv, room / S or wide, 2D)

    def append(self, k, v, position):
        """Keep k, v (B, Hkv, 1, D) of the token at position (1,), and its blocks' new moments."""
        if k.is_cuda and backend == "triton":
            return kernels.append(self, k, v, position)
        super().append(k, v, position)
        wide = self.block_size * self.coarse
        for size, kept in (self.block_size, self.moments), (wide, self.wide_moments):
            block = position // size                                             # (1,)
            keys = block * size + torch.arange(size, device=k.device)
            kept.index_copy_(2, block, moments(self.k.index_select(2, keys), size))


@torch.no_grad()
def decode(q, cache, position, keys_per_query=48, scale=None):
    """sea_attention of the token at position (1,), which the cache holds: q (B, H, 1, D) -> alike.

    The position changes numbers alone, never a shape or a branch: one CUDA graph can serve every
    token.
    """
    check(q, cache.k, cache.v, cache.block_size, keys_per_query, cache.coarse)
    if q.is_cuda and backend == "triton":
        return kernels.decode(q, cache, position, keys_per_query, scale)
    S = cache.block_size
    q = q * (q.shape[3] ** -0.5 if scale is None else scale)
    chosen = choose(q, cache.moments, cache.wide_moments, S, keys_per_query, cache.coarse, position)
    chosen |= torch.arange(chosen.shape[3], device=q.device) == position // S    # the own one, too

    # The chosen blocks, then others, as many as a query can have: n and the three that are fixed.
    most = budgets(S, keys_per_query, cache.coarse)[0] + 3
    block = chosen.byte().argsort(dim=-1, descending=True, stable=True)[..., :most]
    real = chosen.gather(-1, block)                                              # (B, H, 1, most)

    # Attend to their keys alone, of all that there is room for.
    key = (block[..., None] * S + torch.arange(S, device=q.device)).flatten(-2)  # (B, H, 1, most S)
    mask = real.repeat_interleave(S, -1) & (key <= position)
    k = rows_of(cache.k, key)                                                    # (B, H, most S, D)
    v = rows_of(cache.v, key)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


def rows_of(x, index):
    """Rows index (B, H, 1, n) of x (B, Hkv, N, D), whose heads are shared -> (B, H, n, D)."""
    B, H, _, n = index.shape
    index = index.reshape(B, x.shape[1], -1, 1).expand(-1, -1, -1, x.shape[3])   # (B, Hkv, .., D)
    return x.gather(2, index).view(B, H, n, -1)


# --------------------------------------------------------------------------------------------------
# For looking at

@torch.no_grad()
def estimated_attention(q, k, block_size=8, keys_per_query=48, coarse=8, scale=None):
    """What SEA sees: the estimate spread over each block's keys, the keys chosen, their attention.

    q (B, H, R, D), k (B, Hkv, T, D) -> three (B, H, R, T). The own block is not estimated: zeros.
    """
    check(q, k, k, block_size, keys_per_query, coarse)
    R = q.shape[2]
    T = k.shape[2]
    q = q * (q.shape[3] ** -0.5 if scale is None else scale)
    chosen = look_twice(q, k, block_size, keys_per_query, coarse)                # (B, H, R, W)
    mask = chosen_keys(chosen, T, block_size)                                    # (B, H, R, T)

    scores = block_scores(q, moments(k, block_size), block_size, T - R)          # (B, H, R, W)
    mass = scores.softmax(-1).nan_to_num(0)                         # NaN: no complete block yet
    estimate = (mass / block_size).repeat_interleave(block_size, -1)
    estimate = F.pad(estimate, (0, T % block_size))                              # (B, H, R, T)
    return estimate, mask, attention_to(mask, q, k)


def attention_to(mask, q, k):
    """Softmax attention to the keys of a mask, (.., R, T) bool, as a matrix.

    q (B, H, R, D), scaled, k (B, Hkv, T, D) -> (B, H, R, T) float32.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)                         # (B, H, T, D)
    return (q @ k.mT).float().masked_fill(~mask, -torch.inf).softmax(-1)


# --------------------------------------------------------------------------------------------------
# The paper's own estimator

def kernel_attention(q, k, v, omega, chunk=64):
    """Causal linear attention: relu(x omega) + 0.001 in place of exp (arXiv 2009.14794).

    q, k (B, H, T, D), v (B, H, T, E), omega (D, F) -> (B, H, T, E) float32. Inside a chunk of L
    rows it is a masked product; what lies before the chunk is a running sum.
    """
    T = q.shape[2]
    omega = omega.float()

    def chunks(x):
        return F.pad(x.float(), (0, 0, 0, -T % chunk)).unflatten(2, (-1, chunk))

    with torch.autocast(q.device.type, enabled=False):              # sums of many need all digits
        phi_q = F.relu(chunks(q) @ omega) + 1e-3                                 # (B, H, N, L, F)
        phi_k = F.relu(chunks(k) @ omega) + 1e-3
        v = F.pad(chunks(v), (0, 1), value=1.0)                     # the ones give the denominator

        sums = phi_k.mT @ v                                                      # (B, H, N, F, E+1)
        before = F.pad(sums[:, :, :-1].cumsum(2), (0, 0, 0, 0, 1, 0))            # of earlier chunks
        inside = (phi_q @ phi_k.mT).tril()                                       # (B, H, N, L, L)
        out = (phi_q @ before + inside @ v).flatten(2, 3)[:, :, :T]              # (B, H, T, E+1)
    return out[..., :-1] / out[..., -1:]


def orthogonal_features(D, num_features):
    """Random omega (D, F) of kernel_attention: orthogonal columns, D at a time, of norm sqrt(D)."""
    count = -(-num_features // D)
    squares = [nn.init.orthogonal_(torch.empty(D, D, dtype=torch.float32)) for _ in range(count)]
    return torch.cat(squares, 1)[:, :num_features] * D ** 0.5


def sinusoids(T, D, device=None):
    """The Transformer's fixed position code, which knows no largest length: (T, D)."""
    pair = torch.arange(0, D, 2, device=device, dtype=torch.float32)
    rate = 10_000 ** (-pair / D)                                                 # (D/2,)
    angle = torch.arange(T, device=device)[:, None] * rate                       # (T, D/2)
    return torch.cat((angle.sin(), angle.cos()), -1)


@torch.no_grad()
def block_mass(q, k, block_size, first_row=0):
    """The target of PaperEstimator: dense attention's mass in each past block, shares of their sum.

    q (B, H, R, D), scaled, rows first_row .. of T, k (B, Hkv, T, D) -> (B, H, R, W), zeros where
    there is no complete past block. It needs all T x T scores.
    """
    W = k.shape[2] // block_size
    k = k[:, :, :W * block_size].repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q @ k.mT).float().unflatten(-1, (W, block_size)).logsumexp(-1)     # (B, H, R, W)
    own = own_block(q.shape[2], first_row, block_size, q.device)                 # (R, 1)
    scores = scores.masked_fill(torch.arange(W, device=q.device) >= own, -torch.inf)
    return scores.softmax(-1).nan_to_num(0)


def block_kl(target, scores):
    """KL(target || softmax of scores): two (B, H, R, W) -> (B, H, R), 0 for rows without a past."""
    log_estimate = scores.masked_fill(scores == -torch.inf, -1e4).log_softmax(-1)
    return F.kl_div(log_estimate, target, reduction="none").sum(-1)


class PaperEstimator(nn.Module):
    """Attention by the paper's estimate: kernel attention -> MLP -> CNN -> picture (its figure 2).

    Row t of the picture is the attention of query t, whose past is squeezed into `width` columns.
    It learns by its distance to the teacher's block_mass alone, as choosing has no gradient.

    forward: q (B, H, T, D), scaled, k and v (B, Hkv, T, D) -> (B, H, T, D), and the distance of the
    estimate from the attention of teacher = (q, k): nats, a mean over all rows; None without one.
    """

    def __init__(self, n_head, head_dim, width=128, num_features=64):
        super().__init__()
        C = 2 * n_head                                              # channels: two a head
        self.width = width                                          # columns of the picture
        self.register_buffer("omega", orthogonal_features(head_dim, num_features))
        self.linear = nn.Linear(3 * head_dim, 2 * head_dim)
        self.norm_in = nn.LayerNorm(2 * head_dim)
        self.to_picture = nn.Linear(2 * head_dim, 2 * width // 4)   # at a quarter of the width
        self.conv1 = nn.Conv2d(C, C, 3, dilation=2, padding=(0, 2))
        self.conv2 = nn.Conv2d(C, C, 3, dilation=2, padding=(0, 2))
        self.to_heads = nn.Conv2d(C, n_head, 1)
        self.norm_out = nn.LayerNorm(width)
        self.gates = nn.Linear(2 * head_dim, 2)
        nn.init.zeros_(self.gates.weight)
        nn.init.constant_(self.gates.bias, 5.0)                     # 0.993: attention alone

    def forward(self, q, k, v, block_size, keys_per_query, teacher=None):
        check(q, k, v, block_size, keys_per_query)
        T = k.shape[2]
        if q.shape[2] < T:
            raise ValueError(f"q has {q.shape[2]} rows; this estimator needs all {T}")
        group = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(group, 1)                                        # (B, H, T, D)
        v = v.repeat_interleave(group, 1)
        n, _ = budgets(block_size, keys_per_query)
        picture, gates = self.draw(q.detach(), k.detach(), v.detach())

        out = []
        distances = []
        for start in range(0, T, ROWS):
            rows = slice(start, start + ROWS)
            past = slice(0, start + ROWS)
            scores = self.read(picture[:, :, rows], start, block_size)           # (B, H, r, W)
            chosen = select(scores.detach(), block_size, n, start)
            out.append(attend(q[:, :, rows], k[:, :, past], v[:, :, past], chosen, block_size))
            if teacher is not None:
                teacher_q, teacher_k = teacher
                target = block_mass(teacher_q[:, :, rows], teacher_k[:, :, past], block_size, start)
                distances.append(block_kl(target, scores))                       # (B, H, r)

        # Two gates: mix gain * attention with the running mean of v.
        gain, mix = gates.to(v.dtype).split(1, -1)                               # (B, H, T, 1)
        mean = v.float().cumsum(2) / torch.arange(1, T + 1, device=v.device)[:, None]
        out = mix * gain * torch.cat(out, 2) + (1 - mix) * mean.to(v.dtype)
        return out, torch.cat(distances, 2).mean() if distances else None

    def draw(self, q, k, v):
        """The picture (B, H, T, width), whose columns stretch over a row's past, and two gates."""
        B, H, T, D = v.shape
        position = sinusoids(T, D, v.device).to(v.dtype).expand(B, H, T, D)
        seen = kernel_attention(q, k, torch.cat((position, v), -1), self.omega)  # (B, H, T, 2D)
        code = self.linear(torch.cat((seen.to(v.dtype), v), -1))                 # (B, H, T, 2D)
        code = F.gelu(self.norm_in(code))

        x = self.to_picture(code).unflatten(-1, (2, -1))                         # (B, H, T, 2, w/4)
        x = x.transpose(2, 3).flatten(1, 2)                                      # (B, 2H, T, w/4)
        x = F.relu(self.conv1(F.pad(x, (0, 0, 4, 0))))              # causal: rows t - 4, t - 2, t
        x = F.relu(self.conv2(F.pad(x, (0, 0, 4, 0))))
        x = self.to_heads(x.repeat_interleave(4, -1))                            # (B, H, T, w)
        return self.norm_out(x), self.gates(code).sigmoid()

    def read(self, picture, first_row, block_size):
        """Scores (B, H, r, W) of blocks, each by the column that its middle falls in."""
        r = picture.shape[2]
        row = first_row + torch.arange(r, device=picture.device)[:, None]        # (r, 1)
        block = torch.arange((first_row + r) // block_size, device=picture.device)
        column = (2 * block + 1) * block_size * self.width // (2 * (row + 1))    # (r, W)
        column = column.clamp(max=self.width - 1).expand(*picture.shape[:2], -1, -1)
        scores = picture.float().gather(-1, column)
        return scores.masked_fill(block >= row // block_size, -torch.inf)
