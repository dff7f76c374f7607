"""What people wrap models in leaves the numbers as they are, under every kind of attention.

    python tests/test_wrappers.py     compiles every kind, with two backends: minutes
"""
import copy
import os
import pickle
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import HOW
from model import ATTENTIONS, Config, Transformer

KINDS = pytest.mark.parametrize("attention", ATTENTIONS)
TEXT = torch.randint(64, (4, 65), generator=torch.Generator().manual_seed(1))


def make(attention, n_layer=2):
    """Two blocks whose 4 query heads share 2 key heads; a context of 16 blocks, of which few are
    chosen."""
    torch.manual_seed(0)
    return Transformer(Config(vocab_size=64, architecture="llama", context=64, n_layer=n_layer, n_head=4,
                              n_kv_head=2, n_embd=32, block_size=4, keys_per_query=8,
                              attention=attention, map_width=16, num_features=8))


def step(model, text=TEXT):
    """Forward and backward -> the loss, with the estimate's if there is one."""
    model.zero_grad()
    out = model(text[:, :-1], text[:, 1:])
    loss = out.loss if out.kl is None else out.loss + out.kl
    loss.backward()
    return loss.item()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, wanted, text=TEXT, run=None):
    """A model, stepped through `run`, has the loss and the gradients of another one, to the bit."""
    assert step(model if run is None else run, text) == step(wanted, text)
    found = gradients(model)
    expected = gradients(wanted)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.equal(found[name]), name


def save_memory(model, reentrant=False):
    """Compute each block once more in the backward pass."""
    for block in model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=reentrant)
    return model


@KINDS
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints(attention, reentrant):
    assert_same(save_memory(make(attention), reentrant), make(attention))


@KINDS
def test_copies(attention):
    """After a backward pass, too, which leaves no state in the model but gradients."""
    model = make(attention)
    step(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(copied, model)
    average = AveragedModel(model)
    average.update_parameters(model)
    assert_same(average.module, model, run=average)


@KINDS
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_other_types(attention, dtype):
    model = make(attention)
    other = copy.deepcopy(model).to(dtype)
    exact = dict(rel=1e-5) if dtype == torch.double else dict(rel=1e-3)
    assert step(other) == pytest.approx(step(model), **exact)
    assert all(gradient.isfinite().all() for gradient in gradients(other).values())


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.double])
def test_other_default_types(attention, dtype):
    model = make(attention)
    wanted = step(model)
    torch.set_default_dtype(dtype)
    try:
        assert step(model) == wanted
    finally:
        torch.set_default_dtype(torch.float32)


def compiled_is_the_same(attention, backend, n_layer=2):
    """In one graph, at a second length, too, and back at the first."""
    torch._dynamo.reset()
    model = make(attention, n_layer)
    run = torch.compile(model, backend=backend, fullgraph=True)
    for length in (65, 40, 65):
        assert_same(model, make(attention, n_layer), TEXT[:, :length], run)


def test_compiled():
    compiled_is_the_same("sea", "eager", n_layer=1)      # a second block would be traced as the first


def ranks_are_the_same(rank, folder):
    """Two processes with half a batch each have the gradients of one with all of it."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for attention in ATTENTIONS:
        wanted = make(attention)
        step(wanted)
        for wrap in (DistributedDataParallel, shard, lambda model: shard(save_memory(model))):
            model = make(attention)
            step(wrap(model), TEXT[2 * rank:2 * rank + 2])
            for name, gradient in gradients(model).items():
                whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                torch.testing.assert_close(whole, gradients(wanted)[name], atol=1e-6, rtol=1e-4)
    dist.destroy_process_group()


def shard(model):
    mesh = init_device_mesh("cpu", (2,))                 # fully_shard itself would take GPUs that are there
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo here")
def test_two_processes_with_whole_and_with_sharded_weights(tmp_path):
    torch.multiprocessing.start_processes(ranks_are_the_same, (tmp_path,), 2, start_method=HOW)


if __name__ == "__main__":
    for attention in ATTENTIONS:
        for backend in ("eager", "aot_eager"):
            compiled_is_the_same(attention, backend)
            print(f"{attention} under {backend}: to the bit")
