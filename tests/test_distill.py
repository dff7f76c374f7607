"""Distillation: a student starts where its teacher is, learns and stays linear in memory."""
import argparse
import json
import math
import shutil
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
from data import engine
import train
from model import ATTENTIONS, Config, Transformer

GOLDEN = Path(__file__).parent / "golden"
SMALL = dict(architecture="llama", context=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, attention="dense",
             block_size=4, keys_per_query=4, coarse=4, map_width=16, num_features=16)
SETTINGS = dict(lr=1e-3, steps=40, batch_size=8, seed=1, accumulate=1, device="cpu")


@pytest.fixture(scope="module")
def tokens():
    return np.frombuffer(Path(argparse.__file__).read_bytes(), np.uint8).astype(np.uint16)


@pytest.fixture(scope="module")
def teacher(tokens):
    """A dense model after 160 steps, whose attention already matters."""
    torch.manual_seed(0)
    model = Transformer(Config(**SMALL))
    optimizer = train.make_optimizer(model)
    for step in range(1, 161):
        model(*data.common.random_batch(tokens, 64, 8, step, "cpu")).loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, 5e-3, 160)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def loss_of(model, tokens):
    return train.evaluate(model, tokens, 16, 50, nullcontext())


def student_of(teacher, attention="sea", **settings):
    torch.manual_seed(1)
    return teacher.with_attention(attention, **settings)


def losses_of(student, teacher, batch):
    return dict(zip(distill.LOSSES, distill.distillation_losses(student, *batch, teacher)))


def test_a_student_whose_budget_covers_the_past_is_its_teacher(teacher, tokens):
    idx, _ = data.common.random_batch(tokens, 64, 8, 0, "cpu")
    wanted = teacher(idx).logits
    far = {name: (student(idx).logits - wanted).abs().max().item() for name, student in dict(
        dense=student_of(teacher, "dense"), all=student_of(teacher, keys_per_query=64),
        few=student_of(teacher)).items()}
    print(far)
    assert far["dense"] == 0 and far["all"] < 1e-3 and far["few"] > 1e-2 and loss_of(teacher, tokens) < 3


