"""
SEA: sparse linear attention with an estimated attention mask (ICLR 2024, arXiv 2310.01777), in plain PyTorch.

    estimate   a narrow picture of the attention matrix: W cells a row instead of T keys
    select     the best cells, over all heads together (grouped top-k)
    attend     exact softmax attention, on the keys of the selected cells alone
    mix        with the running mean of the values, by a learned gate

B batch, H heads, T tokens, D head width; every tensor is (B, H, T, D). F = num_features, the width of phi
(but F.relu and the like are torch.nn.functional).
M = query_block: block g holds queries g*M .. g*M + M-1, and its anchor is a = g*M. W = map_width: the past
[0, a) of a block is cut into W cells, runs of keys, whose bounds its M queries share; each query estimates
and selects for itself. Where R rows of N blocks are given instead of all T, they start at first_row.

Below come geometry, selection, attention, the estimate, and SEAttention, which puts them together.
kernel_attention, log_mass, select, attend and pool define the result; kernels.py has the same five in Triton.
"""
import importlib.util
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

MAP_ROWS = 8192    # rows of the map that are made at a time: what bounds the memory at inference


@dataclass
class SEAConfig:
    n_head: int
    head_dim: int
    map_width: int = 512         # W, cells in a row of the map (the paper's K)
    keys_per_query: int = 64     # mean number of selected past keys per query and head (the paper's k)
    query_block: int = 16        # M, neighbouring queries that share cell bounds; 1 is the paper
    num_features: int = 64       # F, width of phi in the kernel attention
    cell_keys: bool = True       # q . mean(keys of the cell) in place of the paper's CNN; False is the paper

    def __post_init__(self):
        if self.map_width < 4 or self.map_width % 4:
            raise ValueError(f"map_width is {self.map_width}; it must be a positive multiple of 4")
        if not 1 <= self.query_block <= 32:
            raise ValueError(f"query_block is {self.query_block}; it must be from 1 to 32")
        if self.head_dim < 8 or self.head_dim % 8:
            raise ValueError(f"the width of a head is {self.head_dim}; it must be a positive multiple of 8")
        if self.keys_per_query < 1 or self.num_features < 1:
            raise ValueError("keys_per_query and num_features must be 1 or more")


# ------------------------------------------------------------------------------------------------------------
# Geometry: which keys a cell holds, how many cells a query may choose

