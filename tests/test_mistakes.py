"""Bad input to the three scripts: one line that says what to do, exit status 2, and nothing is lost.

    python tests/test_mistakes.py 2000     the random attack with so many inputs of each sort
"""
import argparse
import os
import pickle
import random
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data.common
import distill
from data import engine, hub
import sample
import train
from model import Config, Transformer

MODEL = "--n-layer 1 --n-head 2 --n-embd 32 --context 32 --keys-per-query 4 --block-size 4"
LINES = {
    "train": f"--data tiny --device cpu {MODEL} --batch-size 2 --steps 1 --overwrite",
    "distill": "--teacher dense.pt --data tiny --device cpu --batch-size 2 --steps 1 --eval-windows 1 --overwrite",
    "sample": "--checkpoint sea.pt --device cpu --max-new-tokens 1 --prompt def"}
MODULES = dict(train=train, distill=distill, sample=sample)
COUNT = 50        # inputs of the random attack, of each sort
HUGE = str(10 ** 9), str(10 ** 30), "9" * 5000


def small(attention):
    return Config(256, 32, 1, 2, n_embd=32, attention=attention, keys_per_query=4, block_size=4)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a data set, a dense and a SEA checkpoint, in which the scripts run."""
    monkeypatch.setattr(data.common, "FOLDER", tmp_path / "data")
    (tmp_path / "data").mkdir()
    text = Path(argparse.__file__).read_text()[:9000]
    data.common.write("tiny", {"train": text, "val": text[:1100]}, "bytes", "a test")
    for attention in ("dense", "sea"):
        torch.manual_seed(0)
        model = Transformer(small(attention))
        engine.save_checkpoint(tmp_path / f"{attention}.pt", model, tokenizer="bytes", data="tiny")
    monkeypatch.setattr(train, "EVAL_WINDOWS", 1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """Call a script with the flags of LINES and more -> its exit status and what it wrote to stderr."""
    def call(name, *more):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *LINES[name].split(), *more])
        status = 0
        try:
            MODULES[name].main()
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr().err
    return call


def content(folder):
    """What a mistake must leave as it is, without what a run that works has written."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_mistake(run, folder, name, *more):
    before = content(folder)
    status, err = run(name, *more)
    assert status == 2, (name, more, status)
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err and err.startswith(name), (more, err)
    assert content(folder) == before, more
    return err


def flags(name, monkeypatch):
    """The flags of a script by the kind of their values, as its own parser knows them."""
    kept = []
    monkeypatch.setattr(data.common.Parser, "parse_args", lambda parser: kept.append(parser) or sys.exit())
    with pytest.raises(SystemExit):
        MODULES[name].parse_arguments()
    monkeypatch.undo()
    kinds = {int: [], float: [], "choice": [], "switch": [], "text": []}
    for action in kept[0]._actions:
        by_name = {"int": int, "float": float}.get(getattr(action.type, "__name__", None), "text")
        kind = "choice" if action.choices else "switch" if action.nargs == 0 else by_name
        kinds[kind].append(action.option_strings[0])
    return kinds


WRONG = {int: ("fast", "1.5", "", "nan", "inf", "-1", "1e3", HUGE[1], HUGE[2]),
         float: ("fast", "", "nan", "inf", "-inf", "-1", "1e999"), "choice": ("nothing", "", "-1"),
         "switch": ("1",), "text": ()}
ZERO_WORKS = {"--seed", "--top-k"}
HUGE_WORKS = {"--keys-per-query", "--block-size", "--seed", "--eval-windows", "--top-k"}
ENDLESS = {"--steps", "--max-new-tokens"}       # a huge number of them is legal, and takes for ever


