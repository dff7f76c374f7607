"""
How fast SEA is, and how much memory it takes: each stage, the whole operator from q, k, v to its output, and
dense attention in the same run; then a model's training step. Prints tables and writes a CSV.

    python tests/bench.py                                  everything, on a GPU
    python tests/bench.py --lengths 8192 --blocks 16       a part
    python tests/bench.py --device cpu --lengths 256       checks this script itself, in plain PyTorch
    python tests/bench.py --decode --device cpu            a token's time in generation alone

Times are medians in ms (on a GPU triton.testing.do_bench, after a warm-up), memory is the peak above what was
allocated before, in MiB. A stage runs over all rows at once, the operator over a chunk of rows at a time,
with its MLP, scores, sums and mix compiled. On a GPU passes that take under 50 ms as called are then replays
of a CUDA graph, those of dense attention too, and so free of Python's time; "operator, as called" never is.
A training step is replayed as train.py's is; compiled as distill.py's. Its memory is what comes on top of
weights, gradients and AdamW's means, without a CUDA graph.
q, k and v are synthetic: differences of a random walk over SMOOTH tokens, so that neighbours are as alike as
in a trained model. That matters for the `union` in a table's head: cells in a row of FlatCSR over cells that
one of its queries chose (1.7 to 1.8 at M = 8 in a trained model).
"""
import argparse
import csv
import statistics
import sys
import time
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sea  # noqa: E402
from data.engine import Backward, compile_estimators, optimizer_step  # noqa: E402
from model import ATTENTIONS, OPT, OPTConfig  # noqa: E402
from train import PRESETS, make_optimizer, training_losses  # noqa: E402

SMOOTH = 64
SETTINGS = "map_width", "keys_per_query", "query_block"
AS_CALLED = "operator, as called"
FIELDS = ["what", "T", "M", "keys_per_query", "map_width", "pass", "ms", "MiB"]


def parse_arguments():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--lengths", type=int, nargs="+", default=[2 ** i for i in range(10, 18)], help=f"T {default}")
    add("--blocks", type=int, nargs="+", default=[1, 16, 32], help=f"M, query_block {default}")
    add("--points", nargs="+", default=["64:512", "64:256", "512:512"],
        help=f"keys_per_query:map_width; decoding takes the first {default}")
    add("--heads", type=int, default=12, help=f"H {default}")
    add("--head-dim", type=int, default=64, help=f"D {default}")
    add("--layers", type=int, default=12, help=f"of the models; 0 leaves them out {default}")
    add("--model-lengths", type=int, nargs="+", help="T of the model (default: lengths up to 32768)")
    add("--decode", action="store_true", help="measure generation with a cache, and nothing else")
    add("--compile", action=argparse.BooleanOptionalAction, help="MLP, sums, mix (default: on a GPU)")
    add("--device", choices=("cuda", "cpu"), help="(default: a GPU if there is one)")
    add("--csv", default="bench.csv", help=default)
    args = parser.parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    args.points = [tuple(map(int, point.split(":"))) for point in args.points]
    args.model_lengths = args.model_lengths or [T for T in args.lengths if T <= 32768]
    return args


# ---- measuring

