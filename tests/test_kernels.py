"""
kernels.py against sea.py in float64: compiled on a GPU, in Triton's interpreter without one.

`python tests/test_kernels.py [SHAPE] [CARD]` compiles every kernel for cards that need not be there.
"""
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="kernels.py needs Triton")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

import kernels  # noqa: E402
import sea  # noqa: E402
from model import Config, Transformer  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module", autouse=kernels.INTERPRETED)
def quick_interpreter():
    """Half of what Triton's interpreter does is to no purpose here. Its own names, so only where they are."""
    with pytest.MonkeyPatch.context() as patch:
        # A tl.sort takes it a second: numpy sorts for it.
        def sort(x, dim):
            handle = interpreter.TensorHandle(np.sort(x.handle.data, axis=dim), x.handle.dtype)
            return tl.core.tensor(handle, x.type)
        patch.setattr(tl, "sort", sort)

        # It works out which integers overflow, and without its option debug tells nobody.
        builder = getattr(interpreter, "interpreter_builder", None)
        if hasattr(getattr(builder, "options", None), "sanitize_overflow"):
            patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))

        # It puts itself in the place of tl's functions at every call of a function in a kernel: once is enough.
        if hasattr(interpreter, "_patch_lang"):
            put_in_place = interpreter._patch_lang
            nothing = getattr(interpreter, "_LangPatchScope", lambda: None)()

            def once(function):
                libraries = [x for x in function.__globals__.values() if x is tl or x is tl.core]
                first = any(tl.core.is_builtin(library.load) for library in libraries)
                return put_in_place(function) if first else nothing
            patch.setattr(interpreter, "_patch_lang", once)
        yield


@pytest.fixture(scope="module", autouse=True)
def compiling(request):
    """A process that compiles all kernels for test_compiled_code, while the tests before it run."""
    if not any(item.name == "test_compiled_code" for item in request.session.items):
        yield
        return
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, "small", "75", "90"]        # 80 lies between
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True,
                          cwd=ROOT) as process:
        yield process
        process.kill()


def error(x, reference, least=1e-3):
    """Relative norm of the difference; NaN anywhere gives NaN, which no bound accepts."""
    x = x.detach().double().cpu()
    reference = reference.detach().double().cpu()
    return ((x - reference).norm() / reference.norm().clamp(min=float(least))).item()


def heads(B, H, HKV, T, D, dtype=torch.float32, R=None):
    """q, k, v as a model has them: (B, H, T, D) views of (B, T, H, D)."""
    generator = torch.Generator().manual_seed(T + D)
    shapes = (B, R or T, H, D), (B, T, HKV, D), (B, T, HKV, D)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype).transpose(1, 2) for shape in shapes]


