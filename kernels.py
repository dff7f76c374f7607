"""
SEA in Triton: sea_attention, attend and decode, with the signatures of sea.py and its results up
to rounding. What lies under them shares names with it, not signatures.

    moments    a program for a coarse block: mean and half variance of its blocks and of itself
    choose     first look: a program for 64 queries, over all coarse blocks; second look: one for
               16, over the blocks inside the best of those, for each query's n best. If there are
               few blocks: this one alone, over all
    attend     a program for 16 queries reads the blocks that any of them chose; each query attends
               to its own choice and its own block
    append, glance, decode    a token of generation, from a cache

What neighbouring queries choose is written as one list of blocks, each with a bit for every query
that chose it (see "Lists"). Nothing T x W is stored, and only speed depends on how many queries
share a list. Products take the inputs' dtype and add up in float32. With TRITON_INTERPRET=1 all of
it runs on the CPU, for tests.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

INTERPRETED = triton.knobs.runtime.interpret
IN_INTERPRETER = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-2 ** 31)
HIGHEST = tl.constexpr(2 ** 31 - 1)

LOOKING = 64        # queries of a program that looks at all coarse blocks
REFINING = 16       # queries of one that looks inside those, which share a list of coarse blocks
ATTENDING = 16      # queries of one that attends, which share a list of blocks
MOST = 254          # blocks that a query may choose; with the two that it always has a power of 2


library = torch.library.Library("nanosea", "FRAGMENT")


def operator(outputs):
    """Make a function one of PyTorch's operators, into which torch.compile does not look.

    outputs: a function of the same arguments that makes its outputs, empty.
    """
    def register(function):
        def launches(x, *rest):
            with torch.cuda.device_of(x):           # Triton launches on the current device
                return function(x, *rest)

        schema = torch.library.infer_schema(function, mutates_args=())
        library.define(function.__name__ + schema)
        library.impl(function.__name__, launches, "CompositeExplicitAutograd")
        torch.library.register_fake("nanosea::" + function.__name__, outputs, lib=library)
        return getattr(torch.ops.nanosea, function.__name__).default
    return register


# --------------------------------------------------------------------------------------------------
# Tiles

@triton.constexpr_function
def padded(n):
    """The size of a tile for n rows or columns: a power of two that the tensor cores take."""
    return max(16, triton.next_power_of_2(n))


@triton.jit
def addresses(x, b, h, row, D: tl.constexpr):
    """Of rows (n,) of a head of x, a tuple of strided(): addresses (n, D padded), real columns."""
    d = tl.arange(0, padded(D))
    head = x[0] + b.to(tl.int64) * x[1] + h.to(tl.int64) * x[2]
    return head + row[:, None].to(tl.int64) * x[3] + d[None, :], (d < D)[None, :]


@triton.jit
def load(x, b, h, row, real, D: tl.constexpr):
    """Rows (n,) of one head of x (B, H, T, D), zeros where they are not real: (n, D padded)."""
    address, column = addresses(x, b, h, row, D)
    return tl.load(address, mask=real[:, None] & column, other=0)


@triton.jit
def add(x, value, b, h, row, real, D: tl.constexpr):
    """Add values (n, D padded) to rows (n,) of one head of x, where they are real."""
    address, column = addresses(x, b, h, row, D)
    tl.atomic_add(address, value, mask=real[:, None] & column, sem="relaxed")


@triton.jit
def dot(x, y, acc=None):
    """x y + acc in float32, of float32 inputs to the last bit: tf32 would keep 10 bits of them."""
    if IN_INTERPRETER:                     # it would multiply bfloat16's bits
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision="ieee")


# In plain Python: sizes may be symbolic, and Triton's own are slow to call.
def cdiv(n, m):
    return -(-n // m)


def power_of_2(n):
    """The next one from n on."""
    return 1 << (n - 1).bit_length()


def strided(x):
    """x as the kernels take it: its address and all strides but the last, which is 1."""
    return x, x.stride(0), x.stride(1), x.stride(2)


# --------------------------------------------------------------------------------------------------
# Lists: the blocks that each of G tiles of neighbouring queries chose, (B, H, G, 2, 1 + room) int32
#
#   [0]    count, then the blocks in ascending order; what follows the count of them is undefined
#   [1]    0, then running sums of bits: their difference at a block has bit m set where query m of
#          the tile chose it. Sums, since one cumsum makes them

def new_lists(q, T, block_size, n, rows, tile):
    """Lists to be filled, for queries q (B, H, R, D): a program takes `rows`, a list `tile`."""
    B, H, R, _ = q.shape
    room = min(cdiv(T, block_size), tile * (n + 2))
    return q.new_empty(B, H, cdiv(R, rows) * (rows // tile), 2, 1 + room, dtype=torch.int32)


def listed(lists):
    """Lists as the kernels take them: their address, lists of a head, numbers in a row of one."""
    return lists, lists.shape[2], lists.shape[4]


@triton.jit
def find_list(lists, head, g):
    """Address of list g of a head, and how many blocks it has."""
    address = lists[0] + (head * lists[1] + g).to(tl.int64) * 2 * lists[2]
    return address, tl.load(address)


@triton.jit
def entries(lists, address, count, entry, first_own):
    """Blocks of a list and their bits; from `count` on stand the own blocks, without bits."""
    real = entry < count
    block = tl.load(address + 1 + entry, mask=real, other=0)
    sums = address + lists[2] + entry
    bits = tl.load(sums + 1, mask=real, other=0) - tl.load(sums, mask=real, other=0)
    return tl.where(real, block, first_own + entry - count), bits


# --------------------------------------------------------------------------------------------------
# Moments
#
#   for each of the Z blocks of a coarse block:  mean, variance of its S keys
#   of the coarse block:  mean of means;  mean of variances + variance of means

@triton.jit
def moments_of(k, fine, wide, c, T, b, h, D: tl.constexpr, S: tl.constexpr, Z: tl.constexpr):
    """Write the moments of coarse block c and of its blocks, of those that are complete."""
    z = tl.arange(0, padded(Z))
    block = c * Z + z
    complete = (z < Z) & ((block + 1) * S <= T)

    # Twice through the keys, which the cache keeps: a difference of squares would lose its digits.
    total = tl.zeros([padded(Z), padded(D)], tl.float32)
    for i in range(S):
        total += load(k, b, h, block * S + i, complete, D).to(tl.float32)
    mean = total / S
    square = tl.zeros([padded(Z), padded(D)], tl.float32)
    for i in range(S):
        away = load(k, b, h, block * S + i, complete, D).to(tl.float32) - mean
        square += away * away
    half = square / (2 * S)
    address, column = addresses(fine, b, h, block, D)
    tl.store(address, mean, mask=complete[:, None] & column)
    tl.store(address + D, half, mask=complete[:, None] & column)

    if (c + 1) * Z * S <= T:
        wide_mean = tl.sum(tl.where((z < Z)[:, None], mean, 0), 0)[None, :] / Z
        away = mean - wide_mean
        wide_half = tl.sum(tl.where((z < Z)[:, None], half + away * away / 2, 0), 0)[None, :] / Z
        wide_address, wide_column = addresses(wide, b, h, c + tl.arange(0, 1), D)
        tl.store(wide_address, wide_mean, mask=wide_column)
        tl.store(wide_address + D, wide_half, mask=wide_column)


@triton.jit
def moments_kernel(k, fine, wide, T, HKV, D: tl.constexpr, S: tl.constexpr, Z: tl.constexpr):
    b = tl.program_id(1) // HKV
    h = tl.program_id(1) % HKV
    moments_of(k, fine, wide, tl.program_id(0), T, b, h, D, S, Z)


def moments(k, block_size, coarse):
    """Means and half variances in k's dtype, of blocks (B, Hkv, W, 2D) and of coarse blocks."""
    B, HKV, T, D = k.shape
    fine = k.new_empty(B, HKV, T // block_size, 2 * D)
    wide = k.new_empty(B, HKV, T // (block_size * coarse), 2 * D)
    if fine.shape[2]:
        grid = cdiv(fine.shape[2], coarse), B * HKV
        with torch.cuda.device_of(k):
            moments_kernel[grid](strided(k), strided(fine), strided(wide), T, HKV,
                                 D=D, S=block_size, Z=coarse, num_warps=1)
    return fine, wide


# --------------------------------------------------------------------------------------------------
# Choose
#
#   a rival of a query is a block that it may choose: 0 < block < own - 1
#   columns are all blocks or, in the second look, the blocks inside the coarse ones of a list
#   for each C columns:
#       x = scores as integers of the same order, LOWEST where a block is no rival
#       push x on stacks: slot c of a query keeps the DEPTH largest of columns c, c + C, c + 2C, ...
#   n times:  pop the largest of all slots; a slot keeps its last one
#   if the last two are the same, that slot may have dropped larger ones (rare). Then once more:
#       for each C columns:  while the largest x of a query beats the least of the n it keeps, swap
#   join the n of each query, block 0 and the one before to a list for each tile
#
# The lowest log2(grain) bits of a score are replaced by a number of its column: scores that differ
# only there count as equal, and the lower block wins. grain: a power of 2, no less than a slot has
# columns.

@triton.jit
def columns_of(queries, inside, column, Z: tl.constexpr):
    """Blocks (C,) behind columns, and which of them the queries look at (M, C)."""
    _, _, own = queries
    near, address, count, first_wide = inside
    if near is None:
        block = column
        seen = (column >= 0)[None, :]
    else:
        wide, bits = entries(near, address, count, column // Z, first_wide)
        query_bit = 1 << tl.arange(0, own.shape[0])
        lies_in = (column // Z >= count)[None, :] & (wide[None, :] == own // Z)
        seen = ((bits[None, :] & query_bit[:, None]) != 0) | lies_in
        block = wide * Z + column % Z
    return block, seen


@triton.jit
def ordered(scores):
    """Integers in the order of float32 scores, NaN highest."""
    if IN_INTERPRETER:                     # a GPU makes no negative NaN
        scores = tl.where(scores == scores, scores, float("nan"))
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ (bits >> 31 & HIGHEST)


@triton.jit
def features(q, b, h, row, real, scale, D: tl.constexpr):
    """What a block's mean and half variance are multiplied by, in q's dtype: two (n, D padded)."""
    exact = load(q, b, h, row, real, D).to(tl.float32) * scale
    dtype = q[0].dtype.element_ty
    return exact.to(dtype), (exact * exact).to(dtype)


@triton.jit
def load_moments(moments, b, h, block, real, D: tl.constexpr):
    """Mean and half variance of blocks (n,), zeros where they are not real: two (n, D padded)."""
    address, column = addresses(moments, b, h, block, D)
    mask = real[:, None] & column
    return tl.load(address, mask=mask, other=0), tl.load(address + D, mask=mask, other=0)


@triton.jit
def ranked(queries, blocks, inside, column, grain, low, edge, D: tl.constexpr, Z: tl.constexpr):
    """Scores (M, C) as integers of the same order, NaN highest; their lowest bits are `low`.

    At an edge, where not all blocks are rivals, LOWEST stands for those that are not.
    """
    q1, q2, own = queries
    moments, b, h, W = blocks
    block, seen = columns_of(queries, inside, column, Z)
    mean, half = load_moments(moments, b, h, block, block < W, D)   # (C, D)
    scores = dot(q2, tl.trans(half), dot(q1, tl.trans(mean)))       # (M, C)
    x = ordered(scores) & -grain | low
    if edge:
        x = tl.where(seen & (block > 0)[None, :] & (block[None, :] < own - 1), x, LOWEST)
    return x


@triton.jit
def push(stack, x):
    """x into sorted stacks, whose smallest falls out."""
    pushed = ()
    for d in tl.static_range(len(stack)):
        pushed = pushed + (tl.maximum(stack[d], x),)
        x = tl.minimum(stack[d], x)
    return pushed


@triton.jit
def pop(stack, hit):
    """The stacks without their largest, where hit; the last one of a stack stays in it."""
    popped = ()
    for d in tl.static_range(len(stack) - 1):
        popped = popped + (tl.where(hit, stack[d + 1], stack[d]),)
    return popped + (stack[len(stack) - 1],)


@triton.jit
def join(block, real, out, head, g, M: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr):
    """Write the blocks (M, N) of M queries, where real, as lists g and on, each of TILE queries."""
    m = tl.arange(0, M)[:, None]
    key = tl.where(real, block * TILE + m % TILE, HIGHEST)
    key = tl.sort(tl.reshape(key, [M // TILE, TILE * N]), 1)
    block = key // TILE
    i = tl.broadcast_to(tl.arange(0, TILE * N)[None, :], [M // TILE, TILE * N])
    after = tl.gather(block, tl.minimum(i + 1, TILE * N - 1), 1)
    last = ((key < HIGHEST) & ((block != after) | (i == TILE * N - 1))).to(tl.int32)
    bits = tl.cumsum(1 << key % TILE, 1)                            # no bit comes twice for a block
    tile = head * out[1] + g + tl.arange(0, M // TILE)
    address = out[0] + tile.to(tl.int64) * 2 * out[2]
    tl.store(address, tl.sum(last, 1))
    tl.store(address + out[2], 0)
    at = address[:, None] + tl.cumsum(last, 1)                      # counts from 1
    tl.store(at, block, mask=last != 0)
    tl.store(at + out[2], bits, mask=last != 0)


@triton.jit
def by_stacks(queries, blocks, inside, columns, inner, n, grain, M: tl.constexpr, N: tl.constexpr,
              C: tl.constexpr, DEPTH: tl.constexpr, D: tl.constexpr, Z: tl.constexpr):
    """Columns of the n largest (M, N), -1 if there are fewer, and whether they surely are those."""
    c = tl.arange(0, C)
    stack = (tl.full([M, C], LOWEST, tl.int32),) * DEPTH
    for start in range(0, columns, C):
        edge = (start == 0) | (start + C > inner)
        low = grain - 1 - start // C
        x = ranked(queries, blocks, inside, start + c, grain, low, edge, D, Z)
        stack = push(stack, x)

    place = tl.arange(0, N)[None, :]
    chosen = tl.full([M, N], -1, tl.int32)
    for i in range(n):
        best = tl.max(stack[0], 1)
        slot = tl.min(tl.where(stack[0] == best[:, None], c[None, :], C), 1)   # first if equal
        stack = pop(stack, c[None, :] == slot[:, None])
        column = tl.where(best > LOWEST, (grain - 1 - (best & grain - 1)) * C + slot, -1)
        chosen = tl.where(place == i, column[:, None], chosen)

    # A slot keeps its last one, which is popped for ever once it is the largest: the slot ran dry,
    # and may have dropped larger ones than came next, where the last two are the same.
    last = tl.max(tl.where(place == n - 1, chosen, -1), 1)
    twice = (place == n - 2) & (chosen == last[:, None]) & (chosen >= 0)
    return chosen, tl.max(twice.to(tl.int32)) == 0


@triton.jit
def by_insertion(queries, blocks, inside, columns, n, grain, M: tl.constexpr, N: tl.constexpr,
                 C: tl.constexpr, D: tl.constexpr, Z: tl.constexpr):
    """Columns of the n largest (M, N), -1 if there are fewer: always right, but slower."""
    c = tl.arange(0, C)
    place = tl.arange(0, N)[None, :]
    kept = tl.zeros([M, N], tl.int32) + tl.where(place < n, LOWEST, HIGHEST)
    chosen = tl.zeros([M, N], tl.int32) + columns + C + place       # numbers that no column has
    for start in range(0, columns, C):
        low = (grain - 1 - c)[None, :]
        x = ranked(queries, blocks, inside, start + c, grain, low, True, D, Z)
        best = tl.max(x, 1)
        least = tl.min(kept, 1)
        while tl.max(((best & -grain) > least).to(tl.int32)) > 0:
            last = tl.max(tl.where(kept == least[:, None], chosen, -1), 1)     # last if equal
            hit = ((best & -grain) > least)[:, None] & (chosen == last[:, None])
            kept = tl.where(hit, (best & -grain)[:, None], kept)
            chosen = tl.where(hit, (start + grain - 1 - (best & grain - 1))[:, None], chosen)
            x = tl.where(x == best[:, None], LOWEST, x)
            best = tl.max(x, 1)
            least = tl.min(kept, 1)
    return tl.where(chosen < columns, chosen, -1)


@triton.jit
def choose_kernel(q, moments, near, out, scale, T, R, W, n, grain, H, HKV, D: tl.constexpr,
                  S: tl.constexpr, Z: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
                  TILE: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr):
    g = tl.num_programs(0) - 1 - tl.program_id(0)                   # the longest first
    b = tl.program_id(1) // H
    h = tl.program_id(1) % H
    row = g * M + tl.arange(0, M)
    own = tl.where(row < R, (T - R + row) // S, -1)[:, None]        # (M, 1), -1: no row
    q1, q2 = features(q, b, h, row, row < R, scale, D)              # (M, D)
    queries = q1, q2, own
    blocks = moments, b, h // (H // HKV), W

    first_wide = (T - R + g * M) // S // Z
    if near is None:
        address = 0
        count = 0
        columns = tl.max(own) - 1                                   # no rivals from here on
        inner = tl.min(own) - 1                                     # no mask from 1 to here
    else:
        address, count = find_list(near, tl.program_id(1), g)
        columns = (count + tl.max(own) // Z - first_wide + 1) * Z
        inner = 0
    inside = near, address, count, first_wide

    if DEPTH > 0:
        chosen, sure = by_stacks(queries, blocks, inside, columns, inner, n, grain,
                                 M, N, C, DEPTH, D, Z)
        if not sure:
            chosen = by_insertion(queries, blocks, inside, columns, n, grain, M, N, C, D, Z)
    else:
        chosen = by_insertion(queries, blocks, inside, columns, n, grain, M, N, C, D, Z)

    # The columns' blocks, and those that are always taken.
    place = tl.arange(0, N)[None, :]
    if near is None:
        block = chosen
    else:
        wide, _ = entries(near, address, count, tl.maximum(chosen, 0) // Z, first_wide)
        block = wide * Z + chosen % Z
    block = tl.where(place == n, 0, tl.where(place == n + 1, own - 1, block))
    real = (place < n) & (chosen >= 0)
    real = real | ((place == n) & (own >= 1)) | ((place == n + 1) & (own >= 2))
    join(block, real, out, tl.program_id(1), g * (M // TILE), M, N, TILE)


def choose(q, moments, T, block_size, n, scale, rows, tile, near=None, coarse=1):
    """Block 0, the block before and the n best of each query, of all or of those inside `near`.

    q (B, H, R, D), the last R of T; moments (B, Hkv, W, 2D) of blocks of block_size keys -> lists,
    each of `tile` queries, without own blocks. rows: queries of a program, and of a list of `near`.
    """
    B, H, R, D = q.shape
    n = clipped(n, cdiv(T, block_size))
    lists = new_lists(q, T, block_size, n, rows, tile)
    slots = 32 if rows == LOOKING else 16
    if near is None:
        columns = cdiv(T, block_size)
    else:
        columns = (near.shape[4] - 1) * coarse + rows + 2 * coarse  # own blocks are in no list
        near = listed(near)
    grain = max(32, power_of_2(cdiv(columns, slots)))
    # So deep that insertion is rare; 0: insertion alone.
    depth = 5 if n <= 8 else 7 if n <= 16 else 9 if n <= 32 else 0
    choose_kernel[cdiv(R, rows), B * H](
        strided(q), strided(moments), near, listed(lists), scale, T, R,
        moments.shape[2], n, grain, H, moments.shape[1], D=D, S=block_size, Z=coarse,
        N=power_of_2(n + 2), M=rows, TILE=tile, C=slots, DEPTH=depth,
        num_warps=rows // 16, num_stages=3 if rows == LOOKING else 2)
    return lists


# --------------------------------------------------------------------------------------------------
# Attend
#
#   for KEYS keys at a time of the blocks in the tile's list, and then of the own blocks:
#       scores, masked by each block's bits and by the future
#       online softmax: new maximum m_i, rescale l_i and acc, add
#   out = acc / l_i;  lse = m_i + log2 l_i  (scores are in base 2)
#
# backward, with p = exp2(score - lse) and delta = sum_d dout out:
#   dv += p^T dout     dscore = scale p (dout v^T - delta)     dq = dscore k     dk += dscore^T q
#
# A key's gradient comes from every tile that chose it. float32 atomics add them up, so that dk and
# dv vary in the last bits from run to run.

@triton.jit
def tile_of(lists, T, R, H, HKV, S: tl.constexpr, M: tl.constexpr):
    """What a program works on: batch, heads, rows, its list with the blocks that its rows lie in,
    and how many keys those all have."""
    g = tl.num_programs(0) - 1 - tl.program_id(0)                   # the longest first
    b = tl.program_id(1) // H
    h = tl.program_id(1) % H
    row = g * M + tl.arange(0, M)
    address, count = find_list(lists, tl.program_id(1), g)
    first_own = (T - R + g * M) // S
    last_own = tl.minimum(T - R + g * M + M - 1, T - 1) // S
    n_own = last_own - first_own + 1
    tile = address, count, first_own, n_own
    return b, h, h // (H // HKV), row, tile, (count + n_own) * S


@triton.jit
def keys_of(lists, tile, start, position, T, S: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr):
    """KEYS keys of a tile, which of them are real, and which query attends to which (M, KEYS)."""
    address, count, first_own, n_own = tile
    i = start + tl.arange(0, KEYS)
    entry = i // S
    block, bits = entries(lists, address, count, entry, first_own)
    key = block * S + i % S
    real = (entry < count + n_own) & (key < T)
    chosen = (bits[None, :] >> tl.arange(0, M)[:, None] & 1) != 0
    lies_in = (entry >= count)[None, :] & (block[None, :] == (position // S)[:, None])
    return key, real, (chosen | lies_in) & (key[None, :] <= position[:, None])


@triton.jit
def attend_kernel(q, k, v, out, lse, lists, scale, T, R, H, HKV,
                  D: tl.constexpr, S: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr):
    b, h, kv, row, tile, n_keys = tile_of(lists, T, R, H, HKV, S, M)
    q_tile = load(q, b, h, row, row < R, D)                         # (M, D)

    m_i = tl.full([M], -1e30, tl.float32)                           # some see no key at first
    l_i = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, padded(D)], tl.float32)
    for start in range(0, n_keys, KEYS):
        key, real, mine = keys_of(lists, tile, start, T - R + row, T, S, M, KEYS)
        k_tile = load(k, b, kv, key, real, D)                       # (KEYS, D)
        v_tile = load(v, b, kv, key, real, D)
        scores = dot(q_tile, tl.trans(k_tile)) * (scale * LOG2E)    # (M, KEYS)
        scores = tl.where(mine, scores, -1e30)
        m_new = tl.maximum(m_i, tl.max(scores, 1))
        p = tl.where(mine, tl.exp2(scores - m_new[:, None]), 0)
        shrink = tl.exp2(m_i - m_new)
        l_i = l_i * shrink + tl.sum(p, 1)
        acc = dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None])
        m_i = m_new

    address, column = addresses(out, b, h, row, D)
    tl.store(address, acc / l_i[:, None], mask=(row < R)[:, None] & column)
    tl.store(lse + tl.program_id(1).to(tl.int64) * R + row, m_i + tl.log2(l_i), mask=row < R)


@triton.jit
def attend_backward_kernel(q, k, v, out, lse, dout, dq, dk, dv, lists, scale, T, R, H, HKV,
                           D: tl.constexpr, S: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr):
    b, h, kv, row, tile, n_keys = tile_of(lists, T, R, H, HKV, S, M)
    q_tile = load(q, b, h, row, row < R, D)                         # (M, D)
    dout_tile = load(dout, b, h, row, row < R, D)
    lse_tile = tl.load(lse + tl.program_id(1).to(tl.int64) * R + row, mask=row < R, other=0)
    delta = tl.sum(dout_tile.to(tl.float32) * load(out, b, h, row, row < R, D).to(tl.float32), 1)

    acc = tl.zeros([M, padded(D)], tl.float32)
    for start in range(0, n_keys, KEYS):
        key, real, mine = keys_of(lists, tile, start, T - R + row, T, S, M, KEYS)
        k_tile = load(k, b, kv, key, real, D)                       # (KEYS, D)
        v_tile = load(v, b, kv, key, real, D)
        scores = dot(q_tile, tl.trans(k_tile)) * (scale * LOG2E)    # (M, KEYS)
        p = tl.where(mine & (row < R)[:, None], tl.exp2(scores - lse_tile[:, None]), 0)
        add(dv, dot(tl.trans(p.to(dout_tile.dtype)), dout_tile), b, kv, key, real, D)
        dscore = p * (dot(dout_tile, tl.trans(v_tile)) - delta[:, None]) * scale
        dscore = dscore.to(q_tile.dtype)
        add(dk, dot(tl.trans(dscore), q_tile), b, kv, key, real, D)
        acc = dot(dscore, k_tile, acc)
    address, column = addresses(dq, b, h, row, D)
    tl.store(address, acc, mask=(row < R)[:, None] & column)


def launch(q, k, scale, block_size, lists):
    """Grid, further arguments and options of both kernels."""
    B, H, R, D = q.shape
    sizes = listed(lists), scale, k.shape[2], R, H, k.shape[1]
    return (cdiv(R, ATTENDING), B * H), sizes, dict(D=D, S=block_size, M=ATTENDING, KEYS=32)


def attend_outputs(q, *rest):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@operator(attend_outputs)
def attend_forward(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, scale: float,
                   block_size: int) -> tuple[Tensor, Tensor]:
    out, lse = attend_outputs(q)
    grid, sizes, options = launch(q, k, scale, block_size, lists)
    attend_kernel[grid](strided(q), strided(k), strided(v), strided(out), lse, *sizes,
                        **options, num_warps=1)
    return out, lse


def attend_gradients(dout, q, k, v, *rest):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@operator(attend_gradients)
def attend_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                    lists: Tensor, scale: float, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    dq = torch.empty_like(q)
    dk = torch.zeros_like(k, dtype=torch.float32)
    dv = torch.zeros_like(v, dtype=torch.float32)
    tensors = [strided(x) for x in (q, k, v, out)]
    gradients = [strided(x) for x in (dense_rows(dout), dq, dk, dv)]
    grid, sizes, options = launch(q, k, scale, block_size, lists)
    warps = 1 if q.shape[3] <= 64 else 2                            # one has too few registers then
    attend_backward_kernel[grid](*tensors, lse, *gradients, *sizes, **options, num_warps=warps)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


class Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lists, scale, block_size):
        out, lse = attend_forward(q, k, v, lists, scale, block_size)
        ctx.settings = scale, block_size
        ctx.save_for_backward(q, k, v, out, lse, lists)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return *attend_backward(dout, *ctx.saved_tensors, *ctx.settings), None, None, None


def packed(chosen, T, block_size):
    """chosen (B, H, R, W) bool, of complete blocks before the own one -> lists."""
    R, W = chosen.shape[2:]
    row = torch.arange(T - R, T, device=chosen.device)
    past = torch.arange(W, device=chosen.device) < (row // block_size)[:, None]
    tiles = torch.nn.functional.pad(chosen & past, (0, 0, 0, -R % ATTENDING))
    tiles = tiles.unflatten(2, (-1, ATTENDING))                     # (B, H, G, ATTENDING, W)
    bit = 1 << torch.arange(ATTENDING, device=chosen.device)
    bits = (tiles * bit[:, None]).sum(3, dtype=torch.int32)         # (B, H, G, W)
    used = bits != 0
    order = used.byte().argsort(dim=-1, descending=True, stable=True)
    sums = bits.gather(-1, order).cumsum(-1)
    count = used.sum(-1, keepdim=True)
    rows = torch.cat((count, order), -1), torch.cat((torch.zeros_like(count), sums), -1)
    return torch.stack(rows, 3).int()                               # (B, H, G, 2, 1 + W)


def dense_rows(x):
    """x if its last stride is 1 and no other is: then all that is made like it has that, too."""
    return x if x.stride(-1) == 1 and 1 not in x.stride()[:-1] else x.contiguous()


def checked(q, k, v):
    """q, k and v with dense rows, or a ValueError that says what the kernels cannot take."""
    for name, x in dict(q=q, k=k, v=v).items():
        if x.device != q.device or not (x.is_cuda or INTERPRETED):
            raise ValueError(f"{name} is on {x.device}; the kernels need all on one CUDA device")
        if x.dtype != q.dtype or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"{name} is {x.dtype}; q, k, v must be bfloat16, float16 or float32")
    same = (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3]) and v.shape == k.shape
    if not same or q.shape[1] % k.shape[1] or q.shape[2] > k.shape[2]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    if q.shape[3] % 8 or not 8 <= q.shape[3] <= 128:
        raise ValueError(f"the width of a head is {q.shape[3]}, not a multiple of 8 up to 128; "
                         "sea.use_kernels(False) takes any")
    if q.shape[0] * q.shape[1] > 65535:
        raise ValueError(f"B H is {q.shape[0] * q.shape[1]}; the kernels take up to 65,535")
    return dense_rows(q), dense_rows(k), dense_rows(v)


def budgets(block_size, keys_per_query, coarse=8):
    """sea.budgets: how many blocks, and how many coarse blocks to look into for them."""
    n = max(1, keys_per_query // block_size)
    return n, max(8, keys_per_query // min(16, block_size * coarse))


def clipped(n, blocks):
    """n, or how many of so many blocks are left beside the three that a query always has."""
    n = max(1, min(n, blocks - 3))
    if n > MOST:
        raise ValueError(f"a query is to choose {n} blocks, the kernels take up to {MOST}; lower "
                         "keys_per_query, or sea.use_kernels(False) takes any")
    return n


def attend(q, k, v, chosen, block_size):
    """sea.attend: exact attention to the chosen blocks and, up to the query itself, to its own."""
    q, k, v = checked(q, k, v)
    return Attend.apply(q, k, v, packed(chosen, k.shape[2], block_size), 1.0, block_size)


def look_twice_outputs(q, k, scale, block_size, keys_per_query, coarse):
    n, _ = budgets(block_size, keys_per_query, coarse)
    return new_lists(q, k.shape[2], block_size, n, REFINING, ATTENDING)


@operator(look_twice_outputs)
def look_twice(q: Tensor, k: Tensor, scale: float, block_size: int, keys_per_query: int,
               coarse: int) -> Tensor:
    """sea.look_twice: the blocks that each query chooses, as lists."""
    T = k.shape[2]
    wide = block_size * coarse
    n, n_wide = budgets(block_size, keys_per_query, coarse)
    fine_moments, wide_moments = moments(k, block_size, coarse)
    near = None
    if T // wide > n_wide + 2:                                      # otherwise all would be near
        near = choose(q, wide_moments, T, wide, n_wide, scale, LOOKING, REFINING)
    return choose(q, fine_moments, T, block_size, n, scale, REFINING, ATTENDING, near, coarse)


def sea_attention(q, k, v, block_size=8, keys_per_query=48, coarse=8, scale=None):
    """sea.sea_attention: q (B, H, R, D), k and v (B, Hkv, T, D) -> (B, H, R, D)."""
    q, k, v = checked(q, k, v)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    with torch.no_grad():
        lists = look_twice(q, k, scale, block_size, keys_per_query, coarse)
    return Attend.apply(q, k, v, lists, scale, block_size)


# --------------------------------------------------------------------------------------------------
# One token
#
#   append   its k and v into the cache; the moments of the coarse block that it lies in
#   glance   a program for 64 coarse blocks writes their scores
#   decode   a program for a head:
#       of the scores of coarse blocks the best n_wide -> scores of the blocks inside those
#       of these the best n -> scores of their keys -> softmax -> sum of values
#
# The position is read on the GPU: the same three launches, in a CUDA graph, serve every token.

@triton.jit
def scored(q1, q2, moments, b, h, block, real, D: tl.constexpr):
    """Scores of blocks (n,) for one query, whose features are (1, D), as integers of that order."""
    mean, half = load_moments(moments, b, h, block, real, D)        # (n, D)
    scores = q1.to(tl.float32) * mean.to(tl.float32) + q2.to(tl.float32) * half.to(tl.float32)
    return ordered(tl.sum(scores, 1))


@triton.jit
def best(x, block, own, n, N: tl.constexpr):
    """Of blocks (W,) with scores x the n best rivals, then block 0, the one before, the own one:
    (N,), -1 where there is none."""
    place = tl.arange(0, N)
    key = tl.where((block > 0) & (block < own - 1), x, LOWEST).to(tl.int64) << 32
    key = key | (HIGHEST - tl.maximum(block, 0))                    # if equal the lower block
    chosen = tl.full([N], -1, tl.int32)
    for i in range(n):
        first = tl.max(key, 0)
        found = tl.where(first >> 32 > LOWEST, HIGHEST - (first & HIGHEST), -1).to(tl.int32)
        chosen = tl.where(place == i, found, chosen)
        key = tl.where(key == first, -2 ** 63, key)
    chosen = tl.where((place == n) & (own >= 1), 0, chosen)
    chosen = tl.where((place == n + 1) & (own >= 2), own - 1, chosen)
    return tl.where(place == n + 2, own, chosen)


@triton.jit
def inside(block, size: tl.constexpr):
    """What lies in blocks (n,) of that size, -1 where nothing does: (n size padded,)."""
    i = tl.arange(0, triton.next_power_of_2(size))[None, :]
    return tl.ravel(tl.where((block >= 0)[:, None] & (i < size), block[:, None] * size + i, -1))


@triton.jit
def append_kernel(k, v, all_k, all_v, fine, wide, position, HKV,
                  D: tl.constexpr, S: tl.constexpr, Z: tl.constexpr):
    b = tl.program_id(0) // HKV
    h = tl.program_id(0) % HKV
    t = tl.load(position).to(tl.int32)
    row = tl.arange(0, 1)
    address, column = addresses(all_k, b, h, t + row, D)
    tl.store(address, load(k, b, h, row, row == 0, D), mask=column)
    address, column = addresses(all_v, b, h, t + row, D)
    tl.store(address, load(v, b, h, row, row == 0, D), mask=column)
    tl.debug_barrier()                                              # other threads read it now
    moments_of(all_k, fine, wide, t // (S * Z), t + 1, b, h, D, S, Z)


@triton.jit
def glance_kernel(q, wide, scores, position, scale, W, SIZE, H, HKV,
                  D: tl.constexpr, C: tl.constexpr):
    b = tl.program_id(1) // H
    h = tl.program_id(1) % H
    column = tl.program_id(0) * C + tl.arange(0, C)
    own = tl.load(position).to(tl.int32) // SIZE
    if tl.program_id(0) * C < own:                                  # of later ones none is read
        row = tl.arange(0, 1)
        q1, q2 = features(q, b, h, row, row == 0, scale, D)
        x = scored(q1, q2, wide, b, h // (H // HKV), column, column < own, D)
        tl.store(scores + tl.program_id(1) * W + column, x, mask=column < own)


@triton.jit
def decode_kernel(q, k, v, fine, scores, out, position, scale, W, n, n_wide, H, HKV,
                  D: tl.constexpr, S: tl.constexpr, Z: tl.constexpr, WIDE: tl.constexpr,
                  NEAR: tl.constexpr, N: tl.constexpr):
    b = tl.program_id(0) // H
    h = tl.program_id(0) % H
    kv = h // (H // HKV)
    t = tl.load(position).to(tl.int32)
    own = t // S
    row = tl.arange(0, 1)
    q1, q2 = features(q, b, h, row, row == 0, scale, D)             # (1, D)

    # First look: of the coarse blocks.
    c = tl.arange(0, WIDE)
    x = tl.load(scores + tl.program_id(0) * W + c, mask=c < own // Z, other=LOWEST)
    near = best(x, c, own // Z, n_wide, NEAR)                       # (NEAR,)

    # Second look: of the blocks inside those.
    block = inside(near, Z)                                         # (NEAR Z,)
    x = scored(q1, q2, fine, b, kv, block, (block >= 0) & (block < own), D)
    chosen = best(x, block, own, n, N)                              # (N,)

    # Attend to the keys of the chosen blocks.
    key = inside(chosen, S)                                         # (N S,)
    mine = (key >= 0) & (key <= t)
    k_tile = load(k, b, kv, key, mine, D).to(tl.float32)            # (N S, D)
    v_tile = load(v, b, kv, key, mine, D).to(tl.float32)
    q_tile = load(q, b, h, row, row == 0, D).to(tl.float32)         # (1, D)
    x = tl.where(mine, tl.sum(q_tile * k_tile, 1) * (scale * LOG2E), -float("inf"))
    p = tl.exp2(x - tl.max(x, 0))                                   # (N S,)
    acc = tl.sum(p[:, None] * v_tile, 0) / tl.sum(p, 0)             # (D,)
    address, column = addresses(out, b, h, row, D)
    tl.store(address, acc[None, :], mask=column)


def append(cache, k, v, position):
    """sea.Cache.append: keep k, v (B, Hkv, 1, D) of the token at position (1,), less than room."""
    B, HKV, _, D = k.shape
    tensors = dense_rows(k), dense_rows(v), cache.k, cache.v, cache.moments, cache.wide_moments
    with torch.cuda.device_of(k):
        append_kernel[(B * HKV,)](*[strided(x) for x in tensors], position, HKV,
                                D=D, S=cache.block_size, Z=cache.coarse, num_warps=1)


def decode(q, cache, position, keys_per_query=48, scale=None):
    """sea.decode: sea_attention of the token at position (1,), q (B, H, 1, D) -> alike."""
    q, k, v = checked(q, cache.k, cache.v)
    B, H, _, D = q.shape
    HKV = k.shape[1]
    S = cache.block_size
    W = cache.wide_moments.shape[2]
    n, n_wide = budgets(S, keys_per_query, cache.coarse)
    n = clipped(n, cache.moments.shape[2])
    n_wide = clipped(n_wide, W)
    scale = D ** -0.5 if scale is None else scale
    N = power_of_2(n + 3)
    warps = max(4, min(16, N * power_of_2(S) // 32))
    scores = q.new_empty(B, H, W, dtype=torch.int32)
    out = torch.empty_like(q)
    with torch.cuda.device_of(q):
        glance_kernel[cdiv(W, 64), B * H](
            strided(q), strided(cache.wide_moments), scores, position, scale, W, S * cache.coarse,
            H, HKV, D=D, C=64, num_warps=4)
        decode_kernel[(B * H,)](
            strided(q), strided(k), strided(v), strided(cache.moments), scores, strided(out),
            position, scale, W, n, n_wide, H, HKV, D=D, S=S, Z=cache.coarse, WIDE=power_of_2(W),
            NEAR=power_of_2(n_wide + 3), N=N, num_warps=warps)
    return out
