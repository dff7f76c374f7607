"""
SEA: sparse linear attention with an estimated attention mask (ICLR 2024, arXiv 2310.01777), in plain PyTorch.

    estimate   the attention matrix at block resolution: T x W numbers instead of T x T
    select     for each query and head the blocks with the most estimated mass
    attend     exact softmax attention, to the keys of those blocks alone

B batch, H query heads, Hkv key heads (H is a multiple of Hkv), T tokens, R queries, which are the last R of the
T tokens, D head width, S block size in keys, W = T // S complete blocks. Block c holds keys [cS, (c+1)S); the own
block of query t is t // S. Nothing here has a parameter, but for the paper's estimator at the end.

kernels.py has sea_attention and attend once more, in Triton, with the same names, signatures and results.
"""
import importlib.util

import torch
import torch.nn as nn
import torch.nn.functional as F

if importlib.util.find_spec("triton"):
    import kernels

    backend = "triton" if torch.cuda.is_available() else "torch"
else:
    backend = "torch"

ROWS = 256    # queries that go through at a time: what bounds the memory of this file


def use_kernels(on):
    """Choose the backend of CUDA tensors: kernels.py, or this file, so that an edit of it has its effect."""
    global backend
    backend = "triton" if on else "torch"


# ----------------------------------------------------------------------------------------------------------
# SEA

def sea_attention(q, k, v, block_size=8, keys_per_query=48, coarse=8, scale=None):
    """Causal attention of each query to the blocks of keys with the most estimated mass.

    q (B, H, R, D), k and v (B, Hkv, T, D) -> (B, H, R, D). keys_per_query: keys that a query chooses, beside the
    first block, the block before its own and its own. coarse: blocks in a coarse block. scale None: D ** -0.5.
    A wrong shape, size or head count is a ValueError that names it.
    """
    check(q, k, v, block_size, keys_per_query, coarse)
    if q.is_cuda and backend == "triton":
        return kernels.sea_attention(q, k, v, block_size, keys_per_query, coarse, scale)

    R, T = q.shape[2], k.shape[2]
    q = q * (q.shape[3] ** -0.5 if scale is None else scale)
    out = []
    for start in range(0, R, ROWS):
        rows = q[:, :, start:start + ROWS]                          # (B, H, r, D)
        end = T - R + start + rows.shape[2]                         # nothing depends on a later key
        past_k, past_v = k[:, :, :end], v[:, :, :end]
        chosen = look_twice(rows, past_k, block_size, keys_per_query, coarse)
        out.append(attend(rows, past_k, past_v, chosen, block_size))
    return torch.cat(out, 2)


