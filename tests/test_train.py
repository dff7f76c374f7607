"""Training: models learn, steps are what they should be, and what goes wrong is said in one line."""
import argparse
import math
import sys
import typing
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

import data.common
from data import engine
import sample
import train
from model import Config, Transformer

SMALL = dict(architecture="llama", context=64, n_layer=2, n_head=2, n_embd=64, block_size=4,
             keys_per_query=8, map_width=32, num_features=16)


def small_model(**more):
    torch.manual_seed(0)
    return Transformer(Config(**{**SMALL, **more}))


@pytest.fixture(scope="module")
def text():
    """Python to learn from: the sources of two modules, as bytes."""
    sources = b"".join(Path(module.__file__).read_bytes() for module in (typing, argparse))
    return np.frombuffer(sources, np.uint8).astype(np.uint16)


def learn(model, tokens, steps, lr=5e-3, batch_size=16):
    """Train -> the text's loss and, of the paper's kind, the estimate's, of each step."""
    optimizer = train.make_optimizer(model)
    losses = []
    for step in range(1, steps + 1):
        out = model(*data.common.random_batch(tokens, model.config.context, batch_size, step, "cpu"))
        kl = out.loss.new_zeros(()) if out.kl is None else out.kl
        (out.loss + train.LOSSES["kl"] * kl).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, lr, steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append([out.loss.item(), kl.item()])
    return np.array(losses)


# ---- the optimizer

@pytest.mark.parametrize("attention", ["sea", "paper"])
def test_matrices_of_blocks_decay_and_nothing_else(attention):
    model = small_model(attention=attention, tied=False)
    names = {id(p): name for name, p in model.named_parameters()}
    decays = {names.pop(id(p)): group["weight_decay"] for group in train.make_optimizer(model).param_groups
              for p in group["params"]}
    assert not names and sum(decay > 0 for decay in decays.values()) >= 2 * 7
    for name, p in model.named_parameters():
        assert (decays[name] > 0) == (name.startswith("layers.") and p.dim() == 2), name


def test_learning_rate():
    rates = [train.learning_rate(step, 2., 100) for step in range(1, 101)]
    assert rates[4] == 1. and max(rates) == rates[9] == 2. and rates[-1] == pytest.approx(0.2)
    assert np.diff(rates[:10]).min() > 0 > np.diff(rates[9:]).max()
    assert train.learning_rate(1, 2., 1) == 2.


# ---- learning

def test_one_batch_can_be_learnt_by_heart(text):
    model = small_model()
    assert learn(model, text[:66], 60, lr=1e-2, batch_size=2)[-1, 0] < 0.1


def test_sea_learns_as_dense_does_and_a_little_budget_is_enough(text):
    cut = len(text) * 9 // 10
    loss = {}
    for attention in ("dense", "sea"):
        model = small_model(attention=attention)
        learn(model, text[:cut], 50, batch_size=8)
        loss[attention] = train.evaluate(model, text[cut:], 16, 64, nullcontext())
    print(loss)
    assert 1.5 < loss["dense"] < 2.9 and abs(loss["sea"] - loss["dense"]) < 0.1   # seeds: 0.06


def test_the_papers_estimate_learns(text):
    learned, frozen = [small_model(attention="paper", n_layer=1) for _ in range(2)]
    for name, p in frozen.named_parameters():
        p.requires_grad_(".estimator." not in name or "gates" in name)
    kl, kl_frozen = [learn(model, text, 40, batch_size=8)[-10:, 1].mean() for model in (learned, frozen)]
    print(kl, kl_frozen)
    assert 0 < kl < 0.7 * kl_frozen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("attention", ["sea", "paper", "dense"])
def test_a_recorded_step_gives_the_same_losses_and_gradients(attention, text):
    plain, other = [small_model(attention=attention, n_layer=3).cuda() for _ in range(2)]

    def step_of(model):
        def forward_backward(idx, targets):
            with torch.autocast("cuda", torch.bfloat16):
                out = model(idx, targets)
            (out.loss if out.kl is None else out.loss + out.kl).backward()
            return out.loss.detach()
        return forward_backward

    runs = [(plain, step_of(plain)), (other, engine.Recorded(step_of(other), other))]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model, _ in runs]
    for step in range(3):                                    # the graph must see new weights
        losses = [[], []]
        for seed in (2 * step, 2 * step + 1):                # of two batches gradients add up
            batch = data.common.random_batch(text, 64, 2, seed, "cuda")
            for kept, (_, run) in zip(losses, runs):
                kept.append(run(*batch).item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-2)
        for p, q in zip(plain.parameters(), other.parameters(), strict=True):
            assert (p.grad - q.grad).norm() <= 5e-2 * p.grad.norm()
        for (model, _), optimizer in zip(runs, optimizers):
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            train.evaluate(model, text, 2, 4, nullcontext())


