"""Distillation: a student starts where its teacher is, learns and stays linear in memory."""
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data.common
import distill
import train
from data import engine
from model import OPT, OPTConfig

SMALL = dict(vocab_size=256, context=64, n_layer=2, n_head=2, n_embd=64, map_width=16, keys_per_query=8,
             query_block=4)
SETTINGS = dict(lr=1e-3, new_lr=10., weight_decay=0.01, warmup=5, steps=60, batch_size=8, seed=1, clip=1.0,
                accumulate=1, save_interval=100, compile=False,
                log_interval=1, device="cpu",
                **{f"weight_{name}": weight for name, (weight, _) in distill.WEIGHTS.items()})


@pytest.fixture(scope="module")
def tokens():
    import argparse
    return np.frombuffer(Path(argparse.__file__).read_bytes(), np.uint8).astype(np.uint16)


@pytest.fixture(scope="module")
def teacher(tokens):
    """A dense model after 200 steps."""
    torch.manual_seed(0)
    model = OPT(OPTConfig(**SMALL, attention="dense"))
    optimizer = train.make_optimizer(model, 3e-3, 0.1)
    for step in range(200):
        batch = data.common.random_batch(tokens, 64, 16, step, "cpu")
        backward = engine.Backward(train.training_losses(model, model, 0.), nullcontext())
        engine.optimizer_step(model, optimizer, [batch], backward, 1.0)
    return model.eval()


def loss_of(model, tokens):
    return train.evaluate(model, tokens, 16, 100, nullcontext())


def student_of(teacher, attention="sea", **settings):
    torch.manual_seed(1)
    return distill.with_attention(teacher, attention, settings)


def test_a_student_whose_budget_covers_the_past_starts_at_its_teacher(teacher, tokens):
    student = student_of(teacher, keys_per_query=64)
    assert math.exp(loss_of(student, tokens)) == pytest.approx(math.exp(loss_of(teacher, tokens)), rel=0.01)
    assert loss_of(student_of(teacher, "dense"), tokens) == loss_of(teacher, tokens)


@pytest.mark.parametrize("cell_keys", [True, False])
def test_what_is_compiled_gives_the_same_losses_at_every_length(cell_keys, teacher, tokens, monkeypatch):
    """With the backend that runs what was traced: inductor needs a C compiler and a minute."""
    eager = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: eager(f, backend="eager"))
    monkeypatch.setattr("sea.MAP_ROWS", 16)
    plain, compiled = (student_of(teacher, cell_keys=cell_keys) for _ in range(2))
    engine.compile_estimators(compiled)
    for context in (20, 33, 48, 64):
        batch = data.common.random_batch(tokens, context, 2, context, "cpu")
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            wanted, found = (distill.distillation_losses(m, teacher, *batch) for m in (plain, compiled))
        for name in distill.WEIGHTS:
            assert found[name].item() == pytest.approx(wanted[name].item(), rel=1e-4), (context, name)
        sum(found.values()).backward()
        loss_of(compiled, tokens[:300])


def test_distillation_lowers_the_losses_and_halves_the_attention_kl(teacher, tokens, capsys):
    student = student_of(teacher)
    before, args = loss_of(student, tokens), SimpleNamespace(**SETTINGS)
    distill.distill(student, teacher, tokens, args, nullcontext())
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    column = lambda name: [float(line[line.index(name) + 1]) for line in lines]
    assert np.mean(column("total")[-5:]) < 0.9 * np.mean(column("total")[:3])
    assert np.mean(column("attention")[-5:]) < 0.5 * np.mean(column("attention")[:3])
    assert loss_of(student, tokens) < before
    assert not any(p.grad is not None and p.grad.any() for p in teacher.parameters())


def test_losses_are_zero_against_oneself(teacher, tokens):
    batch = data.common.random_batch(tokens, 64, 4, 0, "cpu")
    losses = distill.distillation_losses(student_of(teacher, "dense"), teacher, *batch)
    assert all(losses[name].item() < 1e-9 for name in ("hidden", "output", "logits")) and losses["text"] > 0