@torch.no_grad()
def look_twice(q, k, block_size, keys_per_query, coarse):
    """Choose blocks, first among coarse ones, then inside those: q, k as above, q scaled -> (B, H, R, W) bool."""
    R, T = q.shape[2], k.shape[2]
    wide = block_size * coarse                                      # keys in a coarse block
    n_coarse = max(8, keys_per_query // min(16, wide))
    n = max(1, keys_per_query // block_size)

    # First look: the coarse blocks that are worth a closer one, with the one that the query is in.
    scores = block_scores(q, moments(k, wide), wide, T - R)         # (B, H, R, T // wide)
    near = F.pad(select(scores, wide, n_coarse, T - R), (0, 1))     # (B, H, R, T // wide + 1)
    near |= torch.arange(near.shape[3], device=q.device) == own_block(R, T - R, wide, q.device)
    near = near.repeat_interleave(coarse, -1)[..., :T // block_size]

    # Second look: the blocks inside them. (All are scored here and most are masked; kernels.py skips those.)
    scores = block_scores(q, moments(k, block_size), block_size, T - R)
    scores = scores.masked_fill(~near, -torch.inf)                  # (B, H, R, W)
    return select(scores, block_size, n, T - R)


def moments(k, block_size):
    """Mean and half the variance of the keys of each complete block: (B, Hkv, T, D) -> (B, Hkv, W, 2D) float32."""
    W = k.shape[2] // block_size
    blocks = k[:, :, :W * block_size].unflatten(2, (W, block_size))              # (B, Hkv, W, S, D)
    blocks = blocks.to(torch.promote_types(k.dtype, torch.float32))
    mean = blocks.mean(3)                                                        # (B, Hkv, W, D)
    variance = (blocks - mean.unsqueeze(3)).square().mean(3)
    return torch.cat((mean, variance / 2), -1)


def block_scores(q, moments, block_size, first_row=0):
    """Log of the estimated mass of each block, up to a constant of the row; -inf from the own block on.

    For keys k of a block, log mean exp(q.k) = q.mean + var(q.k) / 2 + ..., the cumulant expansion. With a diagonal
    covariance that is (q, q*q) . (mean, variance / 2): the features of a linear attention, read out as logarithms.
    q (B, H, R, D), scaled, rows first_row .. of all; moments (B, Hkv, W, 2D) -> (B, H, R, W).
    """
    moments = moments.repeat_interleave(q.shape[1] // moments.shape[1], 1)       # (B, H, W, 2D)
    q = q.to(moments.dtype)
    with torch.autocast(q.device.type, enabled=False):              # neighbours are told apart by small differences
        scores = torch.cat((q, q * q), -1) @ moments.mT             # (B, H, R, W)
    block = torch.arange(scores.shape[3], device=q.device)
    return scores.masked_fill(block >= own_block(q.shape[2], first_row, block_size, q.device), -torch.inf)


def select(scores, block_size, n, first_row=0):
    """Block 0, the block before the own one, and beside these the n with the largest scores, ties to the lower one.

    scores (B, H, R, W), -inf where a block is not to be chosen -> (B, H, R, W) bool; all where there are fewer.
    """
    own = own_block(scores.shape[2], first_row, block_size, scores.device)       # (R, 1)
    block = torch.arange(scores.shape[3], device=scores.device)
    fixed = (block < own) & ((block == 0) | (block == own - 1))                  # (R, W)

    rivals = scores.masked_fill(fixed, -torch.inf)
    best = rivals.argsort(dim=-1, descending=True, stable=True)[..., :n]         # (B, H, R, n)
    chosen = torch.zeros_like(rivals, dtype=torch.bool).scatter(-1, best, True)
    return fixed | chosen & (rivals != -torch.inf)


def attend(q, k, v, chosen, block_size):
    """Exact softmax attention to the chosen blocks and, up to the query itself, to its own block.

    q (B, H, R, D), scaled, k and v (B, Hkv, T, D), chosen (B, H, R, W) bool -> (B, H, R, D).
    """
    if q.is_cuda and backend == "triton":
        return kernels.attend(q, k, v, chosen, block_size)
    mask = chosen_keys(chosen, k.shape[2], block_size)                           # (B, H, R, T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0, enable_gqa=True)


def chosen_keys(chosen, T, block_size):
    """The keys that each query attends to: chosen (B, H, R, W) bool -> (B, H, R, T) bool."""
    R, W = chosen.shape[2:]
    key = torch.arange(T, device=chosen.device)
    own = own_block(R, T - R, block_size, chosen.device)                         # (R, 1)
    keys = F.pad(chosen.repeat_interleave(block_size, -1), (0, T - W * block_size))
    return (keys | (key // block_size == own)) & (key <= key[T - R:, None])


def own_block(R, first_row, block_size, device):
    """The block that each of the rows first_row .. first_row + R - 1 lies in: (R, 1)."""
    return (first_row + torch.arange(R, device=device))[:, None] // block_size


def check(q, k, v, block_size, keys_per_query, coarse):
    """A ValueError that names the argument, where shapes or settings cannot work."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}; both must be (B, H, T, D)")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}; it must be that of k, {tuple(k.shape)}")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"k has shape {tuple(k.shape)}; its B and D must be those of q, {tuple(q.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, k {k.shape[1]}; q's must be a multiple of k's")
    if not 1 <= q.shape[2] <= k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} rows, k {k.shape[2]}; q's are the last ones of k's, at least one")
    for name, value in dict(block_size=block_size, keys_per_query=keys_per_query, coarse=coarse).items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value}; it must be a whole number, 1 or more")


# ----------------------------------------------------------------------------------------------------------
# For looking at

@torch.no_grad()
def estimated_attention(q, k, block_size=8, keys_per_query=48, coarse=8, scale=None):
    """What SEA sees: the estimate spread over the keys of each block, the keys chosen, their attention.

    q (B, H, T, D), k (B, Hkv, T, D) -> three (B, H, T, T). The own block is not estimated: zeros there.
    """
    T = k.shape[2]
    q = q * (q.shape[3] ** -0.5 if scale is None else scale)
    chosen = look_twice(q, k, block_size, keys_per_query, coarse)                # (B, H, T, W)
    mask = chosen_keys(chosen, T, block_size)                                    # (B, H, T, T)

    mass = block_scores(q, moments(k, block_size), block_size).softmax(-1)       # (B, H, T, W)
    mass = mass.nan_to_num(0) / block_size                          # the first rows have no complete block
    estimate = F.pad(mass.repeat_interleave(block_size, -1), (0, T % block_size))

    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)                         # (B, H, T, D)
    probabilities = (q @ k.mT).float().masked_fill(~mask, -torch.inf).softmax(-1)
    return estimate, mask, probabilities


# ----------------------------------------------------------------------------------------------------------
# The paper's own estimator

def kernel_attention(q, k, v, omega, chunk=64):
    """Causal linear attention: relu(x omega) + 0.001 in place of exp (Performer, arXiv 2009.14794).

    q, k (B, H, T, D), v (B, H, T, E), omega (D, F) -> (B, H, T, E). Inside a chunk of L rows it is a masked
    product; what lies before the chunk is a running sum.
    """
    T = q.shape[2]

    def chunks(x):
        return F.pad(x.float(), (0, 0, 0, -T % chunk)).unflatten(2, (-1, chunk))

    phi_q = F.relu(chunks(q) @ omega) + 1e-3                                     # (B, H, N, L, F)
    phi_k = F.relu(chunks(k) @ omega) + 1e-3
    v = F.pad(chunks(v), (0, 1), value=1.0)                         # the last column sums up to the denominator

    sums = phi_k.mT @ v                                                          # (B, H, N, F, E+1)
    before = sums.cumsum(2) - sums
    inside = (phi_q @ phi_k.mT).tril()                                           # (B, H, N, L, L)
    out = (phi_q @ before + inside @ v).flatten(2, 3)[:, :, :T]                  # (B, H, T, E+1)
    return out[..., :-1] / out[..., -1:]


def orthogonal_features(D, num_features):
    """Random omega (D, F) of kernel_attention: columns in orthogonal groups, each of norm sqrt(D)."""
    groups = [nn.init.orthogonal_(torch.empty(D, D)) for _ in range(-(-num_features // D))]
    return torch.cat(groups, 1)[:, :num_features] * D ** 0.5


def sinusoids(T, D, device=None):
    """The Transformer's fixed position code, which knows no largest length: (T, D)."""
    rate = 10_000 ** (-torch.arange(0, D, 2, device=device) / D)                 # (D/2,)
    angle = torch.arange(T, device=device)[:, None] * rate                       # (T, D/2)
    return torch.cat((angle.sin(), angle.cos()), -1)


def block_mass(q, k, block_size, first_row=0):
    """What the estimate learns: the attention's mass in each complete past block, renormalised; zeros if none.

    q (B, H, R, D), scaled, rows first_row .. of all, k (B, Hkv, T, D) -> (B, H, R, W). The one quadratic step.
    """
    W = k.shape[2] // block_size
    k = k[:, :, :W * block_size].repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q @ k.mT).float().unflatten(-1, (W, block_size)).logsumexp(-1)     # (B, H, R, W)
    block = torch.arange(W, device=q.device)
    past = block < own_block(q.shape[2], first_row, block_size, q.device)        # (R, W)
    return scores.masked_fill(~past, -torch.inf).softmax(-1).nan_to_num(0)


class PaperEstimator(nn.Module):
    """Attention with the paper's learned estimate (its figure 2): kernel attention -> MLP -> CNN -> picture.

    forward: q (B, H, T, D), scaled, k and v (B, H, T, D) -> (B, H, T, D), and the distance of the estimate from
    the attention of teacher = (q, k), nats per query, or None without one.
    """

    def __init__(self, n_head, head_dim, width=128, num_features=64):
        super().__init__()
        self.width = width                                          # columns of the picture
        self.register_buffer("omega", orthogonal_features(head_dim, num_features))
        self.encoder = nn.Sequential(nn.Linear(3 * head_dim, 2 * head_dim), nn.LayerNorm(2 * head_dim), nn.GELU())
        self.to_picture = nn.Linear(2 * head_dim, 2 * width // 4)   # 2 channels a head, a quarter as wide
        self.conv1 = nn.Conv2d(2 * n_head, 2 * n_head, 3, dilation=2, padding=(0, 2))
        self.conv2 = nn.Conv2d(2 * n_head, 2 * n_head, 3, dilation=2, padding=(0, 2))
        self.to_heads = nn.Conv2d(2 * n_head, n_head, 1)
        self.norm = nn.LayerNorm(width)
        self.gates = nn.Linear(2 * head_dim, 2)
        nn.init.zeros_(self.gates.weight)
        nn.init.constant_(self.gates.bias, 5.0)                     # sigmoid(5) = 0.993: it starts as attention alone

    def forward(self, q, k, v, block_size, keys_per_query, teacher=None):
        T = k.shape[2]
        n = max(1, keys_per_query // block_size)
        group = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(group, 1)                                        # (B, H, T, D)
        v = v.repeat_interleave(group, 1)
        picture, gates = self.draw(q.detach(), k.detach(), v.detach())           # (B, H, T, width), (B, H, T, 2)

        out, distances = [], []
        for start in range(0, T, ROWS):
            end = min(start + ROWS, T)
            scores = self.read(picture[:, :, start:end], start, block_size)      # (B, H, r, end // S)
            chosen = select(scores.detach(), block_size, n, start)
            out.append(attend(q[:, :, start:end], k[:, :, :end], v[:, :, :end], chosen, block_size))
            if teacher is not None:
                target = block_mass(teacher[0][:, :, start:end].detach(), teacher[1][:, :, :end].detach(),
                                    block_size, start)
                distances.append(block_kl(target, scores))

        # The paper's two gates: how much of the sparse attention, and how much of the running mean of v instead.
        keep, share = gates.to(v.dtype).split(1, -1)                             # (B, H, T, 1)
        mean = v.float().cumsum(2) / torch.arange(1, T + 1, device=v.device)[:, None]
        out = share * keep * torch.cat(out, 2) + (1 - share) * mean.to(v.dtype)
        return out, torch.cat(distances, 2).mean() if distances else None

    def draw(self, q, k, v):
        """The picture of the attention, whose columns stretch over each row's own past, and the gates."""
        B, H, T, D = v.shape
        position = sinusoids(T, D, v.device).expand(B, H, T, D).to(v.dtype)
        seen = kernel_attention(q, k, torch.cat((position, v), -1), self.omega)  # (B, H, T, 2D)
        code = self.encoder(torch.cat((seen.to(v.dtype), v), -1))                # (B, H, T, 2D)

        x = self.to_picture(code).unflatten(-1, (2, -1))                         # (B, H, T, 2, width/4)
        x = x.permute(0, 1, 3, 2, 4).flatten(1, 2)                               # (B, 2H, T, width/4)
        for conv in (self.conv1, self.conv2):
            x = F.relu(conv(F.pad(x, (0, 0, 4, 0))))                # causal: rows t - 4, t - 2 and t
        x = self.to_heads(x.repeat_interleave(4, -1))                            # (B, H, T, width)
        return self.norm(x), self.gates(code).sigmoid()

    def read(self, picture, first_row, block_size):
        """Scores of the blocks (B, H, r, W), from the column of the picture that each block's middle falls in."""
        R = picture.shape[2]
        row = first_row + torch.arange(R, device=picture.device)[:, None]        # (r, 1)
        block = torch.arange((first_row + R) // block_size, device=picture.device)
        column = ((2 * block + 1) * block_size * self.width // (2 * (row + 1))).clamp(max=self.width - 1)
        scores = picture.float().gather(-1, column.expand(*picture.shape[:2], -1, -1))
        return scores.masked_fill(block >= row // block_size, -torch.inf)


def block_kl(target, scores):
    """KL(target || softmax of scores) of each row: two (B, H, R, W) -> (B, H, R), 0 where there is no past."""
    log_estimate = scores.masked_fill(scores == -torch.inf, -1e4).log_softmax(-1)
    return F.kl_div(log_estimate, target, reduction="none").sum(-1)
