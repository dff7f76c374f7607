"""A run goes on: after a kill, after Ctrl-C, after a full disk, and on two processes as on one."""
import argparse
import importlib
import io
import multiprocessing
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import data.common
import distill
from conftest import HOW
from data import engine
import train
from model import Config, Transformer

MODEL = "--n-layer 1 --n-head 2 --n-embd 32 --context 32 --keys-per-query 4 --block-size 4"
TRAIN = f"train --data tiny --device cpu {MODEL} --batch-size 2 --steps 6 --out out"
DISTILL = ("distill --teacher t.pt --data tiny --device cpu --batch-size 2 --steps 6 --eval-windows 3 "
           "--out out")
OFTEN = (train, "EVAL_WINDOWS", 3), (train, "LOG_STEPS", 1), (engine, "SAVE_MINUTES", 0)
SCRIPTS = dict(train=train, distill=distill)


@pytest.fixture(autouse=True)
def one_thread():
    """Several threads add up in another order, so a run that goes on to the bit needs as many as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a data set and a teacher, in which the scripts run."""
    monkeypatch.setattr(data.common, "FOLDER", tmp_path / "data")
    (tmp_path / "data").mkdir()
    text = Path(argparse.__file__).read_text()[:9000]
    data.common.write("tiny", {"train": text, "val": text[:1100]}, "bytes", "a test")
    torch.manual_seed(0)
    teacher = Transformer(Config(256, 32, 1, 2, n_embd=32, attention="dense", keys_per_query=4, block_size=4))
    engine.save_checkpoint(tmp_path / "t.pt", teacher, tokenizer="bytes", data="tiny")
    for module, name, value in OFTEN:
        monkeypatch.setattr(module, name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def same_signals():
    """What was to happen at a signal is so again afterwards."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def run(line, monkeypatch, capsys):
    """Call a script's main: its exit status, and what it printed to stdout and stderr."""
    name, *arguments = line.split()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    status = 0
    with same_signals():
        try:
            SCRIPTS[name].main()
        except SystemExit as stop:
            status = stop.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def be_a_script(line, output, unused=()):
    """What a process of its own does, in the folder: run a script, which prints to that file."""
    for file in unused:
        os.close(file)
    sys.stdout = open(output, "a", encoding="utf-8")
    sys.stderr = io.TextIOWrapper(open(output, "ab", buffering=0), write_through=True)
    data.common.FOLDER = Path("data").resolve()
    for module, name, value in OFTEN:
        setattr(module, name, value)
    sys.argv = line.split()
    SCRIPTS[sys.argv[0]].main()


def start(line, output, unused=()):
    """Start a script in a process of its own; a forked one has this one's files, and closes the unused."""
    arguments = line, output, unused if HOW == "fork" else ()
    process = multiprocessing.get_context(HOW).Process(target=be_a_script, args=arguments, daemon=True)
    process.start()
    return process


def one_line(err):
    return len(err.strip().splitlines()) == 1


def weights(path):
    return engine.load_checkpoint(path, "cpu")[0].state_dict()


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert all(one[name].equal(other[name]) for name in one)


def told(out):
    """The losses that a run of train.py printed after each step, but for those of the validations."""
    return {step: float(loss) for step, loss in re.findall(r"^step (\d+)/\d+  loss ([\d.]+)", out, re.M)}


def final(out):
    """The last line, but for the time and the memory."""
    return re.sub(r" seconds .*", "", out.splitlines()[-1])


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


def kill_in_step(step, monkeypatch, how):
    """From now on, how() at the end of a run's step."""
    real, calls = engine.step_batches, []

    def batches(tokens, context, args, now):
        calls.append(now)
        if now == step:
            how()
        return real(tokens, context, args, now)
    monkeypatch.setattr(engine, "step_batches", batches)
    return calls


def fall():
    raise Killed


# ---- resume

@pytest.mark.parametrize("line", [TRAIN, f"{TRAIN} --attention paper --accumulate 2", DISTILL])
def test_a_killed_run_that_goes_on_is_the_whole_run_to_the_bit(line, folder, monkeypatch, capsys):
    status, whole, _ = run(f"{line} --out whole", monkeypatch, capsys)
    assert status == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_step(6, patch, fall)
        run(f"{line} --out parts", patch, capsys)
    calls = kill_in_step(None, monkeypatch, None)
    status, out, _ = run(f"{line} --out parts --resume", monkeypatch, capsys)
    assert status == 0 and calls == [6] and "final:" in out
    assert_same_weights("whole/ckpt.pt", "parts/ckpt.pt")
    assert final(whole) == final(out)
    status, out, _ = run(f"{line} --out parts --resume", monkeypatch, capsys)
    assert status == 0 and "all 6 steps" in out and "--eval-only" in out and "step 6" not in out


def test_training_draws_no_random_numbers_but_its_batches(folder, monkeypatch, capsys):
    for line in (TRAIN, DISTILL):
        states = []
        for step in (1, 4):
            with monkeypatch.context() as patch:
                kill_in_step(step, patch, lambda: states.append(torch.get_rng_state()))
                run(f"{line} --overwrite", patch, capsys)
        assert len(states) == 2 and states[0].equal(states[1])


@pytest.mark.parametrize("line, more, hint", [
    (TRAIN, "--n-embd 64", "n_embd was 32"), (TRAIN, "--attention dense", "attention was sea"),
    (TRAIN, "--steps 8", "steps was 6.*falls over all --steps"), (TRAIN, "--lr 1", "lr was"),
    (TRAIN, "--seed 2", "seed was 1337"),
    (TRAIN, "--accumulate 2", "accumulate was 1"), (TRAIN, "--data other", "data was"),
    (TRAIN, "--seed 2 --lr 1", "lr was 0.0[0-9]*, now 1.0; seed was 1337, now 2"),
    (TRAIN, "--out nowhere", "leave --resume out"), (TRAIN, "--out .", "leave --resume out"),
    (DISTILL, "--keys-per-query 8", "keys_per_query was 4, now 8"),
    (DISTILL, "--block-size 2", "block_size was"),
    (DISTILL, "--attention window", "attention was sea"), (DISTILL, "--teacher o.pt", "teacher was")])
def test_a_run_goes_on_as_itself_alone(line, more, hint, folder, monkeypatch, capsys):
    (folder / "data" / "other").mkdir()
    for file in (folder / "data" / "tiny").iterdir():
        content = file.read_bytes()
        if file.name == "train.bin":
            content = np.frombuffer(content, np.uint16)[::-1].tobytes()    # as long, and other text
        (folder / "data" / "other" / file.name).write_bytes(content)
    other, rest = engine.load_checkpoint("t.pt", "cpu")
    other.embed_tokens.weight.data += 1
    engine.save_checkpoint(Path("o.pt"), other, **rest)
    Path("ckpt.pt").write_bytes(Path("t.pt").read_bytes())         # for --out .: no optimizer in it
    assert run(f"{line} --out here", monkeypatch, capsys)[0] == 0
    before = Path("here/ckpt.pt").read_bytes(), Path("here").stat().st_mtime_ns
    status, _, err = run(f"{line} --out here --resume {more}", monkeypatch, capsys)
    assert status == 2 and re.search(hint, err) and one_line(err)
    assert before == (Path("here/ckpt.pt").read_bytes(), Path("here").stat().st_mtime_ns)


def test_data_that_was_prepared_again_is_noticed(folder, monkeypatch, capsys):
    run(TRAIN, monkeypatch, capsys)
    path = folder / "data" / "tiny" / "train.bin"
    path.write_bytes(np.fromfile(path, np.uint16)[::-1].tobytes())         # as long, and other text
    status, _, err = run(f"{TRAIN} --resume", monkeypatch, capsys)
    assert status == 2 and "data was" in err


def test_an_optimizer_of_other_weights_is_refused(folder, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_step(4, patch, fall)
        run(TRAIN, patch, capsys)
    whole = torch.load("out/ckpt.pt")
    for state in (dict(whole["optimizer"][0], exp_avg=torch.zeros(3)), dict(step=torch.tensor(3.))):
        torch.save(dict(whole, optimizer=whole["optimizer"] | {0: state}), "out/ckpt.pt")
        status, _, err = run(f"{TRAIN} --resume", monkeypatch, capsys)
        assert status == 2 and "other weights" in err and one_line(err)


@pytest.mark.parametrize("line", [TRAIN, DISTILL])
def test_what_does_not_touch_the_numbers_may_change(line, folder, monkeypatch, capsys):
    """Windows to evaluate on, names and places of the same data and teacher."""
    assert run(f"{line} --out whole", monkeypatch, capsys)[0] == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_step(4, patch, fall)
        run(f"{line} --out parts", patch, capsys)
    os.rename("data/tiny", "data/moved")
    os.rename("parts", "elsewhere")
    os.rename("t.pt", "moved.pt")
    more = " --eval-windows 2 --teacher moved.pt" if line is DISTILL else ""
    line = f"{line} --resume --out elsewhere --data moved {more}"
    assert run(line, monkeypatch, capsys)[0] == 0
    assert_same_weights("whole/ckpt.pt", "elsewhere/ckpt.pt")


# ---- saving

def test_checkpoints_by_the_clock(folder, monkeypatch, capsys):
    real, steps = engine.save_checkpoint, []

    def save(*args, **rest):
        steps.append(rest["step"])
        real(*args, **rest)

    monkeypatch.setattr(engine, "save_checkpoint", save)
    for minutes in (5, 0):
        monkeypatch.setattr(engine, "SAVE_MINUTES", minutes)
        run(f"{TRAIN} --overwrite", monkeypatch, capsys)
    assert steps == [6, 1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_kill_while_saving_leaves_a_file_that_loads(folder):
    path, chance = Path("ckpt.pt"), random.Random(0)
    model = Transformer(Config(n_embd=96, n_layer=4, context=64))
    engine.save_checkpoint(path, model, tokenizer="bytes", data="tiny", step=-1)
    steps, in_a_save = [], 0
    for _ in range(12):
        child = os.fork()
        if child == 0:
            for step in range(10 ** 6):
                engine.save_checkpoint(path, model, tokenizer="bytes", data="tiny", step=step)
        time.sleep(chance.uniform(0.02, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left = list(Path().glob("ckpt.pt.*"))
        in_a_save += len(left)
        for part in left:
            part.unlink()
        steps.append(engine.load_checkpoint(path, "cpu")[1]["step"])
    print(f"{len(steps)} kills, {in_a_save} of them in a save; the files were of steps {steps}")
    assert in_a_save and max(steps) > 0


def test_sigkill_then_resume_in_processes_of_their_own(folder, monkeypatch, capsys):
    """While the first one lives, a second run into its folder is refused; a kill leaves nothing behind."""
    line = f"{TRAIN} --steps 400"
    killed = start(f"{line} --out killed", Path("said").absolute())
    while killed.is_alive() and not (Path("said").exists() and "step 5/" in Path("said").read_text()):
        time.sleep(0.01)
    status, _, err = run(f"{line} --out killed --overwrite", monkeypatch, capsys)
    assert status == 2 and "another run is writing to killed" in err and one_line(err)
    killed.kill()
    killed.join()
    step = engine.load_checkpoint("killed/ckpt.pt", "cpu")[1]["step"]
    assert 4 <= step < 400
    stop = step + 5
    for out, more in (("killed", " --resume"), ("whole", "")):
        kill_in_step(stop, monkeypatch, fall)
        with pytest.raises(Killed):
            run(f"{line} --out {out}{more}", monkeypatch, capsys)
    assert_same_weights("killed/ckpt.pt", "whole/ckpt.pt")


@pytest.mark.parametrize("line", [TRAIN, DISTILL])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_says_how_to_go_on(line, name, folder, monkeypatch, capsys):
    run(f"{line} --out whole", monkeypatch, capsys)
    number = getattr(signal, name)

    def as_under_torchrun():
        for _ in range(2):                               # by the terminal, and passed on
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        kill_in_step(3, patch, as_under_torchrun)
        patch.setattr(engine, "SAVE_MINUTES", 5)
        status, out, err = run(f"{line} --out parts", patch, capsys)
    assert status == 128 + number and "step 3 of 6" in out.splitlines()[-1] and "--resume" in out
    assert one_line(err)
    assert run(f"{line} --out parts --resume", monkeypatch, capsys)[0] == 0
    assert_same_weights("whole/ckpt.pt", "parts/ckpt.pt")


def test_a_terminal_that_is_closed(folder):
    """What is printed has nowhere to go then, which must not keep the run from saving."""
    terminal, theirs = pytest.importorskip("pty").openpty()
    process = start(f"{TRAIN} --steps 100000", os.ttyname(theirs), (terminal, theirs))
    said = b""
    while b"step 7/" not in said:
        assert process.is_alive() or select.select([terminal], [], [], 0)[0], said
        if select.select([terminal], [], [], 1)[0]:
            said += os.read(terminal, 1000)
    os.close(theirs)
    os.close(terminal)
    os.kill(process.pid, signal.SIGHUP)                  # as the system does then
    process.join(60)
    assert process.exitcode == 128 + signal.SIGHUP
    assert engine.load_checkpoint("out/ckpt.pt", "cpu")[1]["step"] >= 7


def test_what_a_signal_did_before_and_after(folder, monkeypatch, capsys):
    """nohup's SIGHUP is ignored, and a run that has done its steps has no say in signals."""
    with same_signals():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        handler = signal.getsignal(signal.SIGTERM)
        kill_in_step(3, monkeypatch, lambda: signal.raise_signal(signal.SIGHUP))
        monkeypatch.setattr(sys, "argv", TRAIN.split())
        train.main()
        assert "final:" in capsys.readouterr().out
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and signal.getsignal(signal.SIGTERM) is handler


def test_a_second_ctrl_c_stops_at_once(folder, monkeypatch, capsys):
    def twice():
        signal.raise_signal(signal.SIGINT)
        time.sleep(1.1)
        signal.raise_signal(signal.SIGINT)

    kill_in_step(3, monkeypatch, twice)
    status, _, err = run(TRAIN, monkeypatch, capsys)
    assert status == 130 and one_line(err) and "once more: at once" in err
    assert engine.load_checkpoint("out/ckpt.pt", "cpu")[1]["step"] == 2


@pytest.mark.parametrize("line", [TRAIN, DISTILL])
def test_a_full_disk_leaves_the_last_checkpoint(line, folder, monkeypatch, capsys):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    kill_in_step(4, monkeypatch, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1])))
    try:
        status, _, err = run(f"{line} --out out", monkeypatch, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and "cannot write" in err and one_line(err)
    assert engine.load_checkpoint("out/ckpt.pt", "cpu")[1]["step"] == 3 and not list(folder.glob("*/*.part"))


@pytest.mark.parametrize("where", ["torch.save", "fsync"])
def test_a_disk_that_is_full_elsewhere(where, folder, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    def fill():
        monkeypatch.setattr(*{"torch.save": (torch, "save"), "fsync": (os, "fsync")}[where], full)
    kill_in_step(4, monkeypatch, fill)
    status, _, err = run(TRAIN, monkeypatch, capsys)
    assert status == 2 and "No space left" in err and one_line(err)
    assert engine.load_checkpoint("out/ckpt.pt", "cpu")[1]["step"] == 3 and not list(folder.glob("*/*.part"))


# ---- numbers

@pytest.mark.parametrize("line", [TRAIN, DISTILL])
def test_a_loss_that_is_no_number_stops_the_run(line, folder, monkeypatch, capsys):
    real = Transformer.unembed
    kill_in_step(4, monkeypatch, lambda: monkeypatch.setattr(
        Transformer, "unembed", lambda model, x: real(model, x) * torch.inf))
    status, _, err = run(line, monkeypatch, capsys)
    assert status == 2 and "this is step 4" in err and "lower --lr" in err and one_line(err)
    model, saved = engine.load_checkpoint("out/ckpt.pt", "cpu")
    assert saved["step"] == 3 and all(x.isfinite().all() for x in model.state_dict().values())


# ---- several processes

def be_a_rank(lines):
    """What each of two processes does that torchrun starts: run scripts, one after the other."""
    importlib.reload(engine)                             # reads who this process is
    real = engine.step_batches

    def batches(tokens, context, args, step):
        stops = step == 3 and engine.RANK == 1 and not args.resume         # Ctrl-C reaches one of them
        if stops and not args.overwrite:
            signal.raise_signal(signal.SIGINT)
        return real(tokens, context, args, step)

    engine.step_batches = batches
    for line in lines:
        try:
            be_a_script(line, f"said-{engine.RANK}")
        except SystemExit as stop:
            print("status", stop.code, flush=True)


def test_two_processes_are_one_with_twice_the_accumulation(folder, monkeypatch, capsys):
    # All of the past, so that rounding does not change a selection; small steps, so that optimizers make
    # little of it where gradients are tiny.
    whole = " --keys-per-query 32 --lr 1e-4"
    lines = [f"{TRAIN} --out train", f"{TRAIN} --out train --resume", f"{DISTILL} --out distill",
             f"{DISTILL} --out distill --overwrite"]
    lines = [f"{line} --accumulate 2{whole}" for line in lines]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torchrun = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="test",
                            start_method=HOW, max_restarts=0)
    with same_signals():
        signal.signal(signal.SIGALRM, lambda number, frame: pytest.fail("the ranks wait for each other"))
        signal.alarm(120)
        elastic_launch(torchrun, be_a_rank)(lines)
        signal.alarm(0)
    alone = ""
    for line in (TRAIN, DISTILL):
        status, out, _ = run(f"{line} --out one-{line.split()[0]} --accumulate 4{whole}", monkeypatch, capsys)
        alone += out
    printed = Path("said-0").read_text()
    print(printed)
    assert printed.count("status 130") == 2 == printed.count("final:")
    assert printed.count("step 6/6") == 2                                # only the first one prints
    assert told(printed) == pytest.approx(told(alone), abs=2e-4) and len(told(alone)) == 6
    val = data.common.load("tiny")[1]
    for name in ("train", "distill"):
        models = [engine.load_checkpoint(f"{out}/ckpt.pt", "cpu")[0] for out in (f"one-{name}", name)]
        one, two = [train.evaluate(model, val, 2, 50, nullcontext()) for model in models]
        print(name, one, two)
        assert two == pytest.approx(one, abs=1e-4)


def test_torchrun_trains(folder):
    """The command of train.py's head, in a process of its own."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", train.__file__,
            *TRAIN.split()[1:], "--steps=1", f"--data={folder / 'data' / 'tiny'}"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("step 1/1") == 1 == done.stdout.count("final:"), done
