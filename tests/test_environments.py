"""Every script where little is as usual: no HOME, no docstrings and asserts (-OO), no search path,
a checkout that cannot be written to, and an output that is closed, full, or without most letters.
"""
import ast
import bz2
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from test_data import LLAMA_GGUF, golden_metadata, write_gguf

ROOT = Path(__file__).resolve().parents[1]
SIZE = "--n-layer 1 --n-head 1 --n-embd 16 --context 32 --keys-per-query 4 --block-size 4"
SCRIPTS = {
    "data/text.py": "text.txt --name tiny",
    "data/shakespeare.py": "--url URL",
    "data/stdlib.py": "",
    "data/wikitext2.py": "--file wiki.zip --tokenizer bytes",
    "data/wikipedia.py": "--file dump.xml.bz2 --tokenizer bytes",
    "data/smollm2.py": "--file tiny.gguf --overwrite",
    "train.py": f"--data tiny --attention dense --out out --steps 1 --batch-size 1 {SIZE} --overwrite",
    "distill.py": "--teacher out/ckpt.pt --data tiny --eval-only --eval-windows 2 --keys-per-query 4",
    "sample.py": "--checkpoint out/ckpt.pt --prompt при-café --max-new-tokens 9"}
OUTPUTS = ("ascii", "closed", "none", "full")

# Python and torch start once; each script then runs in a copy of that process, up to its end.
DRIVER = """
import importlib.util, json, os, runpy, sys, sysconfig, traceback
import tiktoken, torch, torch._dynamo, torch.distributed.tensor
if importlib.util.find_spec("triton"):
    import triton.language

torch.set_num_threads(1)
root, lines, outputs = sys.argv[1], *map(json.loads, sys.argv[2:])
access = os.access
os.access = lambda path, mode: not str(path).startswith(root) and access(path, mode)


def redirect(output, name):
    os.dup2(os.open(name + ".err", os.O_WRONLY | os.O_CREAT), 2)
    reader, out = os.pipe() if output == "closed" else (0, 0)
    os.close(reader)
    if output == "ascii":
        out = os.open(name + ".out", os.O_WRONLY | os.O_CREAT)
    elif output == "full":
        out = os.open("/dev/full", os.O_WRONLY)
    if output == "none":
        os.close(1)
        sys.stdout = sys.__stdout__ = None
        return
    os.dup2(out, 1)
    encoding = "ascii" if output == "ascii" else "utf-8"
    sys.stdout = sys.__stdout__ = open(1, "w", encoding=encoding, closefd=False)


for output in outputs:
    for line in lines:
        name = output + "-" + os.path.basename(line[0])
        if not os.fork():
            redirect(output, name)
            sys.argv = line
            if name.endswith("stdlib.py"):
                sysconfig.get_paths = lambda: dict(stdlib="lib")
            status = 0
            try:
                runpy.run_path(line[0], run_name="__main__")
            except SystemExit as stop:
                status = stop.code or 0
            except BaseException:
                traceback.print_exc()
            try:
                print(end="", flush=True)              # as Python does at its end
            except OSError:
                traceback.print_exc()
            os._exit(status)
        with open(name + ".status", "w") as file:
            file.write(str(os.waitstatus_to_exitcode(os.wait()[1])))
"""


def make_files(folder):
    """What the scripts read: a text, zips, a dump of Wikipedia, a model, a library."""
    words = "Слова и café, 3.14.\n" * 99
    (folder / "text.txt").write_text(words, encoding="utf-8")
    with zipfile.ZipFile(folder / "wiki.zip", "w") as archive:
        for split in ("train", "valid", "test"):
            archive.writestr(f"wiki.{split}.raw", words)
    page = f"<page><title>é</title><ns>0</ns><revision><text>{words}</text></revision></page>"
    dump = f"<mediawiki>{2 * page}</mediawiki>".encode()
    (folder / "dump.xml.bz2").write_bytes(bz2.compress(dump))
    write_gguf(folder / "tiny.gguf", golden_metadata() | LLAMA_GGUF, {})
    (folder / "lib").mkdir()
    for n in range(100):
        (folder / "lib" / f"{n}.py").write_text(words, encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which all scripts have run, with every kind of output."""
    folder = tmp_path_factory.mktemp("environments")
    make_files(folder)
    url = (folder / "text.txt").as_uri()
    lines = [[str(ROOT / script), *flags.replace("URL", url).split()]
             for script, flags in SCRIPTS.items()]
    outputs = [output for output in OUTPUTS if output != "full" or Path("/dev/full").exists()]
    bare = {name: value for name, value in os.environ.items()
            if name != "HOME" and not name.startswith("PYTHON")}
    done = subprocess.run([sys.executable, "-OO", "-c", DRIVER, ROOT, json.dumps(lines),
                           json.dumps(outputs)], cwd=folder, env=bare | dict(PYTHONSAFEPATH="1"),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="a fork of torch, and /dev/full")
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_in_bare_environments(script, output, folder):
    name = f"{output}-{Path(script).name}"
    if not (folder / f"{name}.status").is_file():
        pytest.skip("no /dev/full")
    status = int((folder / f"{name}.status").read_text())
    said = (folder / f"{name}.err").read_text(errors="replace")
    assert "Traceback" not in said and "Exception" not in said
    assert status == (2 if output == "full" else 0), said
    assert status == 0 or len(said.strip().splitlines()) == 1
    # Data sets lie beside out/ where the checkout cannot be written to.
    assert (folder / "data" / "tiny" / "meta.json").is_file()
    if output == "ascii":
        assert (folder / f"{name}.out").read_bytes()


@pytest.mark.parametrize("part", [".", "data", "tests", "assets"])
def test_the_oldest_python_can_read_all_files(part):
    files = sorted((ROOT / part).glob("*.py"))
    assert files
    for path in files:
        ast.parse(path.read_text(encoding="utf-8"), path, feature_version=(3, 10))
