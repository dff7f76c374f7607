"""
Triton kernels for the steps of SEA that touch many keys or cells. sea.py has the same functions in PyTorch
and is the reference: names, signatures and results agree, but for `chunk` and where there is no gradient; so
do the letters B H T R D M W N.

    kernel_attention   two programs per (batch, head, chunk of rows, tile of the values' columns)
    log_mass           one per (batch, head, block), forward and backward
    select             one per query finds its threshold; one per block joins its queries and writes FlatCSR
    attend             one per (batch, head, block), forward and backward
    pool               one per (batch, head, ROWS queries of neighbouring blocks)

Products take the inputs' dtype and add up in float32. With TRITON_INTERPRET=1 all runs on the CPU, for tests.
"""
import functools

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from sea import FlatCSR, anchors, flat_csr_layout, wide

INTERPRETED = triton.knobs.runtime.interpret
FLOATS = torch.bfloat16, torch.float16, torch.float32
MAX_COLUMNS = 32768                         # of H*W: one program holds a query's row of the map in registers
UPCAST = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST, HIGHEST = tl.constexpr(-2 ** 31), tl.constexpr(2 ** 31 - 1)


# ------------------------------------------------------------------------------------------------------------
# What the wrappers and the kernels share

def check(name, x, shape, dtypes, device):
    """Say what is wrong with an input here, before a kernel reads past its end. A size of -1 may be any."""
    if x.device != device or x.device.type != ("cpu" if INTERPRETED and not x.is_cuda else "cuda"):
        raise ValueError(f"{name} is on {x.device}; the kernels need all their tensors on one CUDA device")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is {x.dtype}; it must be {' or '.join(map(str, dtypes))}")
    if x.ndim != len(shape) or any(size not in (-1, found) for size, found in zip(shape, x.shape)):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {tuple(shape)}; -1 is any size")
    return with_dense_rows(x)