# ---- the scripts

@pytest.fixture
def data_folder(tmp_path, monkeypatch, text):
    """A folder for data sets, with one in it, called tiny."""
    monkeypatch.setattr(data.common, "FOLDER", tmp_path / "data")
    (tmp_path / "data" / "tiny").mkdir(parents=True)
    source = text[:9000].astype(np.uint8).tobytes().decode()
    data.common.write("tiny", {"train": source, "val": source[:1100]}, "bytes", "a test")
    monkeypatch.setattr(train, "EVAL_WINDOWS", 3)
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


TINY = ("--data tiny --device cpu --n-layer 1 --n-head 2 --n-embd 32 --context 32 --block-size 4 "
        "--keys-per-query 4 --batch-size 2 --steps 4")


def run(module, line, monkeypatch, capsys):
    """Call a script's main with a command line: what it printed, and its exit status."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *line.split()])
    try:
        module.main()
        status = 0
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def final(out):
    """The last line as {name: number}."""
    last = out.strip().splitlines()[-1].split()
    assert last[0] == "final:"
    return {name: float(value) for name, value in zip(last[1::2], last[2::2])}


def test_train_then_sample(data_folder, monkeypatch, capsys):
    status, out, _ = run(train, TINY, monkeypatch, capsys)
    said = final(out)
    assert status == 0 and "torch backend" in out and "attention_kl" not in said
    assert said["val_ppl"] == pytest.approx(math.exp(said["val_loss"]), rel=1e-3)
    model, saved = engine.load_checkpoint("out/sea-tiny/ckpt.pt", "cpu")
    assert saved["tokenizer"] == "bytes" and saved["data"] == "tiny"
    assert sorted(path.name for path in Path("out/sea-tiny").iterdir()) == ["ckpt.pt", "lock"]
    val = data.common.load("tiny")[1]
    assert train.evaluate(model, val, 2, 3, nullcontext()) == pytest.approx(said["val_loss"], abs=1e-3)
    steps = [line.split()[1] for line in out.splitlines() if line.startswith("step")]
    assert steps == ["1/4", "2/4", "3/4", "4/4"]
    line = "--checkpoint out/sea-tiny/ckpt.pt --prompt def --max-new-tokens 40 --device cpu --top-k 20"
    texts = [run(sample, line, monkeypatch, capsys)[1] for _ in range(2)]
    assert texts[0] == texts[1] and texts[0].startswith("def") and len(texts[0]) > 20


def test_the_papers_kind_tells_its_kl(data_folder, monkeypatch, capsys):
    status, out, _ = run(train, TINY + " --attention paper", monkeypatch, capsys)
    assert status == 0 and final(out)["attention_kl"] > 0 and Path("out/paper-tiny/ckpt.pt").exists()


def test_equal_seeds_train_equally(data_folder, monkeypatch, capsys):
    ends = [final(run(train, f"{TINY} --overwrite {more}", monkeypatch, capsys)[1])["val_loss"]
            for more in ("", "", "--seed 2")]
    assert ends[0] == ends[1] != ends[2]


def test_accumulated_batches_are_one_batch(data_folder, monkeypatch, capsys):
    """The script's own step, of a batch of four windows and of two halves of it."""
    def batches(tokens, context, args, step):
        whole = data.common.random_batch(tokens, context, 4, step, "cpu")
        halves = zip(*[x.chunk(args.accumulate) for x in whole])
        return list(halves)

    monkeypatch.setattr(engine, "step_batches", batches)
    for parts in (1, 2):
        run(train, f"{TINY} --accumulate {parts} --out out-{parts}", monkeypatch, capsys)
    one, two = [engine.load_checkpoint(f"out-{parts}/ckpt.pt", "cpu")[0] for parts in (1, 2)]
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3)


def test_help_explains_every_flag(monkeypatch, capsys):
    for module in (train, sample):
        status, out, _ = run(module, "--help", monkeypatch, capsys)
        flags = [line for line in out.splitlines() if line.startswith("  --")]
        assert status == 0 and 5 < len(flags) <= 20


def test_context_of_one_token_trains(data_folder, monkeypatch, capsys):
    assert run(train, TINY + " --context 1", monkeypatch, capsys)[0] == 0