@pytest.mark.parametrize("attention", ["sea", "paper"])
def test_distillation_lowers_the_losses(attention, teacher, tokens, capsys, monkeypatch):
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    student = student_of(teacher, attention)
    batch = data.common.random_batch(tokens, 64, 32, 0, "cpu")
    before, loss = losses_of(student, teacher, batch), loss_of(student, tokens)
    args = SimpleNamespace(**SETTINGS)
    distill.distill(student, teacher, tokens, args, nullcontext(), distill.make_optimizer(student),
                    range(1, args.steps + 1))
    after = losses_of(student, teacher, batch)
    assert all(after[name] < 0.95 * before[name] for name in ("logits", "hidden", "output"))
    assert attention == "sea" or after["estimate"] < 0.8 * before["estimate"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(lines) == 40 and all(("estimate" in line) == (attention == "paper") for line in lines)
    assert loss_of(student, tokens) < loss
    assert not any(p.grad is not None for p in teacher.parameters())


def test_losses_are_zero_against_oneself(teacher, tokens):
    batch = data.common.random_batch(tokens, 64, 4, 0, "cpu")
    losses = losses_of(student_of(teacher, "dense"), teacher, batch)
    assert all(losses[name].item() < 1e-9 for name in ("hidden", "output", "logits", "estimate"))
    assert losses["text"] > 0


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_two_rates_and_every_parameter_once(teacher, attention):
    student = student_of(teacher, attention)
    groups = distill.make_optimizer(student).param_groups
    times = {id(p): group["times"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] > 0 for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(times) == len(list(student.parameters()))
    for name, p in student.named_parameters():
        assert times[id(p)] == (10 if ".estimator." in name else 1)
        assert decays[id(p)] == (p.dim() >= 2)


def test_keys_and_mass(teacher, tokens):
    assert distill.keys_and_mass(teacher, tokens) == (None, None)
    keys, mass = distill.keys_and_mass(student_of(teacher, keys_per_query=64), tokens)
    assert keys == pytest.approx((64 + 1) / 2) and mass == pytest.approx(1, abs=1e-5)
    few, less = distill.keys_and_mass(student_of(teacher, keys_per_query=4), tokens)
    assert 8 < few < 3 * 4 + 2.5 and 0 < less < mass        # three blocks of four, half of its own
    window, _ = distill.keys_and_mass(student_of(teacher, "window", keys_per_query=4), tokens)
    assert window == pytest.approx(few, abs=1)


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation makes, forward or backward."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("attention", ["sea", "paper"])
def test_a_step_at_2048_tokens_makes_nothing_of_t_times_t(attention, T=2048):
    torch.manual_seed(0)
    one = dict(context=T, n_layer=1, n_head=1, n_kv_head=1, n_embd=16, block_size=8, keys_per_query=16)
    teacher = Transformer(Config(**{**SMALL, **one}))
    student, idx = student_of(teacher, attention), torch.randint(256, (1, T))
    with LargestTensor() as largest:
        losses_of(student.train(), teacher, (idx, idx))["hidden"].backward()
    assert 0 < largest.elements <= T * T // 8 + T * 256


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


def final(out):
    """The last line as {name: number}."""
    last = out.strip().splitlines()[-1].split()
    assert last[0] == "final:"
    return {name: float(value) for name, value in zip(last[1::2], last[2::2])}


def test_distil_then_evaluate(folder, teacher, monkeypatch, capsys):
    engine.save_checkpoint(Path("t.pt"), teacher, tokenizer="bytes", data="tiny")
    line = "--teacher t.pt --steps 4 --batch-size 4 --eval-windows 5 --out out"
    status, out, _ = run(line, monkeypatch, capsys)
    said = final(out)
    assert status == 0 and "torch backend" in out
    assert {"val_ppl", "teacher_ppl", "ppl_before", "keys_attended", "mass_kept", "peak_gib"} <= said.keys()
    again = "--eval-only {} --teacher out/ckpt.pt --eval-windows 5 --batch-size 4"
    results = {more: final(run(again.format(more), monkeypatch, capsys)[1])
               for more in ("", "--keys-per-query 16", "test", "--attention dense")}
    assert results[""]["val_ppl"] == pytest.approx(said["val_ppl"], rel=1e-3)
    assert "test_loss" in results["test"]
    assert len({ends.get("val_ppl") for ends in results.values()}) == 4


def test_untrained_students_are_a_result_of_their_own(folder, teacher, monkeypatch, capsys):
    engine.save_checkpoint(Path("t.pt"), teacher, tokenizer="bytes", data="tiny")
    ppl = {}
    for attention in ("dense", "sea", "window", "paper"):
        line = f"--teacher t.pt --eval-only --attention {attention} --eval-windows 5"
        ppl[attention] = final(run(line, monkeypatch, capsys)[1])["val_ppl"]
    assert ppl["dense"] == pytest.approx(math.exp(train.evaluate(
        teacher, data.common.load("tiny")[1], 16, 5, nullcontext())), rel=1e-3)
    assert len(set(ppl.values())) == 4 and not Path("out").exists()


@pytest.mark.parametrize("name, tokenizer", [("125m", "opt"), ("llama-tied", "smollm2")])
def test_published_weights_in_a_folder(name, tokenizer, folder, monkeypatch, capsys):
    """The student keeps the files of its tokenizer, and is found without its teacher."""
    model = shutil.copytree(GOLDEN / name, folder / "published")
    for file in ("vocab.json", "merges.txt"):
        shutil.copyfile(GOLDEN / "125m" / file, model / file)
    (folder / "data" / "words").mkdir()
    ids = torch.randint(96, (2000,), generator=torch.Generator().manual_seed(0)).numpy().astype(np.uint16)
    for split in ("train", "val"):
        (folder / "data" / "words" / f"{split}.bin").write_bytes(ids.tobytes())
    meta = dict(tokenizer=tokenizer, vocab_size=96, source="", tokens=dict(train=2000, val=2000))
    (folder / "data" / "words" / "meta.json").write_text(json.dumps(meta))
    line = "--teacher published --data words --steps 2 --context 16 --eval-windows 2 --keys-per-query 2"
    status, out, err = run(line, monkeypatch, capsys)
    assert status == 0 and "teacher_ppl" in final(out), err
    shutil.rmtree(model)
    student, _ = engine.load_checkpoint("out/published-sea/ckpt.pt", "cpu")
    assert student.config.context == 16 and student.config.keys_per_query == 2
    assert Path("out/published-sea/merges.txt").read_bytes() == (GOLDEN / "125m" / "merges.txt").read_bytes()
    if tokenizer == "opt":
        assert engine.load_encoding("opt", "out/published-sea/ckpt.pt").encode_ordinary("import") != []


@pytest.mark.parametrize("line, hint", [
    ("", "python train.py --attention dense"), ("--teacher nothing.pt", "no checkpoint"),
    ("--teacher no-folder", "facebook/opt-125m"), ("--teacher t.pt --data nowhere", "ready: gpt, tiny"),
    ("--teacher t.pt --block-size 0", "--block-size"), ("--teacher t.pt --data gpt", "--tokenizer bytes"),
    ("--teacher t.pt --eval-only dev", "--eval-only"), ("--teacher t.pt --steps 0", "--steps"),
    ("--teacher t.pt --context 900", "a --context under 800"),
    ("--teacher t.pt --attention dense --keys-per-query 8", "leave out"),
    ("--teacher t.pt --attention performer --block-size 8", "leave out")])
def test_mistakes_are_one_line_and_status_2(line, hint, folder, teacher, monkeypatch, capsys):
    engine.save_checkpoint(Path("t.pt"), teacher, tokenizer="bytes", data="tiny")
    (folder / "data" / "gpt").mkdir()
    for name in ("train.bin", "val.bin", "meta.json"):
        content = (folder / "data" / "tiny" / name).read_bytes()
        (folder / "data" / "gpt" / name).write_bytes(content.replace(b"bytes", b"gpt2"))
    status, _, err = run(line, monkeypatch, capsys)
    assert status == 2 and hint in err and len(err.strip().splitlines()) == 1
    assert not Path("out").exists()


def test_help_explains_every_flag(monkeypatch, capsys):
    status, out, _ = run("--help", monkeypatch, capsys)
    assert status == 0 and 10 < len([line for line in out.splitlines() if line.startswith("  --")]) <= 20
