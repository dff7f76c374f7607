"""
kernels.py against sea.py in float64: compiled on a GPU, in Triton's interpreter without one.

`python tests/test_kernels.py` compiles every kernel for three cards, needs none, and prints what each takes.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="kernels.py needs Triton")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import triton  # noqa: E402

import kernels  # noqa: E402
import sea  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def error(x, reference, least=1):
    """Relative norm of the difference; NaN anywhere gives NaN, which no bound accepts."""
    x, reference = x.detach().double().cpu(), reference.detach().double().cpu()
    return ((x - reference).norm() / reference.norm().clamp(min=float(least))).item()


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def heads(B, H, T, D, dtype=torch.float32):
    """q, k, v as a model has them: (B, H, T, D) views of (B, T, H, D)."""
    q, k, v = (normal(B, T, H, D, seed=seed, dtype=dtype).transpose(1, 2) for seed in range(3))
    return q * D ** -0.5, k, v


def estimates(B, H, R, W, kind="smooth"):
    x = normal(B, H, R, W, seed=3)
    last_head = torch.arange(H, device=DEVICE)[:, None, None] == H - 1
    return {"smooth": lambda: (2 * x).softmax(-1), "zero": lambda: x * 0, "signed": lambda: x.round(),
            "equal": lambda: (2 * x).round().clamp(min=0), "one head": lambda: x.softmax(-1) * last_head,
            "odd": lambda: torch.where(x > 1, torch.nan, torch.where(x < -1, torch.inf, x.round()))}[kind]()


def same(mask, reference):
    tensors = zip(mask[:3], reference[:3])
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in tensors) and mask[3:] == reference[3:]


def with_gradients(function, inputs, grad):
    """Output of function and the gradients of its inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    out.backward(grad.to(out.device, out.dtype))
    return [out, *(x.grad for x in inputs)]


def check(function, reference, inputs, bound):
    """function and its gradients against the reference's in float64, on the CPU."""
    exact = [x.double().cpu() for x in inputs]
    grad = normal(*reference(*exact).shape, seed=4)
    for x, wanted in zip(with_gradients(function, inputs, grad), with_gradients(reference, exact, grad)):
        assert error(x, wanted, least=grad.norm()) < bound          # a gradient may be 0 but for rounding


def check_attend(inputs, mask, bound=1e-5):
    check(lambda q, k, v: kernels.attend(q, k, v, mask), lambda q, k, v: sea.attend(q, k, v, on_cpu(mask)),
          inputs, bound)


def on_cpu(mask):
    return mask._replace(**{name: getattr(mask, name).cpu() for name in ("crow", "cells", "queries")})


# ---- select

@pytest.mark.parametrize("kind", ["smooth", "equal", "zero", "one head", "signed", "odd"])
@pytest.mark.parametrize("B, H, T, W, M, keys", [
    (2, 3, 31, 16, 8, 6), (1, 1, 33, 4, 1, 2), (1, 2, 63, 12, 32, 5)])
def test_select(B, H, T, W, M, keys, kind):
    mass = estimates(B, H, T, W, kind)
    assert same(kernels.select(mass, M, keys), sea.select(mass.cpu(), M, keys))


@pytest.mark.parametrize("T", [1, 100])
def test_select_everything(T):
    mass = estimates(1, 2, T, 8)
    mask = kernels.select(mass, 16, 10 ** 6)
    assert same(mask, sea.select(mass.cpu(), 16, 10 ** 6))
    assert torch.equal(sea.flat_csr_to_dense(on_cpu(mask), 1, 2)[0, 0], torch.ones(T, T).bool().tril())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_select_of_half_precision(dtype):
    mass = estimates(1, 2, 40, 16).to(dtype)                         # 8 or 11 bits: full of equal ones
    assert same(kernels.select(mass, 8, 4), sea.select(mass.cpu(), 8, 4))


def test_select_in_chunks():
    mass = estimates(2, 2, 60, 16)
    whole = kernels.select(mass, 8, 4)
    assert same(sea.join([kernels.select(mass[:, :, i:i + 24], 8, 4, i) for i in (0, 24, 48)]), whole)
    for first_row in (37, 59):                                       # in the middle of a block; a single row
        part = mass[:, :, first_row:]
        assert same(kernels.select(part, 8, 4, first_row), sea.select(part.cpu(), 8, 4, first_row))


@pytest.mark.parametrize("kind", ["smooth", "equal"])
def test_select_of_many_columns(kind):
    mass = estimates(1, 32, 3, 512, kind)
    assert same(kernels.select(mass, 2, 64, 4001), sea.select(mass.cpu(), 2, 64, 4001))


