"""The model and its training: it learns, it is causal, and what goes wrong is said in one line."""
import math
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

import data.common
import sample
import train
from data import engine
from model import ATTENTIONS, OPT, OPTConfig

SMALL = dict(vocab_size=256, context=128, n_layer=2, n_head=2, n_embd=64, map_width=32, keys_per_query=8,
             query_block=4)
KINDS = {**{kind: dict(attention=kind) for kind in ATTENTIONS}, "the paper's sea": dict(cell_keys=False)}


def small_model(seed=0, **more):
    torch.manual_seed(seed)
    return OPT(OPTConfig(**{**SMALL, **more}))


@pytest.fixture(scope="module")
def text():
    """Python to learn from: the sources of two modules, as bytes."""
    import argparse
    import typing
    sources = b"".join(Path(module.__file__).read_bytes() for module in (typing, argparse))
    return np.frombuffer(sources, np.uint8).astype(np.uint16)


def learn(model, tokens, steps, kl_weight=0.1, batch_size=16, lr=3e-3):
    """Train and return the losses (steps, 2)."""
    optimizer = train.make_optimizer(model, lr, 0.1)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, lr, 10, steps)
        batch = data.common.random_batch(tokens, model.config.context, batch_size, step, "cpu")
        losses.append(step_of(model, optimizer, [batch], kl_weight))
    return torch.stack(losses)


def step_of(model, optimizer, batches, kl_weight=0.1, clip=1.0):
    """The text's loss and the attention KL of a step."""
    losses_of = train.training_losses(model, model, kl_weight)
    backward = engine.Backward(losses_of, nullcontext(), 1 / len(batches))
    return engine.optimizer_step(model, optimizer, batches, backward, clip)[1:]


# ---- the model

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M", [1, 16])
def test_no_logit_depends_on_a_later_token(kind, M, T=70):
    model, idx = small_model(**KINDS[kind], query_block=M).eval(), torch.randint(256, (1, T))
    logits = model(idx)[0]
    for t in (1, 16, 37, T - 1):
        other = torch.cat([idx[:, :t], (idx[:, t:] + 1) % 256], 1)
        changed = model(other)[0]
        assert torch.equal(logits[:, :t], changed[:, :t])
        assert not torch.equal(logits[:, t:], changed[:, t:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 63])