def with_dense_rows(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def check_sizes(D=8, M=1, W=1, H=1, F=1):
    if D % 8 or not 8 <= D <= 128:
        raise ValueError(f"the width of a head is {D}; the kernels take multiples of 8 up to 128")
    if not 1 <= M <= 32 or W < 1:
        raise ValueError(f"query_block is {M} and map_width {W}; they must be from 1 to 32 and 1 or more")
    if F > 256:
        raise ValueError(f"num_features is {F}; the kernels take up to 256")
    if H * W > MAX_COLUMNS:
        raise ValueError(f"{H} heads x {W} cells are {H * W} columns; the kernels take up to {MAX_COLUMNS}")


def strided(x):
    """x as the kernels take it: its address and all strides but the last, which is 1."""
    return x if x is None else (x, *x.stride()[:3])


@triton.constexpr_function
def padded(n):
    """The size of a tile that holds n rows or columns: a power of two that the tensor cores take."""
    return max(16, triton.next_power_of_2(n))


@triton.jit
def tile(x, b, h, rows, real, columns, width):
    """Addresses, 64 bits wide, of rows (n,) and columns (m,) of one head of x, and which are real: (n, m)."""
    row = x[0] + b.to(tl.int64) * x[1] + h.to(tl.int64) * x[2] + rows.to(tl.int64) * x[3]
    return row[:, None] + columns[None, :], real[:, None] & (columns < width)[None, :]


@triton.jit
def load(x, b, h, rows, real, D: tl.constexpr):
    """Rows (n,) of one head of x (B, H, T, D): (n, D padded with zeros)."""
    address, mask = tile(x, b, h, rows, real, tl.arange(0, padded(D)), D)
    return tl.load(address, mask=mask, other=0)


@triton.jit
def add(x, value, b, h, rows, real, D: tl.constexpr):
    address, mask = tile(x, b, h, rows, real, tl.arange(0, padded(D)), D)
    tl.atomic_add(address, value, mask=mask, sem="relaxed")


@triton.jit
def dot(x, y):
    """float32 stays float32: the tensor cores' tf32 keeps 10 bits."""
    if UPCAST:                             # the interpreter would multiply bfloat16's bits as integers
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def raise_maximum(top, score):
    """Online softmax, base 2: the maximum with these scores, their p, what earlier sums must shrink by."""
    new_top = tl.maximum(top, tl.max(score, 1))
    return new_top, tl.exp2(score - new_top[:, None]), tl.exp2(top - new_top)


@triton.jit
def queries_of(first_row, R, M: tl.constexpr):
    """The program's block among those of rows first_row .. first_row + R-1: anchor, index m of its queries in
    the block, their row in q, and which of the tile's rows are real."""
    a, m = (first_row // M + tl.program_id(0)) * M, tl.arange(0, padded(M))
    row = a + m - first_row
    return a, m, row, (m < M) & (row >= 0) & (row < R)


# ------------------------------------------------------------------------------------------------------------
# Kernel attention
#
#   values are one tensor or two, E wide, ALL wide side by side; a program has COLUMNS of one of them
#   for each chunk n of ROWS rows:  state_n = phi(k)^T [values, 1]                          F ALL+1
#   state_n becomes the sum of those before it, by torch.cumsum over the few chunks
#   for each chunk:
#       weight = phi(q) phi(k)^T, causal                                                ROWS ROWS
#       [out, total] = phi(q) state_n + weight [values, 1];   out / total

@triton.jit
def features(x, omega, b, h, row, real, D: tl.constexpr, F: tl.constexpr):
    """phi of rows of x, 0 for those that aren't there: (n, F padded)."""
    d, f = tl.arange(0, padded(D)), tl.arange(0, padded(F))
    real_omega = (d < D)[:, None] & (f < F)[None, :]
    omega_tile = tl.load(omega + d[:, None] * F + f[None, :], mask=real_omega, other=0)
    phi = tl.maximum(dot(load(x, b, h, row, real, D), omega_tile), 0) + 1e-3
    return tl.where(real[:, None] & (f < F)[None, :], phi, 0).to(omega_tile.dtype)


@triton.jit
def values_tile(left, right, b, h, row, R, E: tl.constexpr, COLUMNS: tl.constexpr):
    """Of the program's columns: which are real, their index in both tensors side by side, their values."""
    per_tensor = tl.cdiv(E, COLUMNS)
    e = tl.program_id(2) % per_tensor * COLUMNS + tl.arange(0, COLUMNS)
    if tl.program_id(2) < per_tensor:
        address, mask = tile(left, b, h, row, row < R, e, E)
        values = tl.load(address, mask=mask, other=0)
    else:
        address, mask = tile(right, b, h, row, row < R, e, E)
        values = tl.load(address, mask=mask, other=0)
    return e < E, tl.program_id(2) // per_tensor * E + e, values


@triton.jit(do_not_specialize=["R", "H"])
def state_kernel(k, left, right, omega, state, norm, R, H, D: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
                 ALL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    n, b, h = tl.program_id(0), tl.program_id(1) // H, tl.program_id(1) % H
    row, f = n * ROWS + tl.arange(0, ROWS), tl.arange(0, padded(F))
    real, e, values = values_tile(left, right, b, h, row, R, E, COLUMNS)
    phi = features(k, omega, b, h, row, row < R, D, F)
    at = (tl.program_id(1).to(tl.int64) * (tl.num_programs(0) + 1) + n + 1) * F + f
    sums = dot(tl.trans(phi), values)
    tl.store(state + at[:, None] * ALL + e[None, :], sums, mask=(f < F)[:, None] & real[None, :])
    tl.store(norm + at, tl.sum(phi.to(tl.float32), 0), mask=f < F)


@triton.jit(do_not_specialize=["R", "H"])
def kernel_attention_kernel(q, k, left, right, omega, state, norm, out, R, H, D: tl.constexpr,
                            E: tl.constexpr, F: tl.constexpr, ALL: tl.constexpr, ROWS: tl.constexpr,
                            COLUMNS: tl.constexpr):
    n, b, h = tl.program_id(0), tl.program_id(1) // H, tl.program_id(1) % H
    i, f = tl.arange(0, ROWS), tl.arange(0, padded(F))
    row = n * ROWS + i
    real, e, values = values_tile(left, right, b, h, row, R, E, COLUMNS)
    phi_q, phi_k = features(q, omega, b, h, row, row < R, D, F), features(k, omega, b, h, row, row < R, D, F)
    at = (tl.program_id(1).to(tl.int64) * (tl.num_programs(0) + 1) + n) * F + f
    before = tl.load(state + at[:, None] * ALL + e[None, :], mask=(f < F)[:, None] & real[None, :], other=0)
    total = tl.sum(phi_q.to(tl.float32) * tl.load(norm + at, mask=f < F, other=0)[None, :], 1)
    weight = tl.where(i[:, None] >= i[None, :], dot(phi_q, tl.trans(phi_k)), 0)
    sums = dot(weight.to(phi_q.dtype), values) + dot(phi_q, before.to(phi_q.dtype))
    address, mask = tile(out, b, h, row, row < R, e, ALL)
    tl.store(address, sums / (total + tl.sum(weight, 1))[:, None], mask=mask & real[None, :])


@torch.no_grad()
@torch.compiler.disable
def kernel_attention(q, k, values, omega, context=0., norm=0.):
    """Causal linear attention with phi(x) = relu(x omega) + eps in place of exp.

    q, k (B, H, R, D), values one or two tensors (B, H, R, E), ALL wide side by side, omega (D, F), the sums
    over earlier rows, (B, H, 1, F, ALL) and (B, H, 1, 1, F) -> (B, H, R, ALL), and the sums so far. It has
    no gradient: the estimate reads q, k, v as they are, and omega is fixed.
    """
    q = wide(check("q", q, (-1, -1, -1, -1), FLOATS, q.device))
    (B, H, R, D), (E, F) = q.shape, (values[0].shape[-1], omega.shape[-1])
    k = wide(check("k", k, q.shape, FLOATS, q.device))
    sides = [check("values", x, (B, H, R, E), FLOATS, q.device).to(q.dtype) for x in values]
    omega = check("omega", omega, (D, -1), FLOATS, q.device).to(q.dtype).contiguous()
    check_sizes(D, F=F)
    rows = 128 if q.element_size() == 2 and max(D, F) <= 64 else 128 // q.element_size()
    columns, ALL = min(64, padded(E)), len(sides) * E
    sizes = dict(R=R, H=H, D=D, E=E, F=F, ALL=ALL, ROWS=rows, COLUMNS=columns, num_warps=4, num_stages=1)
    grid = triton.cdiv(R, rows), B * H, triton.cdiv(E, columns) * len(sides)
    state = torch.empty(B, H, grid[0] + 1, F, ALL, device=q.device)
    norms, out = state.new_empty(B, H, grid[0] + 1, 1, F), q.new_empty(B, H, R, ALL)
    state[:, :, :1], norms[:, :, :1] = context, norm
    left, right = strided(sides[0]), strided(sides[-1])
    state_kernel[grid](strided(k), left, right, omega, state, norms, **sizes)
    state.cumsum_(2), norms.cumsum_(2)
    kernel_attention_kernel[grid](
        *map(strided, (q, k)), left, right, omega, state, norms, strided(out), **sizes)
    return out, state[:, :, -1:].clone(), norms[:, :, -1:].clone()      # not views, which would keep it all


# ------------------------------------------------------------------------------------------------------------
# Log of the mass
#
#   for each block and head, its M queries as one tile:
#       for CELLS cells at a time:
#           mean = (k_sum[end] - k_sum[start]) / (end - start)               CELLS D, in registers alone
#           s = scale score + bias + key_weight q mean^T + log(size)         M CELLS; kept where log Q will be
#           online log-sum-exp, base 2
#       log Q = s - log-sum-exp, base e

@triton.jit
def cell_sizes(cell, a, W: tl.constexpr):
    start, end = cell.to(tl.int64) * a // W, (cell + 1).to(tl.int64) * a // W
    return start, end, tl.where(cell < W, end - start, 0)


@triton.jit
def cell_key_scores(q_tile, k_sum, b, h, cell, a, D: tl.constexpr, W: tl.constexpr):
    """q . mean key of each cell, 0 for an empty one: (n, CELLS)."""
    start, end, size = cell_sizes(cell, a, W)
    mean = load(k_sum, b, h, end, size > 0, D) - load(k_sum, b, h, start, size > 0, D)
    mean = mean / tl.maximum(size, 1).to(tl.float32)[:, None]
    return dot(q_tile, tl.trans(mean.to(q_tile.dtype)))


@triton.jit(do_not_specialize=["first_row", "R", "H"])
def log_mass_kernel(score, scale, bias, q, k_sum, key_weight, out, first_row, R, H, D: tl.constexpr,
                    M: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr, CELLS: tl.constexpr):
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    a, m, row, real = queries_of(first_row, R, M)
    q_tile = load(q, b, h, row, real, D)
    top, total = tl.full([padded(M)], -1e30, tl.float32), tl.zeros([padded(M)], tl.float32)
    for c in range(0, W, CELLS):
        cell = c + tl.arange(0, CELLS)
        address, mask = tile(score, b, h, row, real, cell // STEP, W // STEP)
        s = tl.load(address, mask=mask, other=0).to(tl.float32)
        s *= tl.load(scale + h * W + cell, mask=cell < W)[None, :]
        s += tl.load(bias + h * W + cell, mask=cell < W)[None, :]
        if key_weight is not None:
            s += tl.load(key_weight + h) * cell_key_scores(q_tile, k_sum, b, h, cell, a, D, W)
        s += tl.log(tl.maximum(cell_sizes(cell, a, W)[2].to(tl.float32), 1e-37))[None, :]
        s = tl.where((cell < W)[None, :], s * LOG2E, -float("inf"))
        top, p, shrink = raise_maximum(top, s)
        total = total * shrink + tl.sum(p, 1)
        address, mask = tile(out, b, h, row, real, cell, W)
        tl.store(address, s, mask=mask)
    tl.debug_barrier()                       # one thread may read what another wrote
    for c in range(0, W, CELLS):
        address, mask = tile(out, b, h, row, real, c + tl.arange(0, CELLS), W)
        tl.store(address, (tl.load(address, mask=mask) - (top + tl.log2(total))[:, None]) / LOG2E, mask=mask)


# Backward, with g the gradient of log Q:
#
#   ds = g - Q sum(g)       dscore = sum(scale ds) over the cells that share it
#   dscale = sum(ds score), dbias = sum(ds), dkey_weight = sum(ds q mean^T), over rows by float32 atomics,
#   so that they vary in the last bits from run to run

@triton.jit(do_not_specialize=["first_row", "R", "H"])
def log_mass_backward_kernel(score, scale, q, k_sum, key_weight, out, g, dscore, dscale, dbias, dkey_weight,
                             first_row, R, H, D: tl.constexpr, M: tl.constexpr, W: tl.constexpr,
                             STEP: tl.constexpr, CELLS: tl.constexpr):
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    a, m, row, real = queries_of(first_row, R, M)
    q_tile, total = load(q, b, h, row, real, D), tl.zeros([padded(M)], tl.float32)
    for c in range(0, W, CELLS):
        address, mask = tile(g, b, h, row, real, c + tl.arange(0, CELLS), W)
        total += tl.sum(tl.load(address, mask=mask, other=0), 1)
    dweight = tl.zeros([CELLS], tl.float32)
    for c in range(0, W, CELLS):
        cell = c + tl.arange(0, CELLS)
        address, mask = tile(g, b, h, row, real, cell, W)
        ds = tl.load(address, mask=mask, other=0)
        address, _ = tile(out, b, h, row, real, cell, W)
        ds -= tl.exp(tl.load(address, mask=mask, other=-float("inf"))) * total[:, None]
        x = tl.load(tile(score, b, h, row, real, cell // STEP, W)[0], mask=mask, other=0).to(tl.float32)
        tl.atomic_add(dscale + h * W + cell, tl.sum(ds * x, 0), mask=cell < W, sem="relaxed")
        tl.atomic_add(dbias + h * W + cell, tl.sum(ds, 0), mask=cell < W, sem="relaxed")
        if key_weight is not None:
            dweight += tl.sum(ds * cell_key_scores(q_tile, k_sum, b, h, cell, a, D, W), 0)
        dx = ds * tl.load(scale + h * W + cell, mask=cell < W, other=0)[None, :]
        dx = tl.sum(tl.reshape(dx, [padded(M), CELLS // STEP, STEP]), 2)
        address, mask = tile(dscore, b, h, row, real, c // STEP + tl.arange(0, CELLS // STEP), W // STEP)
        tl.store(address, dx, mask=mask)
    if key_weight is not None:
        tl.atomic_add(dkey_weight + h, tl.sum(dweight), sem="relaxed")


class LogMass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, score, scale, bias, q, k_sum, key_weight, M, first_row):
        (B, H, R, w), (W, D) = score.shape, (scale.shape[1], q.shape[3])
        ctx.grid = len(anchors(first_row, R, M)), B * H
        ctx.sizes = dict(first_row=first_row, R=R, H=H, D=D, M=M, W=W, STEP=W // w,
                         CELLS=2048 // padded(D), num_warps=2, num_stages=1)
        out = torch.empty(B, H, R, W, device=q.device)
        log_mass_kernel[ctx.grid](strided(score), scale, bias, strided(q), strided(k_sum), key_weight,
                                  strided(out), **ctx.sizes)
        ctx.save_for_backward(score, scale, q, k_sum, key_weight, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        score, scale, q, k_sum, key_weight, out = ctx.saved_tensors
        g, dscore = with_dense_rows(g), torch.empty_like(score)
        dscale, dbias = torch.zeros(2, *scale.shape, device=g.device)
        dkey_weight = None if key_weight is None else torch.zeros_like(key_weight)
        log_mass_backward_kernel[ctx.grid](
            strided(score), scale, strided(q), strided(k_sum), key_weight, strided(out), strided(g),
            strided(dscore), dscale, dbias, dkey_weight, **ctx.sizes)
        return dscore, dscale, dbias, None, None, dkey_weight, None, None


@torch.compiler.disable
def log_mass(score, scale, bias, q, k_sum, key_weight, query_block, first_row=0):
    """log Q, the estimated mass of each cell: score (B, H, R, w), scale and bias (H, W), q (B, H, R, D),
    k_sum = running_sum(k) (B, H, T + 1, D) and key_weight (H,), or both None -> (B, H, R, W) float32.

    There is no gradient to q and k_sum: the estimate reads them as they are.
    """
    q = check("q", q, (-1, -1, -1, -1), FLOATS, q.device)
    (B, H, R, D), float32 = q.shape, [torch.float32]
    score = check("score", score, (B, H, R, -1), FLOATS, q.device)
    scale = check("scale", scale, (H, -1), float32, q.device).contiguous()
    bias, W = check("bias", bias, scale.shape, float32, q.device).contiguous(), scale.shape[1]
    check_sizes(D, query_block, W)
    if W not in [score.shape[3] * 2 ** i for i in range(5)]:
        raise ValueError(f"the map has {W} cells for {score.shape[3]} scores; 1, 2, 4, 8 or 16 may share one")
    if key_weight is not None:
        key_weight = check("key_weight", key_weight, (H,), float32, q.device)
        k_sum = check("k_sum", k_sum, (B, H, -1, D), float32, q.device)
        if first_row + R >= k_sum.shape[2]:
            raise ValueError(f"rows up to {first_row + R - 1} need more keys than {k_sum.shape[2] - 1}")
    return LogMass.apply(score, scale, bias, q, k_sum, key_weight, query_block, first_row)


# ------------------------------------------------------------------------------------------------------------
# Select
#
#   for each query, its H*W estimates in registers:
#       bisect for the level that `budget` of them reach, over float bits, whose order is that of the floats
#       of those that equal the level the first ones go in: bisect for the column in front of which they lie
#   for each block, COLUMNS columns of its M queries at a time:
#       bits = sum over m of chosen << m
#       write the columns with any bit, each at its rank

@triton.jit
def load_estimates(mass, b, row, R, column, a, H: tl.constexpr, W: tl.constexpr):
    """Queries' estimates as integers in torch.sort's order: NaN highest, -0 as 0; empty cells lowest."""
    h, c, few = column // W, column % W, tl.minimum(a, W)
    heads = tl.where(row < 0, 0, tl.where(row < R, H, 0))                   # none of a row that isn't there
    address = mass[0] + b.to(tl.int64) * mass[1] + row.to(tl.int64) * mass[3] + h.to(tl.int64) * mass[2] + c
    x = tl.load(address, mask=h < heads, other=0).to(tl.float32)            # four at a time: not yet `full`
    full = (h < heads) & ((c + 1) * few // W > c * few // W)
    bits = (x + 0.0).to(tl.int32, bitcast=True)                             # -0 + 0 is 0
    bits = tl.where(x != x, HIGHEST, bits ^ (bits >> 31 & HIGHEST))         # negative ones ascend, too
    return tl.where(full, bits, LOWEST)


@triton.jit(do_not_specialize=["first_row"])
def threshold_kernel(mass, budget, level, limit, first_row,
                     H: tl.constexpr, W: tl.constexpr, M: tl.constexpr, COLUMNS: tl.constexpr):
    row, b, R, column = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.arange(0, COLUMNS)
    block = (first_row + row) // M
    wanted = tl.load(budget + block - first_row // M).to(tl.int32)
    x = load_estimates(mass, b, row, R, column, block * M, H, W)
    low, high = tl.min(tl.where(x == LOWEST, HIGHEST, x)), tl.max(x)
    while low < high:                                  # low is reached by `wanted` or more, high + 1 by fewer
        middle = (low | high) - ((low ^ high) >> 1)    # (low + high + 1) // 2, which could overflow
        reach = tl.sum((x >= middle).to(tl.int32))
        low = tl.where(reach >= wanted, middle, low)
        high = tl.where(reach > wanted, high, tl.where(reach == wanted, middle, middle - 1))
    place, ties = tl.where(x == low, column, HIGHEST), wanted - tl.sum((x > low).to(tl.int32))
    left, right = tl.where(tl.sum((x == low).to(tl.int32)) > ties, 0, H * W), H * W
    while left < right:                                # the first column with `ties` equal ones before it
        middle = (left + right) // 2
        enough = tl.sum((place < middle).to(tl.int32)) >= ties
        left, right = tl.where(enough, left, middle + 1), tl.where(enough, middle, right)
    tl.store(level + b.to(tl.int64) * R + row, low)
    tl.store(limit + b.to(tl.int64) * R + row, left)


@triton.jit(do_not_specialize=["first_row", "R", "room"])
def flat_csr_kernel(mass, level, limit, first, crow, cells, queries, first_row, R, room,
                    H: tl.constexpr, W: tl.constexpr, M: tl.constexpr, COLUMNS: tl.constexpr):
    n, b, m = tl.program_id(0), tl.program_id(1), tl.arange(0, triton.next_power_of_2(M))
    a, start = (first_row // M + n) * M, tl.load(first + n)
    run = crow + (b.to(tl.int64) * tl.num_programs(0) + n) * (H + 1)
    tl.store(run, start)
    row = tl.where(m < M, a + m - first_row, -1)
    real = (row >= 0) & (row < R)
    low = tl.load(level + b.to(tl.int64) * R + row, mask=real, other=HIGHEST)[:, None]
    end = tl.load(limit + b.to(tl.int64) * R + row, mask=real, other=0)[:, None]
    for c in tl.range(0, H * W, COLUMNS, num_stages=3):                     # loads run ahead of the sums
        column = c + tl.arange(0, COLUMNS)
        x = load_estimates(mass, b, row[:, None], R, column[None, :], a, H, W)                # M COLUMNS
        chosen = (x > low) | ((x == low) & (column[None, :] < end))
        bits = tl.sum(chosen.to(tl.int32) << m[:, None], 0)                                   # COLUMNS
        used = (bits != 0).to(tl.int32)
        entries = start + tl.cumsum(used)                                   # up to and with this column
        at = b.to(tl.int64) * room + entries - 1
        tl.store(cells + at, column, mask=bits != 0)
        tl.store(queries + at, bits, mask=bits != 0)
        tl.store(run + 1 + column // W, entries, mask=(column % W == W - 1) & (column < H * W))
        start += tl.sum(used)


@functools.lru_cache(maxsize=256)
def layout(first_block, N, H, M, W, keys_per_query, device):
    """flat_csr_layout on the device, kept: sizes alone decide it, so nothing waits for the GPU. A recorded
    CUDA graph reads its entry again; it stays, as training asks for few sizes."""
    anchor = anchors(first_block * M, N * M, M)
    budget, first, room = flat_csr_layout(anchor, H, M, W, keys_per_query)
    return budget.to(device, non_blocking=True), first.to(device, non_blocking=True), room


@torch.compiler.disable
def select(mass, query_block, keys_per_query, first_row=0):
    """Give each query its cell_budget largest estimates over all heads; of equal ones the lower column first.

    mass (B, H, R, W): the estimated mass of each cell, or its log, which has the same order -> FlatCSR. Empty
    cells are never selected.
    """
    mass = check("mass", mass, (-1, -1, -1, -1), FLOATS, mass.device)
    (B, H, R, W), M, device = mass.shape, query_block, mass.device
    check_sizes(M=M, W=W, H=H)
    N = len(anchors(first_row, R, M))
    budget, first, room = layout(first_row // M, N, H, M, W, keys_per_query, device)
    level, limit = (torch.empty(B, R, dtype=torch.int32, device=device) for _ in range(2))
    crow = torch.empty(B, len(first), H + 1, dtype=torch.int64, device=device)
    cells, queries = (torch.zeros(B, room, dtype=torch.int32, device=device) for _ in range(2))
    columns = triton.next_power_of_2(H * W)
    threshold_kernel[R, B](
        strided(mass), budget, level, limit, first_row,
        H=H, W=W, M=M, COLUMNS=columns, num_warps=max(2, columns // 4096))
    flat_csr_kernel[len(first), B](
        strided(mass), level, limit, first, crow, cells, queries, first_row, R, room,
        H=H, W=W, M=M, COLUMNS=min(columns, 256), num_warps=4)
    return FlatCSR(crow, cells, queries, first_row + R, M, W)


# ------------------------------------------------------------------------------------------------------------
# Attend
#
#   for each block and head, its M queries as one tile:
#       for SLOTS slots at a time, first one for each key of the own block, then span = ceil(a / W) for each
#       entry of the run:
#           key = start of cell (slot // span) + slot % span, masked past the cell's end and by a query's bit
#           online softmax: new maximum, rescale, add
#
# The own block comes first, so that each query has a key, itself, in the first tile: no maximum is ever -inf.

@triton.jit
def run_of(crow, b, h, N, room, H):
    """Where the head's run of the program's block begins in cells and queries, and its number of entries."""
    n = N - tl.num_programs(0) + tl.program_id(0)                       # the last of N blocks have a query
    at = crow + (b.to(tl.int64) * N + n) * (H + 1) + h
    begin, end = tl.load(at), tl.load(at + 1)
    return b.to(tl.int64) * room + begin, (end - begin).to(tl.int32)


@triton.jit
def slots(s, begin, count, cells, queries, h, a, T, M: tl.constexpr, W: tl.constexpr, SLOTS: tl.constexpr):
    """Slots s .. s + SLOTS-1 of a block: their keys, and the bits of the queries that attend to them."""
    slot, span = s + tl.arange(0, SLOTS), tl.maximum((a + W - 1) // W, 1)
    own, entry, offset = slot < M, (slot - M) // span, (slot - M) % span
    chosen = (slot >= M) & (entry < count)
    cell = (tl.load(cells + begin + entry, mask=chosen, other=0) - h * W).to(tl.int64)
    bits = tl.load(queries + begin + entry, mask=chosen, other=0)
    later = tl.full([SLOTS], -1, tl.int32) << tl.minimum(slot, 31)          # itself and the queries after it
    key, end = tl.where(own, a + slot, cell * a // W + offset), tl.where(own, T, (cell + 1) * a // W)
    return key, tl.where(key < end, tl.where(own, later, bits), 0)


@triton.jit(do_not_specialize=["T", "R", "N", "room", "H"])
def attend_kernel(q, k, v, out, lse, crow, cells, queries, T, R, N, room, H,
                  D: tl.constexpr, M: tl.constexpr, W: tl.constexpr, SLOTS: tl.constexpr):
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    a, m, row, real = queries_of(T - R, R, M)
    q_tile = load(q, b, h, row, real, D)
    sums, total = tl.zeros([padded(M), padded(D)], tl.float32), tl.zeros([padded(M)], tl.float32)
    top = total - float("inf")
    begin, count = run_of(crow, b, h, N, room, H)
    for s in range(0, M + count * ((a + W - 1) // W), SLOTS):
        key, bits = slots(s, begin, count, cells, queries, h, a, T, M, W, SLOTS)
        k_tile, v_tile = load(k, b, h, key, bits != 0, D), load(v, b, h, key, bits != 0, D)
        allowed = (bits[None, :] >> m[:, None] & 1) != 0
        score = tl.where(allowed, dot(q_tile, tl.trans(k_tile)) * LOG2E, -float("inf"))
        top, p, shrink = raise_maximum(top, score)
        sums = sums * shrink[:, None] + dot(p.to(v_tile.dtype), v_tile)
        total = total * shrink + tl.sum(p, 1)
    address, mask = tile(out, b, h, row, real, tl.arange(0, padded(D)), D)
    tl.store(address, sums / total[:, None], mask=mask)
    tl.store(lse + tl.program_id(1).to(tl.int64) * R + row, top + tl.log2(total), mask=real)


# Backward, with p = 2^(score - lse) and delta = sum_d dout out:
#
#   dv += p^T dout        dscore = p (dout v^T - delta)        dq = dscore k        dk += dscore^T q
#
# A key's gradient comes from every later block that chose it. float32 atomics add them up: sm_90 does four
# at a time, and a transposed FlatCSR, which would need none, costs a sort and memory. So dk and dv vary in
# the last bits from run to run.

@triton.jit(do_not_specialize=["T", "R", "N", "room", "H"])
def attend_backward_kernel(q, k, v, out, lse, dout, dq, dk, dv, crow, cells, queries, T, R, N, room, H,
                           D: tl.constexpr, M: tl.constexpr, W: tl.constexpr, SLOTS: tl.constexpr):
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    a, m, row, real = queries_of(T - R, R, M)
    q_tile, dout_tile = load(q, b, h, row, real, D), load(dout, b, h, row, real, D)
    lse_tile = tl.load(lse + tl.program_id(1).to(tl.int64) * R + row, mask=real, other=0)
    delta = tl.sum(dout_tile.to(tl.float32) * load(out, b, h, row, real, D), 1)
    dq_tile = tl.zeros([padded(M), padded(D)], tl.float32)
    begin, count = run_of(crow, b, h, N, room, H)
    for s in range(0, M + count * ((a + W - 1) // W), SLOTS):
        key, bits = slots(s, begin, count, cells, queries, h, a, T, M, W, SLOTS)
        k_tile, v_tile = load(k, b, h, key, bits != 0, D), load(v, b, h, key, bits != 0, D)
        allowed = ((bits[None, :] >> m[:, None] & 1) != 0) & real[:, None]
        p = tl.where(allowed, tl.exp2(dot(q_tile, tl.trans(k_tile)) * LOG2E - lse_tile[:, None]), 0)
        add(dv, dot(tl.trans(p.to(q_tile.dtype)), dout_tile), b, h, key, bits != 0, D)
        dscore = (p * (dot(dout_tile, tl.trans(v_tile)) - delta[:, None])).to(q_tile.dtype)
        add(dk, dot(tl.trans(dscore), q_tile), b, h, key, bits != 0, D)
        dq_tile += dot(dscore, k_tile)
    address, mask = tile(dq, b, h, row, real, tl.arange(0, padded(D)), D)
    tl.store(address, dq_tile, mask=mask)


def warps(q, M):
    """One for 16 queries of 64: more of them would share too little work. float32 products need registers."""
    return padded(M) // 16 * max(1, padded(q.shape[3]) // 64) * q.element_size() // 2


class Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, crow, cells, queries, M, W):
        (B, H, R, D), T = q.shape, k.shape[2]
        ctx.grid = len(anchors(T - R, R, M)), B * H
        ctx.sizes = dict(T=T, R=R, N=crow.shape[1], room=cells.shape[1], H=H, D=D, M=M, W=W)
        out, lse = torch.empty_like(q), torch.empty(B, H, R, device=q.device)
        attend_kernel[ctx.grid](*map(strided, (q, k, v, out)), lse, crow, cells, queries, **ctx.sizes,
                                SLOTS=32, num_warps=warps(q, M), num_stages=3)
        ctx.save_for_backward(q, k, v, out, lse, crow, cells, queries)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse, *mask = ctx.saved_tensors
        dq, (dk, dv) = torch.empty_like(q), torch.zeros(2, *k.shape, device=q.device)
        attend_backward_kernel[ctx.grid](
            *map(strided, (q, k, v, out)), lse, *map(strided, (with_dense_rows(dout), dq, dk, dv)), *mask,
            **ctx.sizes, num_warps=warps(q, ctx.sizes["M"]),
            SLOTS=64 // q.element_size(), num_stages=4 // q.element_size())      # float32 takes more room
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None


@torch.compiler.disable
def attend(q, k, v, mask):
    """Exact attention to the selected cells and the own block: q (B, H, R, D), the last R of T, k and v
    (B, H, T, D), mask FlatCSR -> (B, H, R, D)."""
    q = check("q", q, (-1, -1, -1, -1), FLOATS, q.device)
    (B, H, R, D), T, M, W = q.shape, mask.T, mask.query_block, mask.map_width
    k, v = (check(name, x, (B, H, T, D), [q.dtype], q.device) for name, x in (("k", k), ("v", v)))
    crow = check("crow", mask.crow, (B, -1, H + 1), [torch.int64], q.device).contiguous()
    cells = check("cells", mask.cells, (B, -1), [torch.int32], q.device).contiguous()
    queries = check("queries", mask.queries, cells.shape, [torch.int32], q.device).contiguous()
    check_sizes(D, M, W)
    if not 1 <= R <= T or crow.shape[1] < len(anchors(T - R, R, M)):
        raise ValueError(f"{R} queries need more than the mask's {T} keys and {crow.shape[1]} blocks")
    return Attend.apply(q, k, v, crow, cells, queries, M, W)


# ------------------------------------------------------------------------------------------------------------
# Pool
#
#   for each group of neighbouring blocks, ROWS queries as one tile, which load a key once for all of them:
#       for CELLS cells at a time, over the keys that they hold in any of the blocks (few are read twice):
#           new maximum, rescale
#           p = exp(q k - maximum)                                      ROWS KEYS
#           sums += p (does the key lie in the cell?)                   ROWS blocks*CELLS
#       keep log(sums) + maximum for the cells of a query's own block, where its mass will be
#       mass = exp(that - its log-sum-exp over all cells)
#
# A query needs no other block's cells, but tensor cores give them nearly for free, and nothing is scattered.

@triton.jit
def past_scores(q, k, b, h, key, a, D: tl.constexpr):
    score = dot(q, tl.trans(load(k, b, h, key, key < tl.max(a), D)))
    return tl.where(key[None, :] < a[:, None], score * LOG2E, -float("inf"))


@triton.jit(do_not_specialize=["T", "N", "rows", "H"])
def pool_kernel(q, k, blocks, out, T, N, rows, H, D: tl.constexpr, M: tl.constexpr, W: tl.constexpr,
                ROWS: tl.constexpr, KEYS: tl.constexpr, CELLS: tl.constexpr):
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    group = (tl.num_programs(0) - 1 - tl.program_id(0)) * (ROWS // padded(M))     # the longest first
    i, x, j = tl.arange(0, ROWS), tl.arange(0, ROWS // padded(M) * CELLS), tl.arange(0, KEYS)
    n, n_cell, m = group + i // padded(M), group + x // CELLS, i % padded(M)
    a_cell = tl.load(blocks + n_cell, mask=n_cell < N, other=0) * M             # int64
    a = tl.load(blocks + n, mask=n < N, other=0).to(tl.int32) * M
    first, real = tl.min(tl.where(n < N, a, T)), (m < M) & (n < N) & (a + m < T)
    q_tile, a = load(q, b, h, a + m, real, D), tl.where(real, a, 0)
    last, total = tl.max(a), tl.zeros([ROWS], tl.float32)
    top = total - 1e30
    address, mask = tile(out, b, h, n * M + m, (m < M) & (n * M + m < rows), x % CELLS, W)
    mask = mask & ((i // padded(M))[:, None] == (x // CELLS)[None, :])
    for c in range(0, W, CELLS):
        cell, sums = c + x % CELLS, tl.zeros([ROWS, ROWS // padded(M) * CELLS], tl.float32)
        begin, end = (cell * a_cell // W).to(tl.int32), ((cell + 1) * a_cell // W).to(tl.int32)
        low = (first.to(tl.int64) * c // W).to(tl.int32)
        high = (last.to(tl.int64) * tl.minimum(c + CELLS, W) // W).to(tl.int32)
        for start in range(low, high, KEYS):
            key = start + j
            top, p, shrink = raise_maximum(top, past_scores(q_tile, k, b, h, key, a, D))
            inside = (key[:, None] >= begin[None, :]) & (key[:, None] < end[None, :])
            total, sums = total * shrink, sums * shrink[:, None]
            sums += dot(p.to(q_tile.dtype), tl.where(inside, 1.0, 0.0).to(q_tile.dtype))
        mine = mask & (cell < W)[None, :]
        total += tl.sum(tl.where(mine, sums, 0), 1)
        tl.store(address + c, tl.log2(sums) + top[:, None], mask=mine)
    lse = tl.where(total == 0, 0, top + tl.log2(total))
    tl.debug_barrier()                       # one thread may read what another wrote
    for c in range(0, W, CELLS):
        mine = mask & (c + x % CELLS < W)[None, :]
        tl.store(address + c, tl.exp2(tl.load(address + c, mask=mine) - lse[:, None]), mask=mine)


@torch.no_grad()
@torch.compiler.disable
def pool(q, k, query_block, map_width, blocks=None):
    """The attention mass of q over k in each cell of the past, renormalised there; zeros without a past.

    q, k (B, H, T, D) -> (B, H, T, W) float32. For `blocks`, N int64 indices: (B, H, N*M, W), zeros beyond T;
    quickest if they ascend, since neighbours in it share their keys.
    """
    q = check("q", q, (-1, -1, -1, -1), FLOATS, q.device)
    (B, H, T, D), M, W = q.shape, query_block, map_width
    k = check("k", k, q.shape, [q.dtype], q.device)
    check_sizes(D, M, W)
    some = torch.arange(triton.cdiv(T, M), device=q.device) if blocks is None else blocks.to(q.device)
    some = check("blocks", some, (-1,), [torch.int64], q.device).contiguous()
    out = torch.empty(B, H, T if blocks is None else len(some) * M, W, device=q.device)
    pool_kernel[triton.cdiv(len(some), 64 // padded(M)), B * H](
        strided(q), strided(k), some, strided(out), T, len(some), out.shape[2], H, D=D, M=M, W=W, ROWS=64,
        KEYS=min(32, 8192 // q.element_size() // padded(D)), CELLS=padded(M), num_warps=4, num_stages=3)
    return out