@pytest.mark.parametrize("name", MODULES)
def test_every_flag_with_every_wrong_value(name, run, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with monkeypatch.context() as patch:
        kinds = flags(name, patch)
    cases = [(flag, value) for kind, names in kinds.items() for flag in names for value in WRONG[kind]]
    cases += [(flag, "0") for flag in kinds[int] if flag not in ZERO_WORKS | {"--layers"}]
    cases += [(flag, HUGE[0]) for flag in kinds[int] if flag not in HUGE_WORKS | ENDLESS]
    for flag, value in cases:
        assert flag in assert_mistake(run, folder, name, f"{flag}={value}") or value in HUGE, (flag, value)
    for flag in [flag for names in kinds.values() for flag in names if flag not in kinds["switch"]]:
        if flag != "--eval-only":
            assert_mistake(run, folder, name, flag)                          # its value is missing
    works = [(flag, "0") for flag in kinds[int] + kinds[float]
             if flag in ZERO_WORKS or flag in kinds[float]]
    works += [(flag, HUGE[0]) for flag in kinds[int] if flag in HUGE_WORKS]
    for flag, value in works:
        assert run(name, flag, value)[0] == 0, (flag, value)
    print(f"{name}: {len(cases)} wrong values, {len(works)} at the edge that work")


@pytest.mark.parametrize("name, more, hint", [
    ("train", "--wrong 1", "--help"), ("train", "extra", "--help"), ("train", "--data ../tiny", "ready: tin"),
    ("train", "--data " + "x" * 300, "too long"), ("train", "--block-size 1.5", "--block-size"),
    ("train", "--n-layer 1000000000", "GiB"), ("train", "--n-embd 1000000000", "GiB"),
    ("train", "--batch-size 1000000000", "GiB"), ("train", "--n-head 1000000000", "multiple of n_head"),
    ("train", "--context 1000000000", "--context under"), ("train", "--n-head 3", "multiple of n_head"),
    ("train", "--n-embd 30", "even"),
    ("train", "--out dense.pt", "--out"), ("train", "--out dense.pt/x", "--out"),
    ("train", "--resume", "--resume"), ("distill", "--resume", "--resume"),
    ("distill", "--out dense.pt", "--out"),
    ("distill", "--teacher nothing.pt", "no checkpoint"), ("distill", "--teacher nothing", "facebook/opt-1"),
    ("distill", "--teacher data", "config.json"), ("distill", "--context 1000000000", "context"),
    ("distill", "--batch-size 1000000000", "GiB"), ("distill", "--eval-only test", "no test split"),
    ("distill", "--teacher sea.pt", "must be dense"),
    ("sample", "--checkpoint nothing.pt", "no checkpoint"), ("sample", "--checkpoint data", "config.json"),
    ("sample", "--checkpoint " + "x" * 300, "too long"), ("sample", "--checkpoint " + "x" * 300 + ".pt", "no check"),
    ("sample", "--page a.html --checkpoint dense.pt", "dense"),
    ("sample", "--checkpoint dense.pt --keys-per-query 3", "--keys-per-query"),
    ("sample", "--page data", "file"), ("sample", "--page a.html --layers 1", "layers"),
    ("sample", "--keys-per-query 0", "--keys-per-query")])
def test_what_cannot_work(name, more, hint, run, folder):
    assert hint in assert_mistake(run, folder, name, *more.split())


def test_an_out_in_which_no_checkpoint_may_come(run, folder):
    (folder / "its").mkdir()
    shutil.copy("dense.pt", "its/ckpt.pt")
    assert "teacher's folder" in assert_mistake(run, folder, "distill", "--teacher", "its/ckpt.pt", "--out", "its")
    (folder / "out" / "ckpt.pt").mkdir(parents=True)
    for name in "train", "distill":
        assert "is a folder" in assert_mistake(run, folder, name, "--out", "out")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", MODULES)
def test_a_gpu_that_is_absent(name, run, folder):
    assert "no GPU" in assert_mistake(run, folder, name, "--device", "cuda")


@pytest.mark.parametrize("name, more", [
    ("train", "--block-size 32 --context 8"), ("train", "--keys-per-query 10000"),
    ("train", "--attention paper --context 3"), ("train", "--context 1"), ("train", "--n-head 4"),
    ("distill", "--keys-per-query 10000"), ("distill", "--context 16"), ("distill", "--context 40"),
    ("distill", "--block-size 64"), ("distill", "--eval-only val --teacher sea.pt"),
    ("distill", "--eval-only --attention window"), ("sample", "--attention window --keys-per-query 9"),
    ("sample", "--keys-per-query 10000"), ("sample", "--top-k 10000 --temperature 0"),
    ("sample", "--temperature 1e-30")])
def test_what_looks_wrong_and_works(name, more, run):
    assert run(name, *more.split())[0] == 0


# ---- files

def damaged(content):
    """Checkpoints that are none: cut at many bytes, overwritten, or of another make."""
    ends = [0, 1, 3, 4, 30, *range(100, len(content), len(content) // 60),
            *range(len(content) - 30, len(content))]
    yield from (content[:end] for end in ends)
    yield from (bytes(len(content)), b"\xff" * 100, b"PK\5\6" + bytes(18))
    yield content[:len(content) // 2] + content[-22:]
    yield content[:200] + bytes(len(content) - 400) + content[-200:]


def test_checkpoints_cut_at_many_bytes(run, folder):
    whole, tried = Path("sea.pt").read_bytes(), 0
    for content in damaged(whole):
        Path("bad.pt").write_bytes(content)
        assert "bad.pt" in assert_mistake(run, folder, "sample", "--checkpoint", "bad.pt")
        tried += 1
    for name, flag in (("distill", "--teacher"), ("train", "--resume")):
        (folder / "out").mkdir(exist_ok=True)
        for path in ("bad.pt", "out/ckpt.pt", "out/lock"):
            Path(path).write_bytes(whole[:-1000])
        more = [flag, "bad.pt"] if name == "distill" else [flag, "--out", "out"]
        assert "no checkpoint" in assert_mistake(run, folder, name, *more)
    print(f"{tried + 2} damaged checkpoints")


class Code:
    def __reduce__(self):
        return Path.write_text, (Path("ran.txt"), "this code ran")


@pytest.mark.parametrize("saved", [
    Code(), dict(config=Code()), dict(model={}, config={}), dict(config=dict(n_layer="1"), model={}),
    dict(config=dict(wrong=1), model={}), [1], torch.zeros(3), 7, None, "text", {}, dict(config=None)])
def test_checkpoints_of_another_make(saved, run, folder):
    torch.save(saved, "bad.pt")
    assert "no checkpoint" in assert_mistake(run, folder, "sample", "--checkpoint", "bad.pt")
    Path("bad.pt").write_bytes(pickle.dumps(saved))
    assert "no checkpoint" in assert_mistake(run, folder, "sample", "--checkpoint", "bad.pt")
    with zipfile.ZipFile("bad.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(saved))
        archive.writestr("archive/version", "3")
    assert "no checkpoint" in assert_mistake(run, folder, "sample", "--checkpoint", "bad.pt")
    assert not Path("ran.txt").exists()


def test_checkpoints_without_a_tokenizer_or_with_an_unknown_one(run, folder):
    model = Transformer(small("dense"))
    for rest in ({}, dict(tokenizer="bytes"), dict(tokenizer="no", data="tiny"), dict(tokenizer=3, data=4)):
        engine.save_checkpoint(Path("bad.pt"), model, **rest)
        assert_mistake(run, folder, "sample", "--checkpoint", "bad.pt")
        assert_mistake(run, folder, "distill", "--teacher", "bad.pt")


META = ["", "{", "[]", "7", "null", '{"tokens": 3}',
        '{"vocab_size": "x", "tokens": {}, "tokenizer": "bytes"}',
        '{"vocab_size": 256, "tokens": {"train": "9", "val": 1}, "tokenizer": "bytes", "source": ""}',
        '{"vocab_size": 256, "tokens": {"train": 9, "val": 1}, "tokenizer": "bytes"}', "\xff"]


@pytest.mark.parametrize("name", ["train", "distill"])
def test_data_sets_that_are_damaged(name, run, folder):
    tiny = folder / "data" / "tiny"
    whole = {path: path.read_bytes() for path in tiny.iterdir()}
    bad = [("meta.json", text.encode("latin-1")) for text in META]
    for file in ("train.bin", "val.bin"):
        content = whole[tiny / file]
        bad += [(file, content[:end]) for end in (0, 1, 100, len(content) - 1)]
        bad += [(file, content + b"\0"), (file, b"\xff\xff" + content[2:])]
    for file, content in bad:
        (tiny / file).write_bytes(content)
        assert "again" in assert_mistake(run, folder, name), (file, content[:40])
        (tiny / file).write_bytes(whole[tiny / file])
    for file in whole:
        file.unlink()
        assert_mistake(run, folder, name)
        file.write_bytes(whole[file])


def test_data_that_changes_under_a_run_does_not_reach_it(run, folder, monkeypatch):
    def change(*args):
        for path in (folder / "data" / "tiny").iterdir():
            path.write_bytes(b"\xff")
        return real(*args)
    real = engine.step_batches
    monkeypatch.setattr(engine, "step_batches", change)
    assert run("train", "--steps=3")[0] == 0
    assert "again" in assert_mistake(run, folder, "train", "--steps=3", "--resume")


@pytest.mark.parametrize("prompt", [
    "", " ", "\n", "\0", "\ud800", "\udfff\ud800", "é😀", "\u202e\u200b\ufeff", "a\u0301" * 8,
    "<|endoftext|>", "</s>", "\U0010ffff", "0" * 32, "%s {} \\x00"])
def test_a_prompt_of_any_unicode(prompt, run):
    status, err = run("sample", f"--prompt={prompt}")
    assert status == 0 and "tokens/s" in err and len(err.splitlines()) == 1


# ---- others

VALUES = ["-1", "0", "1", "2", "3", "4", "7", "8", "32", "33", "1e-9", "1e9", "nan", "inf", "sea", "dense",
          "tiny", "", "é", "sea.pt", "dense.pt", "data", "--resume"]


def test_random_combinations_end_in_0_or_in_one_line(run, folder, monkeypatch):
    chance, ends = random.Random(1337), {0: 0, 2: 0}
    all_flags = {}
    for name in MODULES:
        with monkeypatch.context() as patch:
            all_flags[name] = sum(flags(name, patch).values(), [])
    monkeypatch.chdir(folder)
    for _ in range(2 * COUNT):
        name = chance.choice(list(MODULES))
        drawn = [(chance.choice(all_flags[name]), chance.choice(VALUES)) for _ in range(chance.randint(1, 3))]
        more = [f"{flag}={value}" for flag, value in drawn]
        more = [flag for flag in more if not flag.startswith(("--out", "--page=", "-h", "--eval-only=val"))]
        before = content(folder)
        status, err = run(name, *more)
        assert status in ends, (name, more, status)
        ends[status] += 1
        if status == 2:
            assert len(err.strip().splitlines()) == 1, (name, more, err)
            assert content(folder) == before or "spoilt" in err, (name, more, err)    # --lr 1e9
        engine.load_checkpoint("sea.pt", "cpu")
    print(f"{2 * COUNT} combinations: {ends[0]} worked, {ends[2]} were told in one line")


def cut_or_flip(content, chance):
    """Cut at any byte, or some bits flipped, or eight bytes, a length or a count, made large."""
    kind = chance.choice(["cut", "flip", "length"])
    content = bytearray(content)
    if kind == "cut":
        return content[:chance.randrange(len(content))]
    if kind == "flip":
        for _ in range(chance.choice([1, 1, 2, 9])):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        return content
    at = chance.randrange(min(300, len(content) - 8))
    content[at:at + 8] = struct.pack("<Q", chance.choice([2 ** 31, 2 ** 40, 2 ** 62, 2 ** 64 - 1]))
    return content


WHAT = [None, "", "x", -1, 0, 1, 7, 2 ** 20, 2 ** 40, 10 ** 30, 1.5, float("nan"), True, [], {}, (1, 2),
        torch.zeros(3), torch.ones(1).expand(10 ** 12), torch.full((32,), torch.nan)]


def change_a_value(saved, chance):
    """Something anywhere in a checkpoint becomes something else, or is lost."""
    where = saved
    while True:
        key = chance.choice(list(where) if isinstance(where, dict) else range(len(where)))
        inner = where[key]
        if not isinstance(inner, (dict, list)) or not inner or chance.random() < 0.2:
            break
        where = inner
    if isinstance(where, dict) and chance.random() < 0.2:
        del where[key]
    else:
        where[key] = chance.choice(WHAT)


def attack(run, folder, lines, make, count):
    """Run a line after each make(chance): it works, or it ends in one line and loses no file."""
    chance, ends = random.Random(1337), {0: 0, 2: 0}
    for turn in range(count):
        make(chance)
        name, *more = chance.choice(lines).split()
        before = content(folder)
        status, err = run(name, *more)
        assert status in ends and "Traceback" not in err, (turn, name, more, status, err)
        ends[status] += 1
        if status == 2:
            assert len(err.strip().splitlines()) == 1, (turn, err)
            assert content(folder) == before, (turn, more)
    print(f"{count} files: {ends[0]} worked, {ends[2]} were told in one line")


@pytest.mark.parametrize("how", ["bytes", "values"])
def test_random_checkpoints(how, run, folder):
    """Of a run: to resume, to sample from, to take for a teacher."""
    assert run("train", "--out=made", "--steps=2", "--attention=dense")[0] == 0
    whole = Path("made/ckpt.pt").read_bytes()
    (folder / "out").mkdir()
    Path("out/lock").touch()

    def make(chance):
        if how == "bytes":
            Path("out/ckpt.pt").write_bytes(cut_or_flip(whole, chance))
        else:
            saved = torch.load("made/ckpt.pt") | dict(step=1)      # there is one more to do
            change_a_value(saved, chance)
            torch.save(saved, "out/ckpt.pt")

    attack(run, folder, ["train --resume --attention=dense --steps=2 --out=out",
                         "sample --checkpoint=out/ckpt.pt",
                         "distill --eval-only --teacher=out/ckpt.pt"], make, COUNT)


def test_random_published_weights(run, folder):
    shutil.copytree(Path(__file__).parent / "golden" / "llama-tied", "published")
    for file in ("vocab.json", "merges.txt"):
        shutil.copyfile(Path(__file__).parent / "golden" / "tokenizer" / file, f"published/{file}")
    [weights] = [path for path in Path("published").iterdir() if path.name in hub.WEIGHTS]
    files = {path: path.read_bytes() for path in Path("published").iterdir()}

    def make(chance):
        for path, whole in files.items():
            path.unlink()                            # what is mapped still is not written into
            path.write_bytes(whole)
        path = chance.choice([weights, weights, *files])
        path.unlink()
        path.write_bytes(cut_or_flip(files.get(path), chance))

    attack(run, folder, ["sample --checkpoint=published"], make, COUNT)


def test_zips_that_claim_to_be_large(run, folder):
    """What they claim is not allocated: 4 TB would fail, and not in one line."""
    with zipfile.ZipFile("bad.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10 ** 7))
        archive.writestr("archive/version", "3")
    content = Path("bad.pt").read_bytes()
    assert len(content) < 20_000
    assert "more than its size" in assert_mistake(run, folder, "sample", "--checkpoint", "bad.pt")
    claimed = content.replace(struct.pack("<I", 10 ** 7), struct.pack("<I", 2 ** 32 - 2))
    Path("bad.pt").write_bytes(claimed)
    assert "more than its size" in assert_mistake(run, folder, "sample", "--checkpoint", "bad.pt")
    saved = torch.load("sea.pt")
    for claim in (dict(vocab_size=2 ** 40), dict(n_layer=10 ** 9), dict(num_features=2 ** 40)):
        torch.save(saved | dict(config=saved["config"] | claim), "bad.pt")
        assert "no checkpoint" in assert_mistake(run, folder, "sample", "--checkpoint", "bad.pt")


@pytest.mark.skipif(sys.platform == "win32", reason="links are not everybody's there")
def test_links(run, folder):
    """Loops, links to nothing and to folders: told in one line. A link to a file is one."""
    Path("kept.txt").write_text("kept")
    os.symlink("loop", "loop")
    os.symlink("nothing", "dangling")
    os.symlink("data", "to-data")
    os.symlink("sea.pt", "link.pt")
    os.symlink("loop", "loop.pt")
    os.symlink("data", "data.pt")
    assert run("sample", "--checkpoint", "link.pt")[0] == 0
    for name in ("loop.pt", "data.pt", "nothing.pt", "loop", "dangling", "to-data"):
        assert_mistake(run, folder, "sample", "--checkpoint", name)
        assert_mistake(run, folder, "distill", "--teacher", name)
    for out in ("loop", "loop/x", "dangling", "sea.pt", "kept.txt/x"):
        assert "--out" in assert_mistake(run, folder, "train", "--out", out)
        assert "--out" in assert_mistake(run, folder, "distill", "--out", out)
    for name in ("loop", "to-data"):
        assert_mistake(run, folder, "train", "--data", f"../{name}")
    # What a folder holds may be links: they are replaced, what they lead to stays.
    Path("out").mkdir()
    os.symlink(Path("kept.txt").resolve(), "out/ckpt.pt")
    os.symlink(Path("kept.txt").resolve(), "out/lock")
    assert run("train", "--out", "out")[0] == 0
    assert Path("kept.txt").read_text() == "kept" and not Path("out/ckpt.pt").is_symlink()


@pytest.mark.parametrize("name, more, told", [
    ("train", "", False), ("train", "--keys-per-query 24", True), ("train", "--keys-per-query 16", False),
    ("train", "--keys-per-query 99 --attention dense", False),
    ("train", "--keys-per-query 99 --attention window", True),
    ("distill", "--keys-per-query 99", True), ("distill", "", False)])
def test_a_budget_of_all_keys_is_told(name, more, told, run):
    status, err = run(name, *more.split())
    assert status == 0 and ("this selects everything" in err) == told and err.count("\n") == told


if __name__ == "__main__":
    import test_mistakes
    test_mistakes.COUNT = int(sys.argv[1])
    sys.exit(pytest.main([__file__, "-s", "-q", "-k", "random"]))