def test_loss_and_generation_for_any_length(kind, T):
    model, idx = small_model(**KINDS[kind]), torch.randint(256, (2, T))
    logits, loss = model(idx, torch.randint(256, (2, T)))
    assert logits.shape == (2, T, 256) and abs(loss.item() - math.log(256)) < 0.5
    (loss + model.attention_kl()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    out = model.eval().generate(idx, 3, temperature=0.5, top_k=5)
    assert out.shape == (2, T + 3) and torch.equal(out[:, :T], idx)


def test_window_has_as_many_keys_as_sea(T=128):
    model = small_model(attention="window", query_block=8, keys_per_query=20)
    q = k = torch.zeros(1, 1, T, 32)  # equal scores: the output is the share of each value
    share = model.layers[0].self_attn.attention(q, k, torch.eye(T)[None, None])[0, 0]
    assert (share[-1] > 0).sum() == 20 + 4
    assert (share[-1, :4] > 0).all() and (share[-1, -20:] > 0).all()


def test_one_batch_can_be_learnt_by_heart(text):
    model = small_model(context=64)
    batch = data.common.random_batch(text, 64, 4, 0, "cpu")
    optimizer = train.make_optimizer(model, 3e-3, 0.)
    for _ in range(100):                 # later, below 0.003, the loss jumps now and then
        loss, _ = step_of(model, optimizer, [batch]).tolist()
    assert loss < 0.1


# ---- the estimate learns

def test_sea_from_scratch_learns_its_attention_and_needs_the_estimate(text):
    cut = len(text) * 9 // 10
    learned, frozen = (small_model(cell_keys=False) for _ in range(2))        # cell keys need no learning
    for name, p in frozen.named_parameters():
        p.requires_grad_(".attention." not in name or "gates" in name)
    losses = learn(learned, text[:cut], 150, lr=1e-3)
    losses_frozen = learn(frozen, text[:cut], 150, lr=1e-3)
    loss, loss_frozen = (train.evaluate(m, text[cut:], 16, 100, nullcontext()) for m in (learned, frozen))
    print(f"val_loss {loss:.4f}, with the estimator frozen {loss_frozen:.4f}", losses[::20, 1])
    assert losses[-10:, 1].mean() < 0.6 * losses_frozen[-10:, 1].mean()
    assert loss < loss_frozen


def recall(q, k, allowed, M):
    """Share of the dense attention's mass on the allowed keys, of queries with a past to choose from."""
    T = q.shape[2]
    dense = (q @ k.mT).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
    return (dense * allowed).sum(-1)[:, :, T // 4:].mean().item()


def test_the_estimator_finds_more_of_a_dense_models_attention_than_a_window(text):
    torch.manual_seed(0)
    dense = small_model(attention="dense")
    learn(dense, text, 200)
    found = {}
    for cell_keys in (True, False):
        student = small_model(cell_keys=cell_keys)
        student.load_state_dict(dense.state_dict(), strict=False)
        for name, p in student.named_parameters():
            p.requires_grad_(".attention." in name)
        learn(student, text, 150, kl_weight=1.0)
        seen = []
        for block in student.layers:
            attention = block.self_attn.attention
            attention.register_forward_pre_hook(lambda layer, args: seen.append((layer, args)))
        student.eval()(data.common.random_batch(text, 128, 8, 10 ** 6, "cpu")[0])
        kept = [recall(q, k, layer.look(q, k, v)[1], 4) for layer, (q, k, v, _) in seen]
        found[cell_keys] = sum(kept) / len(kept)
    t, j = torch.arange(128)[:, None], torch.arange(128)
    window = (j <= t) & ((j > t - 7) | (j < 4))  # 8 selected keys and 2.5 of the own block: 11 in all
    found["window"] = sum(recall(q, k, window, 4) for _, (q, k, v, _) in seen) / len(seen)
    print({name: round(share, 3) for name, share in found.items()})
    assert found[True] > found[False] > found["window"]


# ---- the scripts

@pytest.fixture
def data_folder(tmp_path, monkeypatch, text):
    """A folder for data sets, with one in it, called tiny."""
    monkeypatch.setattr(data.common, "FOLDER", tmp_path / "data")
    (tmp_path / "data" / "tiny").mkdir(parents=True)
    source = text[:9000].astype(np.uint8).tobytes().decode()
    data.common.write("tiny", {"train": source, "val": source[:1100]}, "bytes", "a test")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


TINY = ("--data tiny --device cpu --n-layer 1 --n-head 2 --n-embd 32 --context 32 --map-width 8 "
        "--keys-per-query 4 --query-block 4 --batch-size 2 --steps 4 --eval-interval 2 --eval-windows 3 "
        "--log-interval 1")


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


def test_train_then_sample(data_folder, monkeypatch, capsys):
    status, out, _ = run(train, TINY, monkeypatch, capsys)
    last = out.strip().splitlines()[-1].split()
    final = dict(zip(last[1::2], last[2::2]))
    assert status == 0 and last[0] == "final:"
    assert float(final["val_ppl"]) == pytest.approx(math.exp(float(final["val_loss"])), rel=1e-3)
    model, saved = engine.load_checkpoint("out/ckpt.pt", "cpu")
    assert saved["tokenizer"] == "bytes" and saved["data"] == "tiny" and not Path("out/ckpt.pt.part").exists()
    val = data.common.load("tiny")[1]
    loss = train.evaluate(model, val, 2, 3, nullcontext())
    assert loss == pytest.approx(float(final["val_loss"]), abs=1e-3)
    rows = Path("out/log.csv").read_text().splitlines()
    assert len(rows) == 5 and rows[0].startswith("step,loss,attention_kl,val_loss")
    texts = [run(sample, "--prompt def --max-new-tokens 40 --device cpu --top-k 20", monkeypatch, capsys)[1]
             for _ in range(2)]
    assert texts[0] == texts[1] and texts[0].startswith("def") and len(texts[0]) > 20


def test_equal_seeds_train_equally(data_folder, monkeypatch, capsys):
    ends = [run(train, TINY + more, monkeypatch, capsys)[1].split("final:")[1].split()[:6]
            for more in ("", "", " --seed 2")]
    assert ends[0] == ends[1] != ends[2]


def test_accumulated_batches_are_one_batch():
    idx = torch.randint(256, (4, 33))
    gradients = []
    for parts in (1, 2):
        model = small_model(n_layer=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = [p.clone() for p in model.parameters()]
        batches = [(part[:, :-1], part[:, 1:]) for part in idx.chunk(parts)]
        step_of(model, optimizer, batches, clip=1e9)
        gradients.append(torch.cat([(p - q).flatten() for p, q in zip(before, model.parameters())]))
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_step_is_a_step(kind, text):
    found = []
    for record in (False, True):
        model = small_model(**KINDS[kind]).cuda()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        before = [p.detach().clone() for p in model.parameters()]    # nothing of autograd on this stream
        backward = engine.Backward(train.training_losses(model, model, 0.1), nullcontext(), 1 / 2, record)
        for step in range(2 * engine.Backward.WARM_UP + 2):
            batches = [data.common.random_batch(text, 128, 4, 2 * step + i, "cuda") for i in range(2)]
            losses = engine.optimizer_step(model, optimizer, batches, backward, 1.0)
        found.append((losses, torch.cat([(p - q).flatten() for p, q in zip(before, model.parameters())])))
    for plain, recorded in zip(*found):
        assert (recorded - plain).norm() < 0.03 * plain.norm()


def test_help_explains_every_flag(monkeypatch, capsys):
    for module in (train, sample):
        status, out, _ = run(module, "--help", monkeypatch, capsys)
        flags = [line.split(None, 2) for line in out.splitlines() if line.startswith("  --")]
        assert status == 0 and len(flags) > 5


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
    (None, "--map-width 30", "multiple of 4"), (None, "--query-block 64", "1 to 32"),
    (None, "--attention full", "sea"), (None, "--n-head 3", "multiple of n_head"),
    (None, "--n-embd 24", "multiple of 8"), (None, "--context 10000", "--context under"),
    (None, "--steps 0", "--steps"), (None, "--wrong 1", "--help")])
def test_mistakes_are_one_line_and_status_2(spoilt, more, hint, data_folder, monkeypatch, capsys):
    spoil(data_folder, spoilt)
    status, out, err = run(train, f"{TINY} {more}", monkeypatch, capsys)
    assert status == 2 and hint in err and len(err.strip().splitlines()) == 1
    assert not Path("out/ckpt.pt").exists()


def test_context_of_one_token_trains(data_folder, monkeypatch, capsys):
    assert run(train, TINY + " --context 1", monkeypatch, capsys)[0] == 0


@pytest.mark.parametrize("damage", ["missing", "zeros", "cut", "code", "other", "dataset"])
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
    else:
        path.write_bytes({"zeros": bytes(1000), "cut": content[:len(content) // 2], "dataset": b"1"}[damage])
    status, _, err = run(sample, "--checkpoint ckpt.pt --device cpu", monkeypatch, capsys)
    assert status == 2 and len(err.strip().splitlines()) == 1 and "ckpt.pt" in err


def test_a_prompt_must_fit_and_may_be_any_text(data_folder, monkeypatch, capsys):
    engine.save_checkpoint(Path("ckpt.pt"), small_model(context=32), tokenizer="bytes", data="tiny")
    line = "--checkpoint ckpt.pt --device cpu --max-new-tokens 2 --prompt "
    status, _, err = run(sample, line + "x" * 33, monkeypatch, capsys)
    assert status == 2 and "33 tokens" in err and len(err.strip().splitlines()) == 1
    for prompt in ("x" * 32, "é😀", "\ud800"):
        assert run(sample, line + prompt, monkeypatch, capsys)[0] == 0


@pytest.mark.parametrize("content, hint", [(b"", "empty"), (b"\xff caf\xe9", "UTF-8"), (None, "cannot read")])
def test_texts_that_are_none(content, hint, tmp_path):
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    script = Path(train.__file__).parent / "data" / "text.py"
    command = [sys.executable, script, path, "--name", "never-written"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and hint in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (script.parent / "never-written").exists()


def test_the_byte_tokenizer_keeps_every_text():
    enc = data.common.encoding("bytes")
    for text in ("", "a\r\n\t\0é😀\u2028", "x" * 1000):
        assert enc.encode_ordinary(text) == list(text.encode())
        assert enc.decode(enc.encode_ordinary(text)) == text


def test_a_download_that_breaks_off_leaves_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        data.common.download((tmp_path / "nothing.txt").as_uri(), tmp_path / "text.txt")
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    (tmp_path / "source.txt").write_text("text")
    data.common.download((tmp_path / "source.txt").as_uri(), tmp_path / "text.txt")
    assert (tmp_path / "text.txt").read_text() == "text" and len(list(tmp_path.iterdir())) == 2
