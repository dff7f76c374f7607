"""README.md says what is so: its Python runs, its commands exist, its numbers are RESULTS.md's."""
import contextlib
import doctest
import io
import re
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import sea

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
FILES = pytest.mark.parametrize("text", [README, RESULTS], ids=["README", "RESULTS"])
NUMBER = re.compile(r"(?<![\w-])\d+(?:,\d{3})*(?:\.\d+)?")


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def prose(text):
    """Without code, comments, addresses of links and numbers of papers."""
    text = re.sub(r"^```.*?^```|<!--.*?-->", "", text, flags=re.S | re.M)
    return re.sub(r"`[^`]*`|\]\([^)]*\)|arXiv\s+[\d.]+", "", text)


def numbers(text):
    return [number.replace(",", "") for number in NUMBER.findall(text)]


# ---- numbers

def test_every_number_is_one_of_results():
    """All of the result tables and of the bullets on top; elsewhere decimals and per cents."""
    text = prose(README)
    top = text.split("## Quick start")[0].split("* **", 1)[1]
    results = text.split("## Results")[1].split("\n## ")[0]
    tables = "\n".join(line for line in results.splitlines() if line.startswith("|"))
    wanted = numbers(top) + numbers(tables) + re.findall(r"(\d+) %", text)
    wanted += [number for number in numbers(text) if "." in number]
    assert len(wanted) > 80
    known = set(numbers(RESULTS))
    assert not [number for number in wanted if number not in known]


@FILES
def test_tables_are_those_of_the_csv(text):
    figures = runpy.run_path(str(ROOT / "assets" / "figures.py"))
    made = figures["tables"](figures["Bench"](ROOT / "assets" / "bench.csv"))
    found = re.findall(r"<!-- table (.*?) -->", text)
    assert found and set(found) <= set(made)
    assert figures["put"](made, text) == text
    if text == RESULTS:
        assert set(found) == set(made)


# ---- code

def test_seven_lines_are_sea(S=8, n=6):
    [code] = [block for block in blocks("python") if "def sea(" in block]
    assert len(code.split("def sea(")[1].splitlines()[1:]) == 7
    scope = {}
    exec(code, scope)
    for T in (9, 16, 17, 100, 200, 300):
        q, k, v = torch.randn(3, 1, 1, T, 16, dtype=torch.float64)
        wanted = sea.sea_attention(q, k, v, S, n * S)[0, 0, -1]
        found = scope["sea"](q[0, 0, -1] / 4, k[0, 0], v[0, 0], S, n)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("example", blocks("pycon"))
def test_examples_at_the_prompt(example):
    test = doctest.DocTestParser().get_doctest(example, {}, "README.md", None, 0)
    said = io.StringIO()
    assert doctest.DocTestRunner().run(test, out=said.write).failed == 0, said.getvalue()


def test_in_a_llama_of_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)   # transformers knows another of that name
    pytest.importorskip("transformers")
    [code] = [block for block in blocks("python") if "transformers" in block]
    scope = {}
    exec(code, scope)
    assert scope["logits"].shape == (1, 300, 1000) and scope["logits"].isfinite().all()


# ---- commands and files

def commands(text):
    """(script, flags) of every line with one in a block of commands or between backticks."""
    lines = "".join(blocks("sh", text)).splitlines()
    lines += re.findall(r"`((?:python|torchrun) [^`]*)`", text)
    for line in lines:
        for part in line.split(" #")[0].split("&&"):
            words = shlex.split(part)
            script = [word for word in words if word.endswith(".py")][:1]
            if script and words[0] in ("python", "torchrun"):
                rest = words[words.index(script[0]) + 1:]
                yield script[0], [word.split("=")[0] for word in rest if word.startswith("--")]


@cache
def help_of(script):
    said = io.StringIO()
    argv = sys.argv
    sys.argv = [script, "--help"]
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = argv
    return said.getvalue()


@FILES
def test_commands_exist(text):
    found = list(commands(text))
    assert len(found) > 8
    for script, flags in found:
        assert (ROOT / script).is_file(), script
        if script == "tests/bench.py":
            pytest.importorskip("triton")
        known = re.findall(r"--[a-z0-9-]+", help_of(script)) if flags else []
        assert not [flag for flag in flags if flag not in known], (script, flags)


@FILES
def test_linked_files_exist(text):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    named = re.findall(r"`((?:tests|assets|data)/[\w.]+\.\w+)`", text)
    assert not [link for link in links + named if not (ROOT / link.split("#")[0]).exists()]


@FILES
def test_linked_chapters_exist(text):
    """GitHub names a heading by its words: small letters, no signs, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)", text, re.M)
    names = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= set(names)


def test_values_named_by_flags_exist():
    names = re.findall(r'--only \w+ "([^"]+)"', README)
    ablate = runpy.run_path(str(ROOT / "tests" / "ablate.py"))
    assert names and set(names) <= set(ablate["VARIANTS"])