def median_ms(f, device, graph):
    """The first call compiles. What takes a second is run once more, not many times."""
    f()
    seconds = [timed(f, device)]
    if seconds[0] < 1 and device == "cuda":
        from triton.testing import do_bench
        f = captured(f).replay if graph and seconds[0] < 0.05 else f
        return do_bench(f, warmup=25, rep=100, return_mode="median")
    seconds += [timed(f, device) for _ in range(2) if seconds[0] < 1]
    return sorted(seconds)[len(seconds) // 2] * 1000


def captured(f):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return graph


def timed(f, device):
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - start


def extra_mib(f, device):
    if device != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 20


def measure(f, device, graph=False):
    """(ms, MiB), or a word where the GPU's memory is too small or the backend does not take these sizes."""
    try:
        return median_ms(f, device, graph), extra_mib(f, device)
    except torch.OutOfMemoryError:
        return "memory", None
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        return "refused", None


# ---- what is measured: name -> (function of no inputs, tensors to differentiate or None)

def smooth(*shape, seed, device, dtype):
    """Unit normal, alike over SMOOTH tokens: (B, H, T, D) as a model has it, a view of (B, T, H, D)."""
    (B, H, T, D), generator = shape, torch.Generator(device).manual_seed(seed)
    walk = torch.randn(B, T + SMOOTH, H, D, generator=generator, device=device).cumsum(1)
    return ((walk[:, SMOOTH:] - walk[:, :-SMOOTH]) / SMOOTH ** 0.5).to(dtype).transpose(1, 2)


def materialised(q, k, v):
    T = q.shape[2]
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    return (q @ k.mT).masked_fill(~causal, -torch.inf).softmax(-1) @ v


def dense_rows(q, k, v, device):
    sdpa = lambda: scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    rows = {"materialised": lambda: materialised(q, k, v)}
    if device == "cpu":
        return {name: (f, (q, k, v)) for name, f in {"SDPA": sdpa, **rows}.items()}
    backends = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
    for name, backend in backends.items():
        def run(backend=backend):
            with sdpa_kernel(backend):
                return sdpa()
        rows[name] = run
    return {name: (f, (q, k, v)) for name, f in rows.items()}


def stage_rows(operator, q, k, v):
    """The operator's stages apart, each over all rows at once. -> rows, FlatCSR"""
    config, ops = operator.config, sea.implementation(q.device)
    M, W, keys = config.query_block, config.map_width, config.keys_per_query
    values, k_sum = (sea.sinusoids(0, v).expand_as(v), v), sea.running_sum(k)
    attention = lambda: ops.kernel_attention(q, k, values, operator.omega)[0]
    seen = attention()
    scores = lambda: operator.scores(operator.encoder(seen, v))
    score = scores()
    scale, bias = operator.score_scale.expand(q.shape[1], W), operator.score_bias.expand(q.shape[1], W)
    log_mass = lambda: ops.log_mass(score, scale, bias, q, k_sum, operator.score_weights[1], M)
    mass = log_mass()
    select = lambda: ops.select(mass, M, keys)
    mask = select()
    sparse, gates = ops.attend(q, k, v, mask), torch.rand(*q.shape[:3], 2, device=q.device, dtype=q.dtype)
    return {"running sum of k": (lambda: operator.sum_keys(k, sea.Cache()), None),
            "kernel attention": (attention, None),
            "MLP, scores": (scores, None),
            "cell keys, log mass": (log_mass, None),
            "select": (select, None),
            "attend": (lambda: ops.attend(q, k, v, mask), (q, k, v)),
            "select + attend": (lambda: ops.attend(q, k, v, select()), None),
            "mix": (lambda: operator.mix(sparse, v, gates, sea.Cache()), None),
            "pool, for training": (lambda: ops.pool(q, k, M, W), None)}, mask


def operator_rows(operator, q, k, v):
    def with_kl():
        operator.kl = None               # it keeps autograd's nodes of the last call, of another stream
        out = operator(q, k, v, teacher=(q.detach(), k.detach()))
        return torch.cat([out.flatten(), operator.kl.view(1).to(out.dtype)])
    inputs, alone = (q, k, v, *operator.parameters()), lambda: operator(q, k, v)
    return {"operator": (alone, inputs), AS_CALLED: (alone, inputs), "operator, with KL": (with_kl, inputs)}


def union(mask, H, keys_per_query):
    """Cells in a row of FlatCSR over the cells that one of its queries chose."""
    M, W, N = mask.query_block, mask.map_width, mask.crow.shape[1]
    budget = sea.cell_budget(sea.anchors(0, mask.T, M), H, W, keys_per_query)
    rows = mask.crow[0, :, -1] - mask.crow[0, :, 0]
    return (rows[N // 2:].sum() / budget[N // 2:].sum()).item()


# ---- tables

def report(rows, head, device, precision, writer, best=None):
    """Measure rows, forward and, where there is something to differentiate, forward and backward."""
    print(f"\n{'  '.join(f'{name} {value}' for name, value in head.items())}")
    print(f"{'forward':>36}{'MiB':>9}{'x SDPA':>8}{'fwd + bwd':>12}{'MiB':>9}{'x SDPA':>8}", flush=True)
    best, found = dict(best or {}), {}
    for name, (f, inputs) in rows.items():
        line = f"    {name:22}"
        for kind in ("forward", "fwd + bwd"):
            if kind == "fwd + bwd" and inputs is None:
                continue
            run = passes(f, inputs, precision)[kind]
            ms, mib = found[name, kind] = measure(run, device, graph=name != AS_CALLED)
            ratio = best[kind] / ms if kind in best and not isinstance(ms, str) else None
            width = 10 if kind == "forward" else 12
            line += f"{ms:>{width}}" if isinstance(ms, str) else f"{ms:>{width}.3f}"
            line += " " * 9 if mib is None else f"{mib:>9.0f}"
            line += " " * 8 if ratio is None else f"{ratio:>8.2f}"
            sizes = {key: head.get(key) for key in FIELDS[1:5]}
            writer.writerow({"what": name, **sizes, "pass": kind, "ms": ms, "MiB": mib})
        print(line, flush=True)
    return found


def passes(f, inputs, precision):
    def forward():
        with torch.no_grad(), precision:
            f()

    def both():
        with precision:
            out = f()
        used = [x for x in inputs if x.requires_grad]
        torch.autograd.grad(out, used, torch.ones_like(out), allow_unused=True)

    return {"forward": forward, "fwd + bwd": both}


def bench_attention(args, precision, writer):
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    for T in args.lengths:
        q, k, v = (smooth(1, args.heads, T, args.head_dim, seed=seed, device=args.device, dtype=dtype)
                   for seed in range(3))
        q, k, v = (x.requires_grad_() for x in (q * args.head_dim ** -0.5, k, v))
        found = report(dense_rows(q, k, v, args.device), {"T": T}, args.device, nullcontext(), writer)
        best = {}                          # of the two SDPA backends, where either takes these sizes
        for (name, kind), (ms, _) in found.items():
            if name.startswith("SDPA") and not isinstance(ms, str):
                best[kind] = min(ms, best.get(kind, ms))
        for keys, W in args.points:
            for M in args.blocks:
                config = sea.SEAConfig(args.heads, args.head_dim, W, keys, M)
                operator = sea.SEAttention(config).to(args.device)
                if args.compile:
                    torch.compiler.reset()                    # as if nothing else had been compiled before
                    compile_estimators(operator)
                with torch.no_grad(), precision:
                    stages, mask = stage_rows(operator, q, k, v)
                head = {"T": T, "M": M, "keys_per_query": keys, "map_width": W,
                        "union": f"{union(mask, args.heads, keys):.2f}"}
                rows = {**stages, **operator_rows(operator, q, k, v)}
                report(rows, head, args.device, precision, writer, best)
                del rows, stages, mask, operator


def measure_step(config, args, precision):
    """Time of a recorded step, memory of one as called: a graph keeps its own. Recording comes first, since
    it needs a stream that autograd has not left."""
    torch.manual_seed(0)
    torch.compiler.reset()                                    # as if nothing else had been compiled before
    model = OPT(config).to(args.device)
    if args.compile:
        compile_estimators(model)
    optimizer, losses_of = make_optimizer(model, 1e-3, 0.1), training_losses(model, model, 0.1)
    tokens = torch.randint(config.vocab_size, (1, config.context + 1), device=args.device)
    step = partial(optimizer_step, model, optimizer, [(tokens[:, :-1], tokens[:, 1:])], clip=1.0)
    recorded, as_called = (partial(step, backward=Backward(losses_of, precision, record=record))
                           for record in (args.device == "cuda", False))
    try:
        for _ in range(Backward.WARM_UP + 1):
            recorded()
        return median_ms(recorded, args.device, graph=False), extra_mib(as_called, args.device)
    except torch.OutOfMemoryError:
        return "memory", None


def bench_model(args, precision, writer):
    """A step of a byte model of the heads above: forward, backward, AdamW; B = 1, M = 16."""
    C = args.heads * args.head_dim
    print(f"\ntraining step, {args.layers} layers, {C} wide, 256 tokens in the vocabulary")
    print(f"    {'T':>8}{'':3}{'attention':24}{'ms':>10}{'tokens/s':>12}{'MiB':>9}", flush=True)
    for T in args.model_lengths:
        shape = dict(vocab_size=256, context=T, n_layer=args.layers, n_head=args.heads, n_embd=C)
        kinds = {"dense": dict(attention="dense")}
        for keys, W in args.points:
            kinds[f"sea, {keys} keys, W {W}"] = dict(keys_per_query=keys, map_width=W, query_block=16)
        for name, more in kinds.items():
            ms, mib = measure_step(OPTConfig(**shape, **more), args, precision)
            numbers = f"{ms:>10}" if isinstance(ms, str) else f"{ms:>10.1f}{T / ms * 1000:>12.0f}"
            print(f"    {T:>8}   {name:24}{numbers}" + ("" if mib is None else f"{mib:>9.0f}"), flush=True)
            writer.writerow({"what": f"step, {name}", "T": T, "M": more.get("query_block"), "pass": "step",
                             "keys_per_query": more.get("keys_per_query"), "map_width": more.get("map_width"),
                             "ms": ms, "MiB": mib})


def decoding_sizes(args):
    """Of the models that generate: train.py's CPU preset, on a GPU those of the flags at the first point."""
    if args.device == "cpu":
        return {name: PRESETS["cpu"][name] for name in ("n_layer", "n_head", "n_embd", *SETTINGS)}
    (keys, W), M = args.points[0], 16
    return dict(n_layer=args.layers, n_head=args.heads, n_embd=args.heads * args.head_dim, map_width=W,
                keys_per_query=keys, query_block=M)


@torch.no_grad()
def bench_decode(args, precision, writer, rounds=8, tokens=16):
    """Time of a token when the cache holds about T. B = 1, random weights and text. Lengths take turns, so
    that what else the machine does meets all alike."""
    lengths = (1024, 4096, 16384) if args.device == "cpu" else (2048, 8192, 32768)
    sizes = decoding_sizes(args)
    print(f"\ndecoding, {sizes}, {torch.get_num_threads()} threads: median (least) ms a token after T")
    print(f"    {'attention':12}" + "".join(f"{T:>18}" for T in lengths) + "    last / first", flush=True)
    for kind in ATTENTIONS:
        torch.manual_seed(0)
        config = OPTConfig(vocab_size=256, context=max(lengths), attention=kind, **sizes)
        model = OPT(config).eval().to(args.device)
        idx = torch.randint(256, (1, max(lengths)), device=args.device)
        caches, seconds = {T: model.new_cache(T) for T in lengths}, {T: [] for T in lengths}
        with precision:
            for T, cache in caches.items():
                model(idx[:, rounds * tokens:T], cache=cache)
            for T, cache in list(caches.items()) * rounds:
                seconds[T] += [timed(lambda: model(token, cache=cache), args.device)
                               for token in idx[:, :tokens].split(1, 1)]
        ms = [1000 * statistics.median(seconds[T]) for T in lengths]
        numbers = "".join(f"{m:>9.2f} ({1000 * min(seconds[T]):6.2f})" for T, m in zip(lengths, ms))
        print(f"    {kind:12}{numbers}{ms[-1] / ms[0]:>16.2f}", flush=True)
        for T, m in zip(lengths, ms):
            writer.writerow({"what": f"decode, {kind}", "T": T, "M": sizes["query_block"], "pass": "token",
                             "keys_per_query": sizes["keys_per_query"], "map_width": sizes["map_width"],
                             "ms": m})


def main():
    args = parse_arguments()
    cuda = args.device == "cuda"
    precision = torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()
    versions = [f"{name} {version(name)}" for name in ("torch", "triton") if find_spec(name)]
    print(torch.cuda.get_device_name() if cuda else "CPU", *versions, sep=", ")
    print(f"B 1, H {args.heads}, D {args.head_dim}, {'bfloat16' if cuda else 'float32'}; synthetic q, k, v: "
          f"differences of a random walk over {SMOOTH} tokens")
    with open(args.csv, "w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        if not args.decode:
            bench_attention(args, precision, writer)
        if args.layers and not args.decode:
            bench_model(args, precision, writer)
        if args.layers:
            bench_decode(args, precision, writer)


if __name__ == "__main__":
    main()