@pytest.mark.parametrize("attention", ["sea", "window", "performer", "dense"])
def test_two_rates_and_every_parameter_once(teacher, attention):
    student = student_of(teacher, attention)
    groups = train.make_optimizer(student, 1e-3, 0.01, new=10.).param_groups
    rates = {id(p): group["peak"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rates) == len(list(student.parameters()))
    for name, p in student.named_parameters():
        assert rates[id(p)] == pytest.approx(1e-2 if ".attention." in name else 1e-3)


def test_keys_and_mass(teacher, tokens):
    idx = torch.from_numpy(tokens[:64].astype("int64"))[None]
    assert distill.keys_and_mass(teacher, idx) == (None, None)
    keys, mass = distill.keys_and_mass(student_of(teacher, keys_per_query=64), idx)
    assert keys == pytest.approx((64 + 1) / 2) and mass == pytest.approx(1, abs=1e-5)
    few, less = distill.keys_and_mass(student_of(teacher, keys_per_query=4), idx)
    assert few < keys and 0 < less < mass
    window, _ = distill.keys_and_mass(student_of(teacher, "window", keys_per_query=4), idx)
    assert window < 4 + 2 + 1                    # as many as SEA's 4 past ones and half its own block


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation makes, forward or backward."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_a_step_at_4096_tokens_makes_nothing_of_t_times_t(T=4096):
    torch.manual_seed(0)
    teacher = OPT(OPTConfig(**{**SMALL, "context": T, "n_layer": 1, "n_embd": 16}, attention="dense")).eval()
    student, idx = student_of(teacher, map_width=32, query_block=16), torch.randint(256, (1, T))
    with LargestTensor() as largest:
        losses = distill.distillation_losses(student.train(), teacher, idx, idx)
        sum(losses.values()).backward()
    assert 0 < largest.elements < T * T // 4


# ---- the script

@pytest.fixture
def folder(tmp_path, monkeypatch, tokens):
    monkeypatch.setattr(data.common, "FOLDER", tmp_path / "data")
    (tmp_path / "data").mkdir()
    text = tokens[:9000].astype(np.uint8).tobytes().decode()
    data.common.write("tiny", dict(train=text, val=text[:800], test=text[800:1600]), "bytes", "a test")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["distill.py", *line.split(), "--device", "cpu"])
    try:
        status = distill.main() or 0
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_distil_then_evaluate(folder, teacher, monkeypatch, capsys):
    engine.save_checkpoint(Path("t.pt"), teacher, tokenizer="bytes", data="tiny")
    line = "--teacher t.pt --steps 4 --batch-size 4 --warmup 1 --eval-windows 5"
    status, out, _ = run(line, monkeypatch, capsys)
    last = out.strip().splitlines()[-1].split()
    final = dict(zip(last[1::2], last[2::2]))
    assert status == 0 and last[0] == "final:" and not Path("out-sea-student/ckpt.pt.part").exists()
    assert {"val_ppl", "teacher_ppl", "ppl_before", "keys_per_query", "mass_kept", "peak_gib"} <= final.keys()
    again = "--eval-only --teacher out-sea-student/ckpt.pt --eval-windows 5 --batch-size 4"
    results = {more: run(again + more, monkeypatch, capsys)[1].split("final:")[1].split()
               for more in ("", " --keys-per-query 1", " --split test")}
    assert float(results[""][3]) == pytest.approx(float(final["val_ppl"]), rel=1e-3)
    assert results[" --split test"][0] == "test_loss"
    assert results[" --keys-per-query 1"] != results[""]


@pytest.mark.parametrize("line, hint", [
    ("", "python train.py --attention dense"), ("--teacher nothing.pt", "no checkpoint"),
    ("--teacher no-folder", "facebook/opt-125m"), ("--teacher t.pt --data nowhere", "ready: gpt, tiny"),
    ("--teacher t.pt --map-width 30", "multiple of 4"), ("--teacher t.pt --data gpt", "--tokenizer bytes"),
    ("--teacher t.pt --split dev", "--split"), ("--teacher t.pt --steps 0", "--steps")])
def test_mistakes_are_one_line_and_status_2(line, hint, folder, teacher, monkeypatch, capsys):
    engine.save_checkpoint(Path("t.pt"), teacher, tokenizer="bytes", data="tiny")
    (folder / "data" / "gpt").mkdir()
    for name in ("train.bin", "val.bin", "meta.json"):
        content = (folder / "data" / "tiny" / name).read_bytes()
        (folder / "data" / "gpt" / name).write_bytes(content.replace(b"bytes", b"gpt2"))
    status, _, err = run(line, monkeypatch, capsys)
    assert status == 2 and hint in err and len(err.strip().splitlines()) == 1
    assert not Path("out-sea-student").exists()