def check(function, reference, inputs, bound):
    """function and its gradients against the reference's in float64, on the CPU."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    out = function(*inputs)
    wanted = reference(*exact)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(4))
    out.backward(grad.to(out.device, out.dtype))
    wanted.backward(grad.double())
    assert error(out, wanted) < bound
    for x, y in zip(inputs, exact):
        assert error(x.grad, y.grad, least=grad.norm()) < bound          # one may be 0 but for rounding


@pytest.mark.parametrize("name", ["sea_attention", "attend"])
def test_torch_compile_takes_it_whole(name):
    """In one graph, at a second length, too, and with the results of the plain call."""
    def f(q, k, v):
        chosen = torch.ones(1, 2, q.shape[2], q.shape[2] // 4, dtype=torch.bool, device=DEVICE)
        return getattr(kernels, name)(q * 2, k, v, *((4, 8, 2) if name == "sea_attention" else (chosen, 4)))

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for T in (20, 27) if name == "sea_attention" else (20,):
        inputs = [x.requires_grad_() for x in heads(1, 2, 1, T, 16)]
        out = f(*inputs)
        once_more = compiled(*inputs)
        assert error(once_more, out) < 1e-6
        for x, y in zip(torch.autograd.grad(once_more.sum(), inputs), torch.autograd.grad(out.sum(), inputs)):
            assert error(x, y) < 1e-6


# ---- a token

@pytest.mark.parametrize("B, H, HKV, T, D, S, K, coarse, dtype", [
    (1, 1, 1, 20, 16, 8, 48, 8, torch.float32), (1, 2, 1, 73, 24, 3, 9, 2, torch.float32),
    (1, 1, 1, 96, 16, 1, 5, 4, torch.bfloat16)])
def test_token_by_token(B, H, HKV, T, D, S, K, coarse, dtype):
    """kernels.append and decode give each row of sea_attention, and keep the moments of the whole."""
    q, k, v = heads(B, H, HKV, T, D, dtype)
    start = max(1, T - (2 if DEVICE == "cpu" else 40))
    cache = sea.Cache(k[:, :, :start], v[:, :, :start], T + 7, S, coarse)
    cache.moments, cache.wide_moments = kernels.moments(cache.k, S, coarse)
    for t in range(start, T):
        position = torch.tensor([t], device=DEVICE)
        kernels.append(cache, k[:, :, t:t + 1], v[:, :, t:t + 1], position)
        out = kernels.decode(q[:, :, t:t + 1], cache, position, K)
        row = kernels.sea_attention(q[:, :, t:t + 1], k[:, :, :t + 1], v[:, :, :t + 1], S, K, coarse)
        assert error(out, row) < (1e-5 if dtype == torch.float32 else 1e-2)
    for kept, moments in zip((cache.moments, cache.wide_moments), kernels.moments(k, S, coarse)):
        assert torch.equal(kept[:, :, :moments.shape[2]], moments)


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("attention", ["sea", "dense", "window"])
def test_a_graph_writes_the_same_text(attention):
    torch.manual_seed(0)
    config = Config(vocab_size=96, context=200, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, architecture="llama",
                    attention=attention, block_size=4, keys_per_query=8)
    model = Transformer(config).to(DEVICE, torch.bfloat16).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    idx = torch.randint(96, (2, 150), device=DEVICE)
    texts = []
    for graph in False, True:
        torch.manual_seed(1)
        texts.append(torch.cat(list(model.stream(idx, 120, temperature=0.5, graph=graph)), 1))     # once past T
    assert torch.equal(*texts)
    assert len(texts[0].unique()) > 20


# ---- sea_attention: forward and backward

@pytest.mark.parametrize("B, H, HKV, T, D, S, K, coarse", [
    (1, 1, 1, 1, 16, 8, 48, 8), (2, 2, 1, 63, 16, 4, 8, 8), (1, 3, 1, 129, 24, 8, 16, 8),
    (1, 1, 1, 257, 16, 2, 8, 8), (1, 2, 1, 100, 80, 3, 9, 3), (1, 1, 1, 100, 128, 32, 32, 2),
    (1, 1, 1, 60, 16, 2, 300, 8)])
def test_sea_attention(B, H, HKV, T, D, S, K, coarse):
    check(lambda q, k, v: kernels.sea_attention(q, k, v, S, K, coarse),
          lambda q, k, v: sea.sea_attention(q, k, v, S, K, coarse), heads(B, H, HKV, T, D), 2e-6)


def test_a_few_last_rows_and_a_scale():
    check(lambda q, k, v: kernels.sea_attention(q, k, v, 2, 8, scale=0.7),
          lambda q, k, v: sea.sea_attention(q, k, v, 2, 8, scale=0.7), heads(1, 2, 1, 190, 16, R=21), 2e-6)


@pytest.mark.parametrize("K", [1, 40, 400])
def test_every_budget(K, T=180):
    q, k, v = heads(1, 1, 1, T, 16)
    exact = sea.sea_attention(q.double().cpu(), k.double().cpu(), v.double().cpu(), 4, K, 4)
    assert error(kernels.sea_attention(q, k, v, 4, K, 4), exact) < 2e-6


def test_more_blocks_than_a_program_can_choose():
    q, k, v = heads(1, 1, 1, kernels.MOST + 4, 16, R=1)
    with pytest.raises(ValueError, match="255 blocks, the kernels take up to 254"):
        kernels.sea_attention(q, k, v, 1, 400)


def test_any_strides(T=70):
    q, k, v = heads(2, 2, 2, 2 * T, 32)
    q = q[:, :, ::2, :16]
    k = k.mT.contiguous().mT[:, :, ::2, 16:]
    v = v[:, :1, ::2, ::2].expand(2, 2, T, 16)
    exact = sea.sea_attention(q.double().cpu(), k.double().cpu(), v.double().cpu(), 4, 8)
    assert error(kernels.sea_attention(q, k, v, 4, 8), exact) < 2e-6


def test_two_strides_of_one(T=9):
    """Rows that overlap: what is made like such a tensor has a last stride that is not 1."""
    line = heads(1, 1, 1, 1, 16 + T - 1)[0]
    q, k, v = [(line * factor).view(-1).unfold(0, 16, 1)[None, None] for factor in (1, 2, 3)]
    exact = [x.detach().double().cpu().clone().requires_grad_() for x in (q, k, v)]
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    assert q.stride()[2:] == (1, 1) and q.shape == (1, 1, T, 16)
    out = kernels.sea_attention(*inputs, 4, 4, 2)
    wanted = sea.sea_attention(*exact, 4, 4, 2)
    assert error(out, wanted) < 2e-6
    out.square().sum().backward()
    wanted.square().sum().backward()
    for x, y in zip(inputs, exact):
        assert error(x.grad, y.grad) < 1e-5


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(dtype, bound, T=130):
    """Attention to the blocks that the kernels chose: a choice between two near equal ones may fall otherwise."""
    q, k, v = heads(1, 2, 1, T, 64, dtype)
    chosen = chosen_by_kernels(q, k, 4, 12, 4)
    exact = [x.double().cpu() for x in (q, k, v)]
    wanted = sea.attend(exact[0] / 8, exact[1], exact[2], chosen, 4)
    assert error(kernels.sea_attention(q, k, v, 4, 12, 4), wanted) < bound
    close_to_the_best(chosen, exact[0] / 8, exact[1], 4, 12, 4, 3e-2)


# ---- the choice

def dense(lists, R, W, tile):
    """Lists -> (B, H, R, W) bool; a block that a list holds twice is an error."""
    count, block = lists[..., 0, :1], lists[..., 0, 1:]
    live = torch.arange(block.shape[3], device=DEVICE) < count
    block = torch.where(live, block, W + R).long()
    assert (block.diff(dim=-1)[live[..., 1:]] > 0).all(), "the blocks of a list do not ascend"
    bits = torch.zeros(*count.shape[:3], W + R + 1, dtype=torch.int64, device=DEVICE)
    bits.scatter_(-1, block, torch.where(live, lists[..., 1, :].diff(dim=-1).long(), 0))
    queries = bits[..., None, :] >> torch.arange(tile, device=DEVICE)[:, None] & 1        # (B, H, G, tile, ...)
    return queries.bool().flatten(2, 3)[:, :, :R, :W].cpu()


def chosen_by_kernels(q, k, S, K, coarse):
    """What kernels.sea_attention chooses, (B, H, R, W) bool """
    lists = kernels.look_twice(q, k, q.shape[3] ** -0.5, S, K, coarse)
    return dense(lists, q.shape[2], k.shape[2] // S, kernels.ATTENDING)


def close_to_the_best(chosen, q, k, S, K, coarse, bound):
    """As many blocks as sea.py chooses, and where others, others with scores as high but for rounding."""
    wanted = sea.look_twice(q, k, S, K, coarse)
    scores = sea.block_scores(q, sea.moments(k, S), S)
    assert (chosen.sum(-1) == wanted.sum(-1)).all()
    differs = (chosen != wanted).any(-1)
    best = scores.masked_fill(~wanted, 0).sum(-1)[differs]
    found = scores.masked_fill(~chosen, 0).sum(-1)[differs]
    assert differs.float().mean() < 0.2
    if differs.any():
        assert ((best - found).abs() < bound * scores[scores.isfinite()].abs().max()).float().mean() > 0.9


def adversarial(kind, T, D):
    q, k, _ = heads(1, 1, 1, T, D)
    if kind == "equal keys":
        k = k[:, :, :1].expand_as(k)
    if kind == "zero queries":
        q = torch.zeros_like(q)
    if kind == "repeated blocks":
        k = k[:, :, :12].repeat(1, 1, T // 12 + 1, 1)[:, :, :T]
    if kind == "one huge key":
        k = k.clone()
        k[:, :, T // 3] *= 1000
    if kind == "later is better":
        k = torch.linspace(-1, 1, T, device=DEVICE)[:, None].expand_as(k) * q[:, :, :1].sign()
        q = q[:, :, :1].expand_as(q)
    return q, k


@pytest.mark.parametrize("kind", ["equal keys", "zero queries", "repeated blocks", "one huge key", "later is better"])
@pytest.mark.parametrize("T, S, K, coarse", [(150, 2, 4, 4), (61, 4, 12, 8)])
def test_ties_go_to_the_lower_block(kind, T, S, K, coarse):
    q, k = adversarial(kind, T, 16)
    chosen = chosen_by_kernels(q, k, S, K, coarse)
    # Scores that are equal in float32 are ties for the kernels and for sea.py: in the very same dtype.
    wanted = sea.look_twice(q.cpu() / 4, k.cpu(), S, K, coarse)
    assert (chosen.sum(-1) == wanted.sum(-1)).all()
    assert (chosen == wanted).all(-1).float().mean() > (0.99 if kind in ("equal keys", "zero queries") else 0.9)


@pytest.mark.parametrize("T, R, S, K, coarse, stacks", [(290, 30, 2, 16, 16, 16), (450, 3, 1, 14, 2, 32)])
def test_a_stack_that_runs_dry(T, R, S, K, coarse, stacks):
    """The best of blocks of 2, or of coarse blocks of 2, lie so that one stack, not so deep, should keep them all."""
    q, k, _ = heads(1, 1, 1, T, 16, R=R)
    good = torch.arange(T, device=DEVICE) // 2 % stacks == 5
    q = q.abs()
    k = 0.01 * k + (2. * good - 1 + 0.5 * torch.linspace(0, 1, T, device=DEVICE).cos())[:, None]
    chosen = chosen_by_kernels(q, k, S, K, coarse)
    wanted = sea.look_twice(q.cpu() / 4, k.cpu(), S, K, coarse)
    assert (chosen.sum(-1) == wanted.sum(-1)).all()
    assert (chosen == wanted).all(-1).float().mean() > 0.9


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["q", "k"])
def test_what_is_no_number_comes_out_as_nan(value, where, T=100, t=41):
    q, k, v = heads(1, 1, 1, T, 16)
    (q if where == "q" else k)[:, :, t, 3] = value
    out = kernels.sea_attention(q, k, v, 4, 8, 2)[0, 0]
    assert out[:t].isfinite().all()
    assert out[t].isnan().all()
    assert where == "k" or out[t + 1:].isfinite().all()


@pytest.mark.parametrize("changed", [97])
def test_no_output_depends_on_a_later_token(changed, T=140):
    """To rounding: neighbours share tiles, so that a sum may be taken in another order."""
    q, k, v = heads(1, 1, 1, T, 16)
    before = kernels.sea_attention(q, k, v, 2, 6, 4)
    for x in (q, k, v):
        x[:, :, changed:] = 10 * torch.randn_like(x[:, :, changed:])
    after = kernels.sea_attention(q, k, v, 2, 6, 4)
    assert error(after[:, :, :changed], before[:, :, :changed]) < 1e-6


# ---- attend

@pytest.mark.parametrize("T, R, S", [(90, 90, 4), (70, 9, 3), (40, 40, 64)])
def test_attend_to_any_choice(T, R, S):
    q, k, v = heads(2, 2, 1, T, 24, R=R)
    W = T // S
    own = sea.own_block(R, T - R, S, "cpu")
    chosen = (torch.rand(2, 2, R, W, generator=torch.Generator().manual_seed(0)) < 0.2) & (torch.arange(W) < own)
    check(lambda q, k, v: kernels.attend(q, k, v, chosen.to(DEVICE), S),
          lambda q, k, v: sea.attend(q, k, v, chosen, S), (q, k, v), 2e-6)


# ---- mistakes

def test_mistakes_are_value_errors():
    q, k, v = heads(1, 2, 1, 30, 16)
    for name, args in (("float64", (q.double(), k.double(), v.double())), ("k is torch.bfloat16", (q, k.bfloat16(), v)),
                       ("width", (q[..., :12], k[..., :12], v[..., :12])), ("meta", (q, k.to("meta"), v))):
        with pytest.raises(ValueError, match=name):
            kernels.sea_attention(*args)


@pytest.mark.skipif(DEVICE == "cuda", reason="the same as any GPU program, where there is a GPU")
def test_cpu_tensors_outside_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match="CUDA device"):
        kernels.sea_attention(*heads(1, 1, 1, 4, 16))


# ---- compiled code, for cards that need not be there

SHAPES = {"opt-125m": (12, 12, 64), "smollm2-135m": (9, 3, 64), "opt-2.7b": (32, 32, 80), "widest": (2, 1, 128),
          "small": (2, 1, 16)}
SHARED = {75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024}             # bytes that a program can have
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32",
            torch.int64: "*i64"}


class Recorder:
    """Stands for a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel, launches):
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def record(H, HKV, D, dtype):
    """The launches of one forward and backward with two looks, of one with a large budget, and of a token."""
    launches = []
    kernels.INTERPRETED = True                                       # so that the wrappers take CPU tensors
    originals = {name: x for name, x in vars(kernels).items() if name.endswith("_kernel")}
    vars(kernels).update({name: Recorder(x, launches) for name, x in originals.items()})
    inputs = [x.cpu().requires_grad_() for x in heads(1, H, HKV, 1024, D, dtype)]
    kernels.sea_attention(*inputs).sum().backward()
    kernels.sea_attention(*inputs, keys_per_query=400)
    q, k, v = [x.detach()[:, :, -1:] for x in inputs]
    cache = sea.Cache(*[x.detach() for x in inputs[1:]], 1024)
    cache.moments, cache.wide_moments = kernels.moments(cache.k, 8, 8)
    kernels.append(cache, k, v, torch.tensor([1023]))
    kernels.decode(q, cache, torch.tensor([1023]))
    vars(kernels).update(originals)
    return launches


