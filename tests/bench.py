"""
How fast SEA is and how much memory it takes, beside dense attention in the same run; needs a GPU.

    python tests/bench.py                                     the operator at all lengths and settings
    python tests/bench.py --lengths 8192 --settings 8:48      a part
    python tests/bench.py --model                             a training step of 12 layers, 768 wide
    python tests/bench.py --decode                            a token from a cache of T, two models
    python tests/bench.py --memory                            a forward of T tokens, and generation

Times are medians in ms of replayed CUDA graphs, free of Python's time, but for "as called". Memory is
the peak above what was allocated before, in MiB. q, k and v are synthetic: differences of a random walk
over SMOOTH tokens, so that neighbours are as alike as in a trained model. Of flash and cuDNN the faster
one counts as dense.
"""
import csv
import sys
import time
from pathlib import Path

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import kernels  # noqa: E402
from ablate import setting  # noqa: E402
from data import engine  # noqa: E402
from data.common import Parser, fail, number, one_line  # noqa: E402
from model import ATTENTIONS, Config, Dense, Transformer  # noqa: E402
from sea import budgets  # noqa: E402

SMOOTH = 64
MODELS = dict(demo=dict(architecture="llama", vocab_size=256, n_layer=8, n_head=8, n_embd=512),
              smollm2=dict(architecture="llama", vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3,
                           n_embd=576, n_ffn=1536),
              opt125m=dict(architecture="opt", vocab_size=50272, n_layer=12, n_head=12, n_embd=768))
DENSE = dict(flash=SDPBackend.FLASH_ATTENTION, cudnn=SDPBackend.CUDNN_ATTENTION)
FIELDS = "what T S K pass ms times_dense MiB".split()


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--lengths", type=number(int, 1), nargs="+", default=[2 ** i for i in range(11, 18)], help="T")
    add("--settings", type=setting, nargs="+", default=[(8, 48, 8), (8, 240, 8), (16, 64, 8)],
        metavar="S:K[:COARSE]", help="block sizes, keys a query and, if not 8, blocks in a coarse one")
    add("--batch", type=number(int, 1), default=1, help="B")
    add("--heads", type=number(int, 1), default=12, help="H")
    add("--kv-heads", type=number(int, 1), help="Hkv; else H")
    add("--head-dim", type=number(int, 8, 128), default=64, help="D")
    add("--model", action="store_true", help="a training step in place of the operator")
    add("--decode", action="store_true", help="a token in place of the operator")
    add("--memory", action="store_true", help="memory of whole models, no times")
    add("--csv", default="bench.csv", help="file for the table")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        fail("this measures an NVIDIA GPU, and PyTorch finds none here")
    args.kv_heads = args.kv_heads or args.heads
    return args


# ---- measuring