def test_select_reads_any_strides():
    mass = estimates(1, 2, 40, 16)
    apart = torch.stack([mass, -mass], -1)
    assert same(kernels.select(apart[..., 0], 8, 4), sea.select(mass.cpu(), 8, 4))
    part = mass[:, :, 8:]
    assert same(kernels.select(part.mT.contiguous().mT, 8, 4), sea.select(part.cpu(), 8, 4))


# ---- attend

@pytest.mark.parametrize("B, H, T, D, M, W, keys", [
    (1, 2, 1, 64, 16, 4, 4), (2, 2, 63, 64, 16, 16, 8), (1, 1, 33, 80, 1, 32, 4), (1, 2, 100, 80, 32, 4, 16),
    (1, 1, 257, 64, 16, 8, 40), (1, 3, 50, 8, 5, 16, 3), (1, 1, 40, 128, 16, 16, 8),
    (1, 2, 40, 24, 16, 8, 10 ** 6)])
def test_attend(B, H, T, D, M, W, keys):
    mask = kernels.select(estimates(B, H, T, W), M, keys)
    check_attend(heads(B, H, T, D), mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attend_in_half_precision(dtype):
    mask = kernels.select(estimates(1, 2, 60, 16), 16, 8)
    check_attend(heads(1, 2, 60, 32, dtype), mask, 1e-2)


def test_attend_when_a_head_has_no_cell():
    mask = kernels.select(estimates(1, 3, 50, 16, "one head"), 8, 2)
    first, _, third, end = mask.crow[0, 1:].unbind(-1)
    assert (third == first).all() and (end > third).all()
    check_attend(heads(1, 3, 50, 16), mask)


def test_attend_reads_any_strides():
    mask = kernels.select(estimates(1, 2, 40, 16), 8, 4)
    q, k, v = (x.mT.contiguous().mT for x in heads(1, 2, 40, 16))    # the last stride is 40
    v = v[:, :1].expand(-1, 2, -1, -1)
    check_attend((q, k, v), mask)


@pytest.mark.parametrize("M", [1, 8])
def test_decoding(M):
    """The last queries alone get what all of them get, from their own mask or from that of all rows."""
    T, mass, (q, k, v) = 50, estimates(1, 2, 50, 16), heads(1, 2, 50, 16)
    every = kernels.select(mass, M, 4)
    whole = kernels.attend(q, k, v, every)
    for R in (1, 3, 20):
        few = kernels.select(mass[:, :, -R:], M, 4, T - R)
        assert error(kernels.attend(q[:, :, -R:], k, v, few), whole[:, :, -R:]) < 1e-6
        assert error(kernels.attend(q[:, :, -R:], k, v, every), whole[:, :, -R:]) < 1e-6


def test_nan_stays_where_it_must():
    T, M, (q, k, v) = 60, 8, heads(1, 1, 60, 16)
    mask = kernels.select(estimates(1, 1, T, 16), M, 4)
    sees = sea.flat_csr_to_dense(on_cpu(mask), 1, 1)[0, 0, :, 20]    # the queries that attend to key 20
    broken = lambda x: torch.where(torch.arange(T, device=DEVICE)[:, None] == 20, torch.nan, x)
    bad = kernels.attend(broken(q), k, v, mask).isnan().any(-1)[0, 0].cpu()
    assert torch.equal(bad, torch.arange(T) == 20)
    for q_k_v in ((q, broken(k), v), (q, k, broken(v))):
        bad = kernels.attend(*q_k_v, mask).isnan().any(-1)[0, 0].cpu()
        assert bad[sees].all() and not bad[:16].any()
    bad = kernels.pool(q, broken(k), M, 16).isnan().any(-1)[0, 0].cpu()
    assert torch.equal(bad, torch.arange(T) >= 24)


# ---- pool

@pytest.mark.parametrize("B, H, T, D, M, W", [
    (2, 2, 63, 64, 16, 16), (1, 1, 30, 80, 1, 4), (1, 1, 100, 16, 32, 40), (1, 1, 257, 64, 16, 20),
    (1, 1, 1, 8, 4, 4)])
def test_pool(B, H, T, D, M, W):
    q, k, _ = heads(B, H, T, D)
    mass, wanted = kernels.pool(4 * q, k, M, W), sea.pool(4 * q.double().cpu(), k.double().cpu(), M, W)
    assert mass.dtype == torch.float32 and error(mass, wanted) < 1e-5
    assert torch.equal(mass.cpu() == 0, wanted == 0)                 # no past, or an empty cell


def test_pool_of_some_blocks():
    (q, k, _), blocks = heads(1, 2, 75, 16), torch.tensor([9, 0, 4, 5, 3, 8])
    mass = kernels.pool(q, k, 8, 12, blocks.to(DEVICE))
    wanted = sea.pool(q.double().cpu(), k.double().cpu(), 8, 12, blocks)
    assert mass.shape == (1, 2, 48, 12) and error(mass, wanted) < 1e-5
    assert (mass[:, :, 3:16] == 0).all()                             # beyond T, and no past


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pool_in_half_precision(dtype):
    q, k, _ = heads(1, 1, 60, 32, dtype)
    assert error(kernels.pool(q, k, 16, 16), sea.pool(q.double().cpu(), k.double().cpu(), 16, 16)) < 1e-2


# ---- kernel attention

@pytest.mark.parametrize("B, H, T, D, E, F, dtype, bound", [
    (2, 2, 63, 64, 64, 64, torch.float32, 1e-5), (1, 2, 100, 80, 80, 40, torch.float32, 1e-5),
    (1, 1, 257, 8, 72, 100, torch.float32, 1e-5), (1, 1, 1, 64, 128, 64, torch.float32, 1e-5),
    (1, 2, 100, 32, 32, 64, torch.float16, 1e-2), (1, 2, 100, 32, 32, 64, torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("sides", [1, 2])
def test_kernel_attention(B, H, T, D, E, F, dtype, bound, sides):
    inputs = *heads(B, H, T, D, dtype)[:2], *heads(B, H, T, E, dtype)[3 - sides:]
    inputs[2].copy_(inputs[2][:1, :1].expand_as(inputs[2]))
    omega = sea.orthogonal_features(D, F).to(DEVICE)

    def run(module, rows, *sums, exact=lambda x: x):
        q, k, *values = (exact(x[:, :, rows]) for x in inputs)
        values[0] = values[0][:1, :1].expand_as(values[0])           # as the code of positions is
        return module.kernel_attention(q, k, values, exact(omega), *sums)

    expected = run(sea, slice(T), exact=lambda x: x.double().cpu())
    for got, wanted in zip(run(kernels, slice(T)), expected):
        assert error(got, wanted) < bound
    if T > 2:                                                        # in two goes, as in decoding
        _, *sums = run(kernels, slice(T // 3))
        assert error(run(kernels, slice(T // 3, T), *sums)[0], expected[0][:, :, T // 3:]) < bound


# ---- log mass

def scores(B, H, T, W, share, first_row, dtype=torch.float32):
    """score, scale, bias as a model has them: the scores are a view whose last stride is not 1."""
    score = normal(B, W // share, T - first_row, H, seed=5, dtype=dtype).permute(0, 3, 2, 1)
    return score, 1 + 0.3 * normal(H, W, seed=6), 0.3 * normal(H, W, seed=7)


@pytest.mark.parametrize("B, H, T, D, M, W, first_row, cell_keys", [
    (2, 2, 63, 64, 16, 12, 0, True), (1, 1, 40, 80, 1, 32, 21, True), (1, 2, 100, 16, 32, 100, 37, True),
    (1, 1, 257, 64, 16, 80, 0, True), (1, 2, 63, 8, 16, 36, 0, False), (1, 1, 1, 8, 4, 4, 0, True)])
def test_log_mass(B, H, T, D, M, W, first_row, cell_keys, dtype=torch.float32, bound=1e-5):
    q, k, _ = heads(B, H, T, D)
    q, k_sum = q[:, :, first_row:].to(dtype), sea.running_sum(k)
    inputs = [*scores(B, H, T, W, 4, first_row, dtype), *[1 + normal(H, seed=8)] * cell_keys]

    def of(module, q, k_sum):
        keys = (k_sum,) if cell_keys else (None, None)
        return lambda *inputs: module.log_mass(*inputs[:3], q, *keys, *inputs[3:], M, first_row)
    check(of(kernels, q, k_sum), of(sea, q.double().cpu(), k_sum.double().cpu()), inputs, bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_mass_in_half_precision(dtype):
    cut = DEVICE == "cpu" and dtype == torch.bfloat16                # the interpreter does not round, it cuts
    test_log_mass(1, 2, 60, 32, 16, 40, 0, True, dtype, 2e-2 if cut else 1e-2)


@pytest.mark.parametrize("share", [1, 16])
def test_log_mass_of_wide_and_narrow_scores(share):
    inputs = scores(1, 2, 50, 32, share, 0)
    none = torch.zeros(1, 2, 50, 8, device=DEVICE), None, None, 8
    check(lambda *x: kernels.log_mass(*x, *none), lambda *x: sea.log_mass(*x, *none), inputs, 1e-5)


# ---- all together

@pytest.mark.parametrize("M, cell_keys", [(8, True), (4, False)])
def test_the_operator_is_that_of_pytorch(M, cell_keys, monkeypatch, T=75):
    monkeypatch.setattr(sea, "MAP_ROWS", 32)                             # chunks, and not of M rows alone
    torch.manual_seed(0)
    layer = sea.SEAttention(sea.SEAConfig(2, 16, map_width=16, keys_per_query=6, query_block=M,
                                          cell_keys=cell_keys)).to(DEVICE)
    inputs, found = heads(1, 2, T, 16), []
    for module in (sea, kernels):
        monkeypatch.setattr(sea, "implementation", lambda device: module)
        q, k, v = (x.detach().requires_grad_() for x in inputs)
        layer.zero_grad()
        out = layer(q, k, v, teacher=(inputs[0] + 0.3, inputs[1]))
        (out.square().sum() + layer.kl).backward()
        found.append([out, layer.kl, *(x.grad for x in (q, k, v, *layer.parameters()))])
    for got, wanted in zip(*found):
        # a bias below a LayerNorm has gradient 0; a GPU's convolutions are tf32
        assert error(got, wanted, least=0.1) < (1e-4 if DEVICE == "cpu" else 1e-3)


@pytest.mark.parametrize("M", [1, 16])
@torch.no_grad()
def test_no_output_depends_on_a_later_token(M, monkeypatch, T=70):
    monkeypatch.setattr(sea, "implementation", lambda device: kernels)
    torch.manual_seed(0)
    layer = sea.SEAttention(sea.SEAConfig(2, 16, map_width=16, keys_per_query=6, query_block=M)).to(DEVICE)
    layer.gates.bias.data.fill_(1.)                                  # so that the mean of v takes part
    inputs = heads(1, 2, T, 16)
    out = layer(*inputs)
    for t in (1, 33, T - 1):
        changed = layer(*(torch.cat([x[:, :, :t], 1 - x[:, :, t:]], 2) for x in inputs))
        far = (out - changed).abs().amax((0, 1, 3))  # a block's queries share the order of sums
        assert far[:t].max() < 1e-5 and far[t:].min() > 1e-2


# ---- mistakes

def test_mistakes_are_value_errors():
    (q, k, v), mass = heads(1, 2, 20, 16), estimates(1, 2, 20, 8)
    mask, k_sum = kernels.select(mass, 8, 4), sea.running_sum(k)
    attend, select, pool, log_mass = kernels.attend, kernels.select, kernels.pool, kernels.log_mass
    inputs, ones = scores(1, 2, 20, 16, 4, 0), torch.ones(2, device=DEVICE)
    for wrong in [
            lambda: attend(q.double(), k.double(), v.double(), mask), lambda: attend(q, k.half(), v, mask),
            lambda: attend(q, k[:, :, 1:], v, mask), lambda: attend(q, k, v[:, :1], mask),
            lambda: attend(q[0], k[0], v[0], mask), lambda: attend(q, k, v.to("meta"), mask),
            lambda: attend(q[..., :12], k[..., :12], v[..., :12], mask), lambda: attend(q[:, :1], k, v, mask),
            lambda: attend(q, k, v, mask._replace(crow=mask.crow[:, 1:])),
            lambda: attend(q, k, v, mask._replace(cells=mask.cells.long())),
            lambda: attend(q, k, v, mask._replace(query_block=33)),
            lambda: select(mass.double(), 8, 4), lambda: select(mass[0], 8, 4), lambda: select(mass, 0, 4),
            lambda: select(mass.to("meta"), 8, 4), lambda: select(mass.new_zeros(1, 40, 1, 1024), 8, 4),
            lambda: pool(q, k[:, :, 1:], 8, 8), lambda: pool(q, k, 8, 8, torch.arange(2.)),
            lambda: pool(q, k, 64, 8), lambda: log_mass(*inputs[:3], q, k_sum.half(), ones, 8),
            lambda: log_mass(*inputs[:3], q, k_sum, ones, 8, first_row=1),
            lambda: kernels.kernel_attention(q, k[:, :1], [v], normal(16, 64)),
            lambda: kernels.kernel_attention(q, k, [v], normal(8, 64)),
            lambda: log_mass(inputs[0][..., :3], *inputs[1:], q, k_sum, ones, 8),
            lambda: log_mass(*inputs[:2], inputs[2][:, 1:], q, k_sum, ones, 8)]:
        with pytest.raises(ValueError):
            wrong()


@pytest.mark.skipif(DEVICE == "cuda", reason="the same as any GPU program, where there is a GPU")
def test_cpu_tensors_outside_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match="CUDA device"):
        kernels.select(estimates(1, 1, 4, 4), 1, 1)


# ---- compiled code, for cards that need not be there

MODELS = {"opt-125m": (12, 64, 512, 16), "opt-1.3b": (32, 64, 512, 16), "opt-2.7b": (32, 80, 512, 16),
          "largest tiles": (1, 128, 256, 32)}                                    # H, D, W, M
DOTS = {"state_kernel", "kernel_attention_kernel", "log_mass_kernel", "log_mass_backward_kernel",
        "attend_kernel", "attend_backward_kernel", "pool_kernel"}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32",
            torch.int64: "*i64"}


class Recorder:
    """Stands for a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def record(H, D, W, M, dtype):
    """The launches of one forward and backward of everything."""
    kernels.INTERPRETED, launches = True, []                         # so that the wrappers take CPU tensors
    originals = {name: x for name, x in vars(kernels).items() if name.endswith("_kernel")}
    vars(kernels).update({name: Recorder(x, launches) for name, x in originals.items()})
    q, k, v = (x.to(dtype).requires_grad_() for x in heads(1, H, 32, D))
    score, scale, bias = (x.requires_grad_() for x in scores(1, H, 32, W, 4, 0, dtype))
    key_weight, omega = torch.ones(H, device=DEVICE), normal(D, 64)
    kernels.log_mass(score, scale, bias, q, sea.running_sum(k), key_weight, M).sum().backward()
    kernels.kernel_attention(q, k, (v, v), omega)
    kernels.attend(q, k, v, kernels.select(estimates(1, H, 32, W), M, 64)).sum().backward()
    kernels.pool(q.detach(), k.detach(), M, W)
    vars(kernels).update(originals)
    return launches


def specialize(value, path, attributes, constants, generic=False):
    """The type that Triton gives an argument of a launch; it notes multiples of 16 and makes 1 a constant."""
    if isinstance(value, tuple):
        return tuple(specialize(x, (*path, i), attributes, constants) for i, x in enumerate(value))
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return POINTERS[value.dtype]
    if value == 1 and not generic:
        constants[path] = 1
        return "constexpr"
    if value % 16 == 0 and not generic:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32"


def build(kernel, args, options, card):
    """Compile a launch as Triton would."""
    signature, attributes, constants, options = {}, {}, {}, dict(options)
    for p, value in zip(kernel.params, args + tuple(options.pop(p.name) for p in kernel.params[len(args):])):
        if p.is_constexpr:
            signature[p.name], constants[p.num,] = "constexpr", value
        else:
            signature[p.name] = specialize(value, (p.num,), attributes, constants, p.do_not_specialize)
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


def compile_all(cards):
    """One JSON line for each kernel, model and card."""
    seen = set()
    for card in cards:
        half = torch.float16 if card == 75 else torch.bfloat16       # bfloat16 begins with sm_80
        for model, sizes in MODELS.items():
            if model == "largest tiles" and card != 80:              # float32 is the same code on all of them
                continue
            for kernel, args, options in record(*sizes, torch.float32 if model == "largest tiles" else half):
                code = build(kernel, args, options, card)
                if code.hash in seen:
                    continue
                seen.add(code.hash)
                registers, stack = registers_and_stack(code.asm["cubin"])
                print(json.dumps(dict(
                    kernel=kernel.__name__, model=model, card=card, warps=code.metadata.num_warps,
                    registers=registers, stack=stack, shared=code.metadata.shared,
                    mma=len(re.findall(r"mma\.sync|wgmma\.mma_async", code.asm["ptx"])))), flush=True)


def test_compiled_code():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True, cwd=ROOT)
    runs = [subprocess.Popen([sys.executable, __file__, *cards], **pipes) for cards in (["75"], ["80", "90"])]
    printed = [run.communicate() for run in runs]                    # two at a time: it is most of a minute
    assert not any(run.returncode for run in runs), printed
    built = [json.loads(line) for out, _ in printed for line in out.splitlines()]
    assert {x["kernel"] for x in built if x["card"] == 90} == DOTS | {"threshold_kernel", "flat_csr_kernel"}
    for x in built:
        assert x["shared"] <= 64 * 1024, x
        if x["kernel"] in DOTS and x["card"] > 75 and x["model"] != "largest tiles":
            assert x["mma"] > 0, x                                   # float32 is not for tensor cores


if __name__ == "__main__":
    compile_all([int(card) for card in sys.argv[1:]] or (75, 80, 90))