def anchors(first_row, R, M, device=None):
    """Anchors of the N blocks that hold rows first_row .. first_row + R-1: (N,) int64."""
    return torch.arange(first_row // M, -(-(first_row + R) // M), device=device) * M


def rows_of(blocks, M):
    """Rows of blocks, also those that the last one may lack: (N,) int64 -> (N*M,)."""
    return (blocks[:, None] * M + torch.arange(M, device=blocks.device)).flatten()


def cell_bounds(anchor, W):
    """Cell c of a block holds keys [bounds[c], bounds[c + 1]): anchors (N,) -> (N, W + 1) int64."""
    return anchor[:, None] * torch.arange(W + 1, device=anchor.device) // W


def cell_of_key(rows, T, M, W):
    """Is a key in the past of a query, and in which of its cells: rows (R,) -> bool, int64, both (R, T)."""
    j, a = torch.arange(T, device=rows.device), (rows // M * M)[:, None]                      # T; R 1
    return j < a, (((j + 1) * W - 1) // a.clamp(min=1)).clamp(max=W - 1)


def cell_budget(anchor, H, W, keys_per_query):
    """Cells that each query of a block chooses over all heads: anchors (N,) -> (N,) int64."""
    keys_per_cell = (anchor.double() / W).clamp(min=1)
    cells = (H * keys_per_query / keys_per_cell).round().long().clamp(min=1)
    return torch.minimum(cells, H * anchor.clamp(max=W))


def block_rows(x, first_row, M):
    """Rows (B, H, R, ...) from first_row on -> whole blocks (B, H, N, M, ...), missing rows as zeros."""
    front = first_row % M
    missing = (0, 0) * (x.ndim - 3) + (front, -(front + x.shape[2]) % M)
    return F.pad(x, missing).unflatten(2, (-1, M))


def running_dtype(x):
    """Sums over many tokens are kept in float32, or in float64 if x is."""
    return torch.promote_types(x.dtype, torch.float32)


def wide(x):
    """float16 as float32, since scores may pass 65504; all else as it is."""
    return x.float() if x.dtype == torch.float16 else x


def cumulative_sum(x, start=0., chunk=64):
    """(B, H, T, D) -> the same: row t is start + the sum of rows 0 .. t. In chunks of rows, and then of their
    sums, since torch.cumsum along T alone keeps few of a GPU's threads busy."""
    if x.shape[2] <= chunk:
        return x.cumsum(2, dtype=running_dtype(x)) + start
    inside = block_rows(x, 0, chunk).cumsum(3, dtype=running_dtype(x))                        # B H N L D
    before = F.pad(inside[:, :, :-1, -1], (0, 0, 1, 0)).cumsum(2) + start                     # B H N D
    return (inside + before[:, :, :, None]).flatten(2, 3)[:, :, :x.shape[2]]


def running_sum(x, start=0., summed=cumulative_sum):
    """(B, H, T, D) -> (B, H, T + 1, D): row t is start + the sum of rows 0 .. t-1. It is large: no second
    tensor of its size is made on the way. summed: cumulative_sum, or as it was compiled."""
    sums = x.new_empty(*x.shape[:2], x.shape[2] + 1, x.shape[3], dtype=running_dtype(x))
    sums[:, :, :1] = start
    for i in range(0, x.shape[2], MAP_ROWS):
        rows = x[:, :, i:i + MAP_ROWS]
        sums[:, :, i + 1:i + 1 + rows.shape[2]] = summed(rows, sums[:, :, i:i + 1])
    return sums


# ------------------------------------------------------------------------------------------------------------
# Select: grouped top-k of the estimated mass, into FlatCSR over cells

class FlatCSR(NamedTuple):
    """The selected cells of the last N blocks. Block n of batch b is a row; its run of head h is the entries
    crow[b, n, h] to crow[b, n, h + 1]. An entry is a cell that at least one query of the block chose.

    Rows may stand apart: the room of a row is bounded in advance, so nothing is counted before it is written.
    """
    crow: Tensor       # (B, N, H + 1) int64, positions in dimension 1 of cells and queries
    cells: Tensor      # (B, room) int32, column h*W + c, ascending in a row; 0 where unused
    queries: Tensor    # (B, room) int32, bit m is set where the block's query m chose the cell; 0 if unused
    T: int             # keys, up to the last query
    query_block: int
    map_width: int


def flat_csr_layout(anchor, H, M, W, keys_per_query):
    """Place of the rows, known before any data: anchors (N,) -> budget, first entry (N,), room in all."""
    budget = cell_budget(anchor, H, W, keys_per_query)
    room = torch.minimum(M * budget, H * anchor.clamp(max=W))
    return budget, room.cumsum(0) - room, int(room.sum())


@torch.compiler.disable        # sizes depend on the data
def select(mass, query_block, keys_per_query, first_row=0):
    """Give each query its cell_budget largest estimates over all heads, the lower column first among equals.

    mass (B, H, R, W): the estimated mass of each cell, or its log, which has the same order -> FlatCSR. Empty
    cells are never selected. This is the paper's grouped top-k, for each query apart.
    """
    (B, H, R, W), M, device = mass.shape, query_block, mass.device
    anchor = anchors(first_row, R, M)
    budget, first, room = flat_csr_layout(anchor, H, M, W, keys_per_query)
    full = (cell_bounds(anchor, W).diff() > 0).to(device)[:, None, None]                      # N 1 1 W
    real = block_rows(mass.new_ones(1, 1, R), first_row, M)[0, 0, :, :, None] > 0             # N M 1
    rows = block_rows(mass, first_row, M).permute(0, 2, 3, 1, 4)                              # B N M H W
    rows = torch.where(full, rows, -torch.inf).flatten(3)                                     # B N M HW
    order = rows.sort(dim=-1, descending=True, stable=True).indices                           # B N M HW
    keep = (torch.arange(H * W, device=device) < budget.to(device)[:, None, None]) & real     # N M HW
    chosen = torch.zeros_like(order).scatter_(-1, order, keep.long().expand_as(order))  # B N M HW, 0 or 1
    bits = (chosen << torch.arange(M, device=device)[:, None]).sum(2)                         # B N HW
    rank = (bits != 0).cumsum(-1)                                                             # B N HW
    crow = first.to(device)[:, None] + F.pad(rank[..., W - 1::W], (1, 0))                     # B N H+1
    b, n, column = bits.nonzero(as_tuple=True)
    entry = crow[b, n, 0] + rank[b, n, column] - 1
    cells, queries = torch.zeros(2, B, room, dtype=torch.int32, device=device)
    cells[b, entry], queries[b, entry] = column.int(), bits[b, n, column].int()
    return FlatCSR(crow, cells, queries, first_row + R, M, W)


def join(masks):
    """One FlatCSR from those of consecutive rows."""
    if len(masks) == 1:
        return masks[0]
    starts = [sum(m.cells.shape[1] for m in masks[:i]) for i in range(len(masks))]
    crow = torch.cat([m.crow + start for m, start in zip(masks, starts)], 1)
    cells, queries = torch.cat([m.cells for m in masks], 1), torch.cat([m.queries for m in masks], 1)
    return FlatCSR(crow, cells, queries, *masks[-1][3:])


def selected_cells(mask):
    """FlatCSR -> (B, H, N*M, W) bool: the cells that each query of its blocks chose."""
    (B, N, H), M, W, device = mask.crow[..., 1:].shape, mask.query_block, mask.map_width, mask.crow.device
    entry = torch.arange(mask.cells.shape[1], device=device).repeat(B, 1)                     # B room
    row = torch.searchsorted(mask.crow[..., 0].contiguous(), entry, right=True) - 1           # B room
    bits = mask.queries.new_zeros(B, N * H * W)
    bits.scatter_add_(1, row * (H * W) + mask.cells, mask.queries)                # unused entries add 0
    bits = bits.view(B, N, H, 1, W) >> torch.arange(M, device=device)[:, None] & 1            # B N H M W
    return bits.bool().transpose(1, 2).flatten(2, 3)                                          # B H NM W


def flat_csr_to_dense(mask, B, H):
    """FlatCSR of all rows -> (B, H, T, T) bool, true where a query attends to a key; for tests, pictures."""
    return allowed_keys(mask, selected_cells(mask), torch.arange(mask.T, device=mask.crow.device))


def allowed_keys(mask, chosen, rows):
    """The keys that `rows` (R,) attend to, those of chosen cells and of the own block: (B, H, R, T) bool."""
    T, M, W = mask.T, mask.query_block, mask.map_width
    past, cell = cell_of_key(rows, T, M, W)                                                   # R T
    causal = torch.arange(T, device=rows.device) <= rows[:, None]                             # R T
    first_row = -(-T // M) * M - chosen.shape[2]
    chosen = chosen[:, :, rows - first_row].gather(-1, cell.expand(*chosen.shape[:2], -1, -1))    # B H R T
    return torch.where(past, chosen, causal)


# ------------------------------------------------------------------------------------------------------------
# Attend, and the attention that the estimate learns from. Rows go through in chunks: nothing of T x T is kept

def attend_rows(q, k, v, allowed, chunk=256):
    """Softmax attention of the last R queries over the keys that allowed(rows) -> (..., R, T) bool leaves."""
    first_row = k.shape[2] - q.shape[2]
    out = [F.scaled_dot_product_attention(q[:, :, rows - first_row], k, v, attn_mask=allowed(rows), scale=1.0)
           for rows in torch.arange(first_row, k.shape[2], device=q.device).split(chunk)]
    return torch.cat(out, 2)


@torch.compiler.disable
def attend(q, k, v, mask):
    """Exact attention to the selected cells and the own block: q (B, H, R, D), the last R queries of T,
    k, v (B, H, T, D), mask FlatCSR -> (B, H, R, D)."""
    if q.shape[2] == 1:
        return attend_last(q, k, v, mask)
    chosen = selected_cells(mask)                                                             # B H NM W
    return attend_rows(q, k, v, lambda rows: allowed_keys(mask, chosen, rows))


def attend_last(q, k, v, mask):
    """attend for the last query alone, q (B, H, 1, D), as in decoding: reads its own keys and not all T."""
    (B, H, T, D), M, W, device = k.shape, mask.query_block, mask.map_width, k.device
    a = torch.tensor([(T - 1) // M * M], device=device)
    bounds = F.pad(cell_bounds(a, W)[0], (0, 1), value=T)           # W+2: the own block is one more cell
    chosen = F.pad(selected_cells(mask)[:, :, (T - 1) % M - M], (0, 1), value=True)           # B H W+1
    head, cell = chosen.flatten(0, 1).nonzero(as_tuple=True)        # every run of keys that a head reads
    keys = bounds[cell, None] + torch.arange(int(bounds.diff().max()), device=device)         # runs span
    run, offset = (keys < bounds[cell + 1, None]).nonzero(as_tuple=True)
    head, key = head[run], keys[run, offset]                        # S each: every key, all heads in one list
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))                                            # BH T D
    score = (wide(q)[head, 0] * k[head, key]).sum(-1, dtype=running_dtype(q))                 # S
    top = score.new_full((B * H,), -torch.inf).scatter_reduce(0, head, score.detach(), "amax")
    p = (score - top[head]).exp()                                                             # S
    total = torch.zeros_like(top).index_add(0, head, p)                                       # BH
    out = p.new_zeros(B * H, D).index_add(0, head, p[:, None] * v[head, key])                 # BH D
    return (out / total[:, None]).to(q.dtype).view(B, H, 1, D)


@torch.compiler.disable
def pool(q, k, query_block, map_width, blocks=None, chunk=256):
    """The mass of q's attention to the past k in each cell, renormalised; zeros where there is no past.

    q, k (B, H, T, D) -> (B, H, T, W). For `blocks`, N int64 indices: (B, H, N*M, W), zeros beyond T.
    """
    (B, H, T, _), M, W = q.shape, query_block, map_width
    wanted, out = torch.arange(-(-T // M)) if blocks is None else blocks, []
    for few in wanted.to(q.device).split(max(1, chunk // M)):
        rows = rows_of(few, M)                                                                # R
        past, cell = cell_of_key(rows, T, M, W)                                               # R T
        past = past & (rows < T)[:, None]
        scores = (wide(q[:, :, rows.clamp(max=T - 1)]) @ wide(k).mT).to(running_dtype(q))     # B H R T
        mass = scores.masked_fill(~past, -torch.inf).softmax(-1).masked_fill(~past, 0)
        out.append(mass.new_zeros(B, H, len(rows), W).scatter_add_(-1, cell.expand_as(mass), mass))
    return torch.cat(out, 2)[:, :, :T if blocks is None else None]


def attention_kl(log_mass, target):
    """KL(target || estimate) of each query over its cells, nats: two (B, H, R, W) -> (B, H, R), 0 if no past.

    Since the estimate is constant inside a cell, its gradient, Q - P, is that of the KL over all T keys.
    """
    return F.kl_div(log_mass, target, reduction="none").sum(-1)


# ------------------------------------------------------------------------------------------------------------
# Estimate

class Cache:
    """What new rows of a layer need to know of the T tokens before them: nothing at first.

    With room for all tokens to come it is the state of decoding; without, it serves the rows of one forward.
    Whoever feeds a layer counts T on after each forward, as OPT.forward does. The sums and codes that it
    keeps are copies: a view of the last row would keep all the others in memory.
    """

    def __init__(self, room=0):
        self.T, self.room, self.rows = 0, room, {}
        self.sums = 0., 0.               # (B, H, 1, F, 2D) of phi(k) x values, (B, H, 1, 1, F) of phi(k)
        self.k_sum = self.v_sum = 0.     # (B, H, 1, D) of k and of v
        self.codes = []                  # of the paper's CNN: one tensor, the last Picture.HALO codes

    def extend(self, name, x):
        """Keep x (B, H, R, E) as rows T, T+1 .. of `name` -> all its rows so far; none of them is copied."""
        if not self.room:
            return x
        if name not in self.rows:        # one row more than tokens: a running sum starts with zeros
            self.rows[name] = x.new_empty(*x.shape[:2], self.room + 1, x.shape[3])
        end = self.T + x.shape[2]
        self.rows[name][:, :, self.T:end] = x
        return self.rows[name][:, :, :end]


def sinusoids(first_row, x):
    """Fixed position code, which knows no maximal length, of the rows of x (..., R, D): (R, D)."""
    R, D = x.shape[-2:]
    rate = torch.logspace(0, 8 / D - 4, D // 2, device=x.device)                # 10000^(-2i / D)
    angle = torch.arange(first_row, first_row + R, device=x.device)[:, None] * rate           # R D/2
    return torch.cat([angle.sin(), angle.cos()], -1).to(x.dtype)                              # R D


def orthogonal_features(D, num_features):
    """Omega (D, F): blocks of orthogonal columns, each of norm sqrt(D)."""
    blocks = [nn.init.orthogonal_(torch.empty(D, D)) for _ in range(-(-num_features // D))]
    return torch.cat(blocks, 1)[:, :num_features] * D ** 0.5


def kernel_attention(q, k, values, omega, context=0., norm=0., chunk=64):
    """Causal linear attention: phi(x) = relu(x omega) + eps in place of exp (Performer's generalised kernel).

    q, k (B, H, R, D), values, tensors (B, H, R, .) side by side, E wide together, the sums over earlier rows
    -> (B, H, R, E), and the sums so far. Within a chunk of L rows a masked product; what came before the
    chunk is a running sum.
    """
    R, chunk = q.shape[2], min(chunk, q.shape[2])
    q, k, values, omega = (wide(x) for x in (q, k, torch.cat(values, -1), omega))
    phi_q, phi_k = (block_rows(F.relu(x @ omega) + 1e-3, 0, chunk) for x in (q, k))           # B H N L F
    values = block_rows(values, 0, chunk)                                                     # B H N L E
    sums = lambda x, start: F.pad(x.cumsum(2, dtype=running_dtype(x)), (0, 0, 0, 0, 1, 0)) + start
    context = sums(phi_k.mT @ values, context)                                                # B H N+1 F E
    norm = sums(phi_k.sum(-2, keepdim=True), norm)                                            # B H N+1 1 F
    inside = (phi_q @ phi_k.mT).tril()                                                        # B H N L L
    out = phi_q @ context[:, :, :-1].to(phi_q.dtype) + inside @ values                        # B H N L E
    total = (phi_q * norm[:, :, :-1]).sum(-1, keepdim=True) + inside.sum(-1, keepdim=True)
    out, total = (x.flatten(2, 3)[:, :, :R] for x in (out, total))                # the padding is 0 / 0
    return out / total, context[:, :, -1:], norm[:, :, -1:]


def cell_key_scores(q, k_sum, query_block, map_width, first_row=0):
    """q_t . mean of the keys in each cell, 0 for an empty one: the mean is a difference of two running sums.

    q (B, H, R, D), k_sum = running_sum(k) (B, H, T + 1, D) -> (B, H, R, W) in k_sum's dtype.
    """
    bounds = cell_bounds(anchors(first_row, q.shape[2], query_block, q.device), map_width)    # N W+1
    blocks, few, scores = block_rows(q.to(k_sum.dtype), first_row, query_block), max(1, 8192 // map_width), []
    with torch.autocast(q.device.type, enabled=False):     # a difference of large sums needs all their digits
        for q_few, bounds_few in zip(blocks.split(few, 2), bounds.split(few)):
            sums = q_few @ k_sum[:, :, bounds_few].mT                                         # B H N M W+1
            scores.append(sums.diff() / bounds_few.diff().clamp(min=1)[:, None])              # B H N M W
    return torch.cat(scores, 2).flatten(2, 3)[:, :, first_row % query_block:][:, :, :q.shape[2]]


def log_mass(score, scale, bias, q, k_sum, key_weight, query_block, first_row=0):
    """log Q (B, H, R, W), the estimated mass of each cell: Q_c = n_c exp(s_c) / sum_c' n_c' exp(s_c').

    A cell holds n_c keys, and s_c = scale_c score_(c w // W) + bias_c + key_weight q . mean(keys of c).
    score (B, H, R, w), scale and bias (H, W); q, k_sum as in cell_key_scores, key_weight (H,), or all None.
    """
    (R, w), W, M = score.shape[2:], scale.shape[1], query_block
    s = score.to(scale.dtype).repeat_interleave(W // w, -1) * scale[:, None] + bias[:, None]  # B H R W
    if key_weight is not None:
        s = s + key_weight[:, None, None] * cell_key_scores(q, k_sum, M, W, first_row)
    rows = torch.arange(first_row, first_row + R, device=score.device)
    sizes = cell_bounds(rows // M * M, W).diff()                                              # R W
    return (s + sizes.clamp(min=1e-37).log()).log_softmax(-1)      # an empty cell gets e^-85: nothing


class LayerNorm(nn.LayerNorm):
    """In its input's dtype, under autocast too, which would make it float32: its sums are that anyway."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = (p if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Encoder(nn.Module):
    """The MLP: what rows see by kernel attention (B, H, R, 2D) and their v -> their codes (B, H, R, 2D)."""

    def __init__(self, D):
        super().__init__()
        self.linear, self.norm = nn.Linear(3 * D, 2 * D), LayerNorm(2 * D)

    def forward(self, seen, v):
        return F.gelu(self.norm(self.linear(torch.cat([seen.to(v.dtype), v], -1))))


def row_scores(config):
    """Codes (B, H, R, 2D) -> scores (B, H, R, W/4), a row from its own code alone."""
    width = config.map_width // 4
    return nn.Sequential(nn.Linear(2 * config.head_dim, width), LayerNorm(width, elementwise_affine=False))


class Picture(nn.Module):
    """The paper's causal CNN: codes (B, H, R, 2D) of consecutive rows -> scores (B, H, R, W/4)."""
    CHANNELS = 2       # for each head
    HALO = 8           # rows that the two convolutions look back

    def __init__(self, config):
        super().__init__()
        channels, width = self.CHANNELS * config.n_head, config.map_width // 4
        self.linear = nn.Linear(2 * config.head_dim, self.CHANNELS * width)
        self.norm_in = LayerNorm(width)
        self.conv1 = nn.Conv2d(channels, channels, 3, dilation=2, padding=(4, 2))
        self.conv2 = nn.Conv2d(channels, channels, 3, dilation=2, padding=(4, 2))
        self.to_heads = nn.Conv2d(channels, config.n_head, 1)
        self.norm_out = LayerNorm(width, elementwise_affine=False)

    def forward(self, code):
        causal = lambda x: x[:, :, :code.shape[2]]          # padded by 4 at both ends: t-4, t-2, t are left
        x = self.linear(code).unflatten(-1, (self.CHANNELS, -1))   # B H R 2 W/4
        x = self.norm_in(x).permute(0, 2, 4, 1, 3).flatten(3)      # B R W/4 2H: channels last, for GPUs
        x = F.relu(causal(self.conv1(x.permute(0, 3, 1, 2))))      # B 2H R W/4
        x = F.relu(causal(self.conv2(x)))
        return self.norm_out(self.to_heads(x))                     # B H R W/4


def implementation(device):
    """The module whose kernel_attention, log_mass, select, attend and pool serve a device: kernels.py on a
    GPU, or this one."""
    if torch.device(device).type == "cuda" and importlib.util.find_spec("triton"):
        import kernels
        return kernels
    return sys.modules[__name__]


class SEAttention(nn.Module):
    """Attention to the keys that a learned estimate of the attention matrix selects.

    forward: q (already scaled by D**-0.5), k, v (B, H, T, D) -> (B, H, T, D). `teacher` is the pair (q, k)
    whose attention the estimate should match; then `self.kl` holds the distance, nats per query, a mean over
    one block in KL_STEP.
    In decoding q holds the last R rows of T, and `cache` what the layer knows of those before.
    """
    KL_STEP = 4        # one block in so many is compared with the teacher, which takes time quadratic in T
    cumulative_sum = staticmethod(cumulative_sum)        # here, so that it can be compiled with the layer

    def __init__(self, config):
        super().__init__()
        H, D, W = config.n_head, config.head_dim, config.map_width
        self.config = config
        self.encoder = Encoder(D)
        self.scores = row_scores(config) if config.cell_keys else Picture(config)
        self.gates = nn.Linear(2 * D, 2)
        nn.init.zeros_(self.gates.weight)
        nn.init.constant_(self.gates.bias, 5.0)  # sigmoid(5) = 0.993: starts as attention alone
        self.score_scale = nn.Parameter(torch.ones(W))       # these two belong to the scores' LayerNorm,
        self.score_bias = nn.Parameter(torch.zeros(W))       # of which 4 cells share a value
        self.score_weights = nn.Parameter(torch.ones(2, H))  # of that score and of the cell keys'
        self.register_buffer("omega", orthogonal_features(D, config.num_features))
        self.kl = None

    def forward(self, q, k, v, teacher=None, cache=None):
        cache = cache or Cache()
        # the estimate reads q, k and v and does not steer them: the KL trains the estimator alone
        mask, gates, self.kl = self.estimate_and_select(q.detach(), k.detach(), v.detach(), teacher, cache)
        sparse = implementation(q.device).attend(q, k, v, mask)                    # B H R D
        return self.mix(sparse, v[:, :, -q.shape[2]:], gates, cache)               # B H R D

    def estimate_and_select(self, q, k, v, teacher, cache):
        """Make the map MAP_ROWS rows at a time and keep the selection: FlatCSR, gates (B, H, R, 2), KL."""
        R, T, M, found = q.shape[2], k.shape[2], self.config.query_block, []
        k, v = k[:, :, T - R:], v[:, :, T - R:]                                    # B H R D
        k_sum = self.sum_keys(k, cache)                                            # B H T+1 D
        position = sinusoids(T - R, v)                                             # R D
        step = MAP_ROWS // M * M                                                   # no block is cut in two
        for start in range((T - R) // M * M, T, step):
            first = max(start, T - R)
            rows = slice(first - (T - R), start + step - (T - R))
            qkv = (x[:, :, rows] for x in (q, k, v))
            found.append(self.select_rows(*qkv, position[rows], k_sum, first, teacher, cache))
        masks, gates, kl = zip(*found)
        return join(masks), torch.cat(gates, 2), None if teacher is None else torch.cat(kl, 2).mean()

    def select_rows(self, q, k, v, position, k_sum, first_row, teacher, cache):
        """Up to MAP_ROWS rows: what is selected, gates (B, H, R, 2), the KL of some rows (B, H, r)."""
        code = self.encode(q, k, v, position, cache)                               # B H R 2D
        log_mass = self.estimate(code, q, k_sum, first_row, cache)                 # B H R W
        kl = None if teacher is None else self.distance(log_mass, teacher, first_row)
        return self.choose(log_mass.detach(), first_row), self.gates(code).sigmoid(), kl

    def sum_keys(self, k, cache):
        """running_sum of all keys, k (B, H, R, D) the last of them; None without cell keys."""
        if not self.config.cell_keys:
            return None
        k_sum = cache.extend("k_sum", running_sum(k, cache.k_sum, self.cumulative_sum))       # B H T+1 D
        cache.k_sum = k_sum[:, :, -1:].clone()
        return k_sum

    def encode(self, q, k, v, position, cache):
        """A code for each row, from what it attends to by kernel attention, in time linear in T."""
        values = position.expand_as(v), v                                          # B H R D each
        seen, *cache.sums = implementation(q.device).kernel_attention(q, k, values, self.omega, *cache.sums)
        return self.encoder(seen, v)                                               # B H R 2D

    def estimate(self, code, q, k_sum, first_row, cache):
        """log Q (B, H, R, W), the estimated mass of each cell."""
        if isinstance(self.scores, Picture):                                       # it looks back
            code = torch.cat([*cache.codes, code], 2)                              # B H <=HALO+R 2D
            cache.codes = [code[:, :, -Picture.HALO:].clone()]
        score = self.scores(code)[:, :, -q.shape[2]:]                              # B H R W/4
        weight, key_weight = self.score_weights                                    # H
        scale, bias = (weight[:, None] * x for x in (self.score_scale, self.score_bias))      # H W
        return implementation(q.device).log_mass(
            score, scale, bias, q, k_sum, key_weight if self.config.cell_keys else None,
            self.config.query_block, first_row)

    def choose(self, log_mass, first_row):
        """The best cells, FlatCSR: the log of the mass has its order."""
        M, keys = self.config.query_block, self.config.keys_per_query
        return implementation(log_mass.device).select(log_mass, M, keys, first_row)

    def distance(self, log_mass, teacher, first_row):
        """attention_kl to the attention of the teacher's q and k, (B, H, r): of the rows of every KL_STEP-th
        block, counted back from the last of T, which is one of them. first_row is the first of a block."""
        M, W, R, device = self.config.query_block, self.config.map_width, log_mass.shape[2], log_mass.device
        q, k = (x.detach() for x in teacher)                                       # B H T D
        first, last = first_row // M, (k.shape[2] - 1) // M
        blocks = anchors(first_row, R, M, device)[(last - first) % self.KL_STEP::self.KL_STEP] // M     # n
        rows = rows_of(blocks, M)[:len(blocks) * M - (-R % M)]     # r: T may end inside the last block
        target = implementation(device).pool(q, k, M, W, blocks)[:, :, :len(rows)]            # B H r W
        return attention_kl(log_mass.index_select(2, rows - first_row), target)

    def mix(self, sparse, v, gates, cache):
        """g_mix * (g_prob * sparse) + (1 - g_mix) * mean(v_0 .. v_t), two gates for each query and head."""
        out, count = torch.empty_like(sparse), cache.T + torch.arange(1, v.shape[2] + 1, device=v.device)
        for i in range(0, v.shape[2], MAP_ROWS):
            few = slice(i, i + MAP_ROWS)
            rows = (x[:, :, few] for x in (sparse, v, gates))
            out[:, :, few], cache.v_sum = self.mix_rows(*rows, cache.v_sum, count[few, None])
        return out

    @staticmethod
    def mix_rows(sparse, v, gates, v_sum, count):
        """mix of up to MAP_ROWS rows -> those, and v_sum (B, H, 1, D) up to the last of them."""
        v_sums, (g_prob, g_mix) = cumulative_sum(v, v_sum), gates.split(1, -1)     # B H R D
        mean = (v_sums / count).to(v.dtype)                                        # B H R D
        return g_mix * (g_prob * sparse) + (1 - g_mix) * mean, v_sums[:, :, -1:].clone()

    @torch.no_grad()
    def look(self, q, k, v):
        """For looking at, three (B, H, T, T): the estimated attention to the past (a query's own block is not
        estimated), the selected mask, and the attention probabilities under it."""
        (B, H, T, _), M, W = q.shape, self.config.query_block, self.config.map_width
        rows = torch.arange(T, device=q.device)
        code = self.encode(q, k, v, sinusoids(0, v), Cache())                                 # B H T 2D
        log_mass = self.estimate(code, q, self.sum_keys(k, Cache()), 0, Cache())              # B H T W
        past, cell = cell_of_key(rows, T, M, W)                                               # T T
        of_each_key = log_mass.exp() / cell_bounds(rows // M * M, W).diff().clamp(min=1)      # B H T W
        estimate = of_each_key.gather(-1, cell.expand(B, H, T, T)) * past
        mask = flat_csr_to_dense(self.choose(log_mass, 0), B, H)
        return estimate, mask, (q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1)