def median_ms(f):
    """Of replays of a CUDA graph of f."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            f()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return do_bench(graph.replay, warmup=10, rep=50, return_mode="median")


def extra_mib(f):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 20


def forward_and_backward(f, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    grad = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(f(*inputs), inputs, grad)


# ---- what is measured

def smooth(B, H, T, D, seed):
    """Unit normal, alike over SMOOTH tokens: (B, H, T, D) as a model has it, a view of (B, T, H, D)."""
    generator = torch.Generator("cuda").manual_seed(seed)
    walk = torch.randn(B, T + SMOOTH, H, D, generator=generator, device="cuda").cumsum(1)
    x = (walk[:, SMOOTH:] - walk[:, :-SMOOTH]) / SMOOTH ** 0.5
    return x.to(torch.bfloat16).transpose(1, 2)


def dense(backend, shared):
    def attention(q, k, v):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
    return attention


def sea(S, K, Z):
    return lambda q, k, v: kernels.sea_attention(q, k, v, S, K, Z)


def stages(q, k, v, S, K, Z):
    """Name and function of each launch of a forward."""
    T = k.shape[2]
    scale = q.shape[3] ** -0.5
    n, n_coarse = budgets(S, K, Z)
    fine, wide = kernels.moments(k, S, Z)
    yield "moments", lambda: kernels.moments(k, S, Z)
    near = None
    if T // (S * Z) > n_coarse + 2:
        first = wide, T, S * Z, n_coarse, scale, kernels.LOOKING, kernels.REFINING
        near = kernels.choose(q, *first)
        yield "first look", lambda: kernels.choose(q, *first)
    second = fine, T, S, n, scale, kernels.REFINING, kernels.ATTENDING, near, Z
    lists = kernels.choose(q, *second)
    yield "second look", lambda: kernels.choose(q, *second)
    yield "attend", lambda: kernels.Attend.apply(q, k, v, lists, scale, S)


def operator(args, T, add):
    shapes = args.heads, args.kv_heads, args.kv_heads
    inputs = [smooth(args.batch, H, T, args.head_dim, seed) for seed, H in enumerate(shapes)]
    best = {}
    for name, backend in DENSE.items():
        f = dense(backend, args.kv_heads != args.heads)
        for which, run in (("forward", lambda: f(*inputs)), ("both", forward_and_backward(f, inputs))):
            ms = median_ms(run)
            best[which] = min(ms, best.get(which, ms))
            add(name, T, "", "", which, ms, best[which] / ms, extra_mib(run))
    for S, K, Z in args.settings:
        f = sea(S, K, Z)
        for which, run in (("forward", lambda: f(*inputs)), ("both", forward_and_backward(f, inputs))):
            ms = median_ms(run)
            add("sea", T, S, K, which, ms, best[which] / ms, extra_mib(run))
        called = do_bench(lambda: f(*inputs), warmup=10, rep=50, return_mode="median")
        add("sea, as called", T, S, K, "forward", called, best["forward"] / called, "")
        for name, run in stages(*inputs, S, K, Z):
            add(name, T, S, K, "forward", median_ms(run), "", "")


def training_step(args, T, add):
    """Forward and backward of a micro-batch as train.py runs it: bfloat16 autocast, one CUDA graph."""
    base = None
    for attention, (S, K, *_) in [("dense", (8, 48))] + [("sea", x) for x in args.settings]:
        config = Config(50304, T, 12, 12, n_embd=768, architecture="opt", attention=attention,
                        block_size=S, keys_per_query=K)
        model = Transformer(config).cuda()
        idx = torch.randint(50304, (args.batch, T), device="cuda")

        def forward_backward(idx, targets):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(idx, targets).loss
            loss.backward()
            return loss.detach()
        MiB = extra_mib(lambda: forward_backward(idx, idx))
        step = engine.Recorded(forward_backward, model)
        ms = do_bench(lambda: step(idx, idx), warmup=50, rep=300, return_mode="median")
        base = base or ms
        add(f"step, {attention}", T, S, K, "both", ms, base / ms, MiB)


@torch.no_grad()
def one_token(args, T, add):
    """Transformer.decode of a token that fills a cache of T; the memory is the caches'. bfloat16."""
    for name in ("demo", "smollm2"):
        base = None
        for attention in ("dense", "sea"):
            config = Config(context=T, attention=attention, **MODELS[name])
            model = Transformer(config).cuda().bfloat16().eval()
            caches = []
            for block in model.layers:
                k, v = torch.randn(2, 1, config.n_kv_head, T - 1, config.head_dim,
                                   dtype=torch.bfloat16, device="cuda")
                caches.append(block.self_attn.attention.new_cache(k, v, T))
            held = [x for cache in caches for x in vars(cache).values() if torch.is_tensor(x)]
            MiB = sum(x.nbytes for x in held) / 2 ** 20
            token = torch.zeros(1, 1, dtype=torch.long, device="cuda")
            position = torch.tensor([T - 1], device="cuda")

            def step():
                return model.decode(token, position, caches)
            ms = median_ms(step)
            base = base or ms
            add(f"{name}, {attention}", T, 8, 48, "token", ms, base / ms, MiB)
            called = do_bench(step, return_mode="median")
            add("as called", T, 8, 48, "token", called, "", "")


class Eager(Dense):
    """With all T x T scores in memory, as the paper compared itself with."""

    def forward(self, q, k, v, teacher=None):
        k, v = [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)]
        scores = q @ k.mT * q.shape[3] ** -0.5
        future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill_(future, -torch.inf).softmax(-1) @ v, None


@torch.no_grad()
def memory(args, T, add):
    """Peak above the weights, bfloat16: of all logits of T tokens; of a cache and 4 new tokens."""
    ATTENTIONS["eager"] = Eager
    for name in ("opt125m", "smollm2"):
        for attention in ("eager", "dense", "sea"):
            config = Config(context=T, attention=attention, **MODELS[name])
            model = Transformer(config).cuda().bfloat16().eval()
            idx = torch.randint(config.vocab_size, (1, T), device="cuda")
            for which, run in (("forward", lambda: model(idx)),
                               ("generation", lambda: model.generate(idx[:, :-4], 4))):
                try:
                    MiB = extra_mib(run)
                except torch.OutOfMemoryError:
                    MiB = "too much"
                add(f"{name}, {attention}", T, 8, 48, which, "", "", MiB)


@one_line(OSError, torch.OutOfMemoryError)
def main():
    args = parse_arguments()
    measure = (one_token if args.decode else training_step if args.model else memory if args.memory
               else operator)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; "
          f"B {args.batch} H {args.heads} Hkv {args.kv_heads} D {args.head_dim} bfloat16", flush=True)
    start = time.time()
    with open(args.csv, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(FIELDS)

        def add(*row):
            row = [f"{x:.4g}" if isinstance(x, float) else x for x in row]
            table.writerow(row)
            print(*(str(x).rjust(w) for x, w in zip(row, (15, 7, 3, 4, 8, 8, 7, 7))), flush=True)
        print(*(x.rjust(w) for x, w in zip(FIELDS, (15, 7, 3, 4, 8, 8, 7, 7))))
        for T in args.lengths:
            measure(args, T, add)
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