def test_a_checkpoint_is_not_overwritten_without_a_word(data_folder, monkeypatch, capsys):
    run(train, TINY, monkeypatch, capsys)
    before = Path("out/sea-tiny/ckpt.pt").read_bytes()
    status, _, err = run(train, TINY + " --seed 2", monkeypatch, capsys)
    assert status == 2 and "--overwrite" in err and Path("out/sea-tiny/ckpt.pt").read_bytes() == before
    assert run(train, TINY + " --seed 2 --overwrite", monkeypatch, capsys)[0] == 0
    assert Path("out/sea-tiny/ckpt.pt").read_bytes() != before


def test_kernels_can_be_switched_off(data_folder, monkeypatch, capsys):
    import sea
    monkeypatch.setattr(sea, "backend", "triton")
    assert run(train, TINY + " --no-kernels", monkeypatch, capsys)[0] == 0 and sea.backend == "torch"


def spoil(folder, what):
    """Damage the data set."""
    train_bin, val_bin = folder / "tiny" / "train.bin", folder / "tiny" / "val.bin"
    if what == "cut":
        train_bin.write_bytes(train_bin.read_bytes()[:-3])
    elif what == "gone":
        val_bin.unlink()
    elif what == "large token":
        val_bin.write_bytes(val_bin.read_bytes()[:-2] + b"\xff\xff")
    elif what == "meta":
        (folder / "tiny" / "meta.json").write_text("{")


@pytest.mark.parametrize("spoilt, more, hint", [
    ("cut", "", "prepare it again"), ("gone", "", "prepare it again"), ("meta", "", "prepare it again"),
    ("large token", "", "65535"), (None, "--data nowhere", "ready: tiny"), (None, "--lr fast", "--lr"),
    (None, "--block-size 0", "--block-size"), (None, "--attention full", "sea"),
    (None, "--n-head 3", "multiple of n_head"), (None, "--n-embd 30", "even"),
    (None, "--context 10000", "--context under"), (None, "--steps 0", "--steps"),
    (None, "--wrong 1", "--help")])
def test_mistakes_are_one_line_and_status_2(spoilt, more, hint, data_folder, monkeypatch, capsys):
    spoil(data_folder, spoilt)
    status, out, err = run(train, f"{TINY} {more}", monkeypatch, capsys)
    assert status == 2 and hint in err and len(err.strip().splitlines()) == 1
    assert not list(Path().rglob("ckpt.pt"))


@pytest.mark.parametrize("damage", ["missing", "zeros", "cut", "code", "other", "dataset", "first design"])
def test_what_is_no_checkpoint(damage, data_folder, monkeypatch, capsys):
    path = Path("ckpt.pt")
    engine.save_checkpoint(path, small_model(context=32), tokenizer="bytes", data="tiny")
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "code":
        torch.save(dict(config=sys.exit), path)
    elif damage == "other":
        torch.save(dict(weights=torch.zeros(3)), path)
    elif damage == "first design":
        torch.save(dict(config=dict(n_layer=1, query_block=8), model={}), path)
    else:
        path.write_bytes({"zeros": bytes(1000), "cut": content[:len(content) // 2], "dataset": b"1"}[damage])
    status, _, err = run(sample, "--checkpoint ckpt.pt --device cpu", monkeypatch, capsys)
    assert status == 2 and len(err.strip().splitlines()) == 1 and "ckpt.pt" in err
    assert ("first design" in err) == (damage == "first design")


def test_a_prompt_must_fit_and_may_be_any_text(data_folder, monkeypatch, capsys):
    engine.save_checkpoint(Path("ckpt.pt"), small_model(context=32), tokenizer="bytes", data="tiny")
    line = "--checkpoint ckpt.pt --device cpu --max-new-tokens 2 --prompt "
    status, _, err = run(sample, line + "x" * 33, monkeypatch, capsys)
    assert status == 2 and "33 tokens" in err and len(err.strip().splitlines()) == 1
    for prompt in ("x" * 32, "é😀", "\ud800"):
        assert run(sample, line + prompt, monkeypatch, capsys)[0] == 0


def test_text_ends_at_the_end_of_text(data_folder, monkeypatch, capsys):
    model = small_model(context=32)
    engine.save_checkpoint(Path("ckpt.pt"), model, tokenizer="bytes", data="tiny")
    line = "--checkpoint ckpt.pt --device cpu --temperature 9 --max-new-tokens 20 --prompt ab"
    _, whole, said = run(sample, line, monkeypatch, capsys)
    enc = data.common.encoding("bytes")
    enc.eot = whole.encode()[7]
    monkeypatch.setattr(engine, "load_encoding", lambda *_: enc)
    _, part, _ = run(sample, line, monkeypatch, capsys)
    assert part == whole[:whole.index(chr(enc.eot), 2)] + "\n" and len(part) < len(whole)
    assert said.count("tokens/s") == 1