def specialize(value, path, attributes, constants):
    """The type that Triton gives an argument of a launch; it notes multiples of 16 and makes 1 a constant."""
    if isinstance(value, tuple):
        return tuple(specialize(x, (*path, i), attributes, constants) for i, x in enumerate(value))
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return POINTERS[value.dtype]
    if value is None or value == 1:
        constants[path] = value
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32"


def build(kernel, args, options, card):
    """Compile a launch as Triton would."""
    signature, attributes, constants, options = {}, {}, {}, dict(options)
    for p, value in zip(kernel.params, args + tuple(options.pop(p.name) for p in kernel.params[len(args):])):
        if p.is_constexpr:
            signature[p.name] = "constexpr"
            constants[p.num,] = value
        else:
            signature[p.name] = specialize(value, (p.num,), attributes, constants)
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", card, 32)
    return triton.compile(source, target=target, options=options)


def registers_and_stack(cubin):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True)
    return tuple(map(int, re.search(r"REG:(\d+) STACK:(\d+)", run.stdout).groups()))


def compile_all(cards, shapes):
    """One JSON line for each kernel, shape and card."""
    seen = set()
    for card in cards:
        half = torch.float16 if card == 75 else torch.bfloat16       # bfloat16 begins with sm_80
        for shape in shapes:
            for kernel, args, options in record(*SHAPES[shape], half):
                code = build(kernel, args, options, card)
                if code.hash in seen:
                    continue
                seen.add(code.hash)
                registers, stack = registers_and_stack(code.asm["cubin"])
                print(json.dumps(dict(
                    kernel=kernel.__name__, shape=shape, card=card, warps=code.metadata.num_warps,
                    registers=registers, stack=stack, shared=code.metadata.shared,
                    mma=len(re.findall(r"mma\.sync|wgmma\.mma_async", code.asm["ptx"])))), flush=True)


def test_compiled_code(compiling):
    printed, errors = compiling.communicate()
    assert compiling.returncode == 0, errors
    built = [json.loads(line) for line in printed.splitlines()]
    names = {name for name in vars(kernels) if name.endswith("_kernel")}
    for card in (75, 90):
        assert {x["kernel"] for x in built if x["card"] == card} == names
    for x in built:
        assert x["shared"] <= SHARED[x["card"]], x
        products = x["kernel"] in ("choose_kernel", "attend_kernel", "attend_backward_kernel")
        assert x["mma"] > 0 or not products or x["card"] == 75, x


if __name__ == "__main__":
    wanted = [x for x in sys.argv[1:] if x in SHAPES]
    compile_all([int(x) for x in sys.argv[1:] if x.isdigit()] or SHARED, wanted or SHAPES)
