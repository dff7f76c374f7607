"""The page of sample.py --page: it holds the model's pictures, bears any text and works in a browser."""
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from urllib.parse import unquote

import numpy as np
import pytest
import torch

import sample
from data.engine import save_checkpoint
from model import Config, Transformer
from sea import estimated_attention

# tokens to trip over: tags, halves of a character, controls
ODD = [b"</script>", b"<!--", b"<script>", b" <b>", b"&amp;\"'\\", b"PAGE_DATA", "\u00e9".encode(),
       b"\xf0\x9f", b"\x98", b"\n", b"\tif", b" x:\x01", "\u2028".encode(), "\U0001f600".encode(),
       b" ", b"end"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def small_model(**more):
    """Large weights make its attention uneven, as a trained model's is."""
    torch.manual_seed(0)
    shape = dict(context=256, n_layer=4, n_head=4, n_embd=64, keys_per_query=16, block_size=8)
    model = Transformer(Config(**{**shape, **more})).eval()
    for block in model.layers:
        for linear in (block.self_attn.q_proj, block.self_attn.k_proj):
            torch.nn.init.normal_(linear.weight, std=0.3)
    return model


def run(line, prompt, folder, model, monkeypatch, capsys):
    """Run sample.py on a model in a folder -> exit status, what it printed, its errors."""
    monkeypatch.chdir(folder)
    save_checkpoint(folder / "ckpt.pt", model, tokenizer="bytes", data="none")
    monkeypatch.setattr(sys, "argv", ["sample.py", *line.split(), "--prompt", prompt, "--device", "cpu",
                                      "--checkpoint", "ckpt.pt"])
    status = 0
    try:
        sample.main()
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


class OddEncoding:
    def decode_single_token_bytes(self, i):
        return ODD[i]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page of 256 odd tokens: the model, the tokens, the page's path."""
    folder, model = tmp_path_factory.mktemp("page"), small_model()
    idx = torch.arange(16).repeat(16)[None]
    sample.write_page(model, OddEncoding(), idx, folder / "page.html", None)
    return model, idx, folder / "page.html"


def data_of(page):
    """What a browser reads: a script ends at the first </script."""
    text = page.read_text(encoding="utf-8").split('<script id="data" type="application/json">')[1]
    return json.loads(re.split("</script", text)[0])


def shades(packed, T):
    return np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8).reshape(T, T)


# ---- the data

def test_the_pictures_are_those_of_sea(written):
    model, idx, page = written
    data, T = data_of(page), idx.shape[1]
    assert list(data["layers"]) == ["0", "1", "2", "3"] and data["block_size"] == 8
    for layer, head in ((0, 0), (1, 3), (3, 2)):
        shown = data["layers"][str(layer)][head]
        seen = model(idx, trace=True).trace[layer]
        estimate, mask, used = [picture[0, head] for picture in estimated_attention(seen.q, seen.k, 8, 16)]
        for name, picture in (("estimate", estimate), ("used", used), ("mask", mask.float())):
            exact = 255 * picture.detach().numpy().astype(np.float64) ** (1 / 3)
            assert np.abs(exact - shades(shown[name], T)).max() < 0.51
        assert shown["keys"] == mask.sum(-1).tolist()
        dense = (shades(shown["dense"], T) / 255.) ** 3       # used = dense on the mask, normalised
        kept = np.array(shown["kept"])
        assert np.abs((dense * mask.numpy()).sum(-1) - kept).max() < 0.02
        assert np.abs(dense * mask.numpy() - used.detach().numpy() * kept[:, None]).max() < 0.02
        assert np.abs(dense.sum(-1) - 1).max() < 0.02 and not np.triu(dense, 1).any()


def test_the_dense_attention_is_of_the_same_q_and_k(written):
    model, idx, page = written
    with torch.no_grad():
        block, T = model.layers[0], idx.shape[1]
        x = block.self_attn_layer_norm(model.embed_tokens(idx) + model.embed_positions(torch.arange(T) + 2))
        q, k = (linear(x)[0, :, 16:32] for linear in (block.self_attn.q_proj, block.self_attn.k_proj))
        scores = (q @ k.T / 4).masked_fill(torch.ones(T, T).triu(1) > 0, -torch.inf)
    dense = shades(data_of(page)["layers"]["0"][1]["dense"], T)
    assert np.abs(255 * scores.softmax(-1).numpy() ** (1 / 3) - dense).max() < 0.51


def test_any_text_is_safe(written):
    wanted = [token.decode(errors="backslashreplace") for token in ODD] * 16
    assert data_of(written[2])["tokens"] == wanted and wanted[7:9] == ["\\xf0\\x9f", "\\x98"]
    text = written[2].read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script") == 2 and text.count("<!--") == 1
    assert "http" not in text and " src=" not in text and "@import" not in text     # it needs no other file


def test_a_page_can_be_mailed(written, monkeypatch):
    assert written[2].stat().st_size < 2_000_000
    assert sample.layers_that_fit([10, 10, 10]) == [0, 1, 2]
    assert sample.layers_that_fit([700_000] * 12) == [0, 11]
    assert sample.layers_that_fit([9_000_000] * 12) == [0]


# ---- the flags

def test_layers_can_be_chosen(tmp_path, monkeypatch, capsys):
    status, out, _ = run("--page a.html --layers 3 1", "some text", tmp_path, small_model(), monkeypatch,
                         capsys)
    assert status == 0 and "layers 1 3 of 0 to 3" in out
    assert list(data_of(tmp_path / "a.html")["layers"]) == ["1", "3"]


def test_keys_per_query_and_speed(tmp_path, monkeypatch, capsys):
    keys = []
    for number in (8, 40):
        line = f"--page a.html --layers 0 --keys-per-query {number}"
        assert run(line, "some text " * 12, tmp_path, small_model(), monkeypatch, capsys)[0] == 0
        keys.append(np.mean([head["keys"] for head in data_of(tmp_path / "a.html")["layers"]["0"]]))
    assert keys[1] > keys[0] + 4
    status, out, err = run("--max-new-tokens 3", "ab", tmp_path, small_model(), monkeypatch, capsys)
    assert status == 0 and out.startswith("ab") and "tokens/s" not in out
    assert re.fullmatch(r"[\d.]+ tokens/s, [\d.]+ GiB\n", err)


def test_a_dense_model_under_another_attention(tmp_path, monkeypatch, capsys):
    status, out, _ = run("--page a.html --attention sea --layers 0", "some text " * 8, tmp_path,
                         small_model(attention="dense", architecture="llama", n_kv_head=2), monkeypatch, capsys)
    assert status == 0 and len(data_of(tmp_path / "a.html")["layers"]["0"]) == 4


@pytest.mark.parametrize("line, prompt, kind, hint", [
    ("--page a.html", "", "sea", "--prompt"),
    ("--page no/such/a.html", "x", "sea", "no/such/a.html"),
    ("--page .", "x", "sea", "name a file"),
    ("--page a.html --layers 4", "x", "sea", "layers 0 to 3"),
    ("--page a.html --layers -1", "x", "sea", "--layers"),
    ("--layers 1", "x", "sea", "--page"),
    ("--page a.html", "x" * 257, "sea", "257 tokens"),
    ("--page a.html", "x", "dense", "no estimate to show"),
    ("--page a.html", "x", "performer", "no estimate to show"),
    ("--page a.html", "x", "window", "no estimate to show"),
    ("--keys-per-query 4", "x", "dense", "--keys-per-query"),
    ("--keys-per-query 0", "x", "sea", "--keys-per-query"),
])
def test_mistakes_are_one_line(line, prompt, kind, hint, tmp_path, monkeypatch, capsys):
    status, _, err = run(line, prompt, tmp_path, small_model(attention=kind), monkeypatch, capsys)
    assert status == 2 and hint in err and len(err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_page(function, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")
    (tmp_path / "a.html").write_text("the old page")
    real, late = sample.write_whole, lambda *args: monkeypatch.setattr(os, function, full) or real(*args)
    monkeypatch.setattr(sample, "write_whole", late)             # the disk is full from here on
    status, _, err = run("--page a.html", "x", tmp_path, small_model(), monkeypatch, capsys)
    assert status == 2 and "No space left" in err and len(err.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "ckpt.pt"]
    assert (tmp_path / "a.html").read_text() == "the old page"


# ---- in a browser: a script in a copy of the page does what a person would, and leaves notes in the document

VISIT = """
<script>
async function visit() {
  const later = () => new Promise(resolve => setTimeout(resolve, 300));
  const byId = id => document.getElementById(id), spans = [...byId("text").children], notes = {};
  const canvases = [...document.querySelectorAll("figure canvas")];
  const indices = name => spans.flatMap((span, i) => span.classList.contains(name) ? [i] : []);
  const choose = (id, value) => { byId(id).value = value; byId(id).dispatchEvent(new Event("change")) };
  const point = (i, type) => { spans[i].dispatchEvent(new PointerEvent(type, {bubbles: true}));
                               return indices("picked") };
  const press = key => { byId("text").dispatchEvent(new KeyboardEvent("keydown", {key}));
                         return indices("picked") };
  await later();
  notes.tokens = spans.length; notes.text = byId("text").textContent; notes.start = indices("picked");
  notes.pixels = canvases.map(canvas => [...canvas.getContext("2d").getImageData(0, 100, 101, 1).data]);
  notes.palette = palette;
  const before = canvases.map(canvas => canvas.toDataURL());
  choose("layer", 1);
  choose("head", 3);
  await later();
  notes.changed = canvases.map((canvas, i) => canvas.toDataURL() !== before[i]);
  notes.hovered = point(90, "pointermove"); notes.lit = indices("lit"); notes.said = byId("said").textContent;
  notes.figures = [...byId("figures").querySelectorAll("td")].map(cell => cell.textContent);
  choose("shown", "dense"); notes.dense = indices("lit");
  notes.held = [point(60, "click"), point(70, "pointermove")];
  notes.free = [point(60, "click"), point(70, "pointermove")];
  byId("text").focus();
  notes.walk = ["ArrowRight", "ArrowLeft", "ArrowLeft", "Home", "ArrowLeft", "End", "ArrowRight"].map(press);
  notes.outline = getComputedStyle(byId("text")).outlineStyle;
  notes.labels = ["layer", "head", "shown"].map(id => byId(id).labels.length);
  notes.too_wide = document.documentElement.scrollWidth - innerWidth;
  const note = document.body.appendChild(document.createElement("pre"));
  note.id = "notes"; note.textContent = btoa(encodeURIComponent(JSON.stringify(notes)));
}
addEventListener("load", visit);
</script>
"""


def browse(page, folder):
    """Load a page in a narrow headless Chromium -> the document that it became, and what its console said."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--window-size=500,800",
               "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=60, encoding="utf-8", errors="replace")
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def notes(written, tmp_path_factory):
    """What the visitor saw."""
    if CHROMIUM is None:
        pytest.skip("neither chromium nor chromium-browser nor google-chrome is installed")
    folder = tmp_path_factory.mktemp("browser")
    page = written[2].read_text(encoding="utf-8").replace("</body>", VISIT + "</body>")
    (folder / "visited.html").write_text(page, encoding="utf-8")
    document, console = browse(folder / "visited.html", folder)
    assert console == [] and '<pre id="notes">' in document
    note = document.split('<pre id="notes">')[1].split("</pre>")[0]
    return json.loads(unquote(base64.b64decode(note).decode()))


def test_a_browser_shows_the_text_and_the_pictures(notes, written):
    _, idx, page = written
    data, T = data_of(page), idx.shape[1]
    assert notes["tokens"] == T and notes["start"] == [T - 1]
    assert notes["text"] == 16 * ("</script><!--<script> <b>&amp;\"'\\PAGE_DATA\u00e9\\xf0\\x9f\\x98"
                                  "\u21b5\n\\x09if x:\\x01\u2028\U0001f600 end")
    for name, row in zip(("estimate", "mask", "used", "dense"), notes["pixels"]):
        shown, wanted = np.array(row).reshape(101, 4), shades(data["layers"]["0"][0][name], T)[100, :101]
        end = 96 if name == "estimate" else 101                     # its own block is not estimated
        assert (shown[:end, 3] == 255).all() and (shown[end:, 3] == 0).all()
        assert (shown[:end, :3] == np.array(notes["palette"])[wanted[:end]]).all()
    lightness = np.array(notes["palette"]) @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(lightness) <= 0.5).all() and lightness[0] - lightness[-1] > 200


def test_a_browser_chooses_heads_and_tokens(notes, written):
    _, idx, page = written
    head, T = data_of(page)["layers"]["1"][3], idx.shape[1]
    used = shades(head["used"], T)[90]
    assert all(notes["changed"]) and notes["hovered"] == [90] and notes["lit"] == used.nonzero()[0].tolist()
    assert notes["dense"] == shades(head["dense"], T)[90].nonzero()[0].tolist() != notes["lit"]
    assert f"uses {head['keys'][90]} of 91 keys" in notes["said"]
    assert f"({used.argmax()}) {100 * (used.max() / 255) ** 3:.0f}" in notes["said"]
    keys, kept = head["keys"], [100 * share for share in head["kept"]]
    assert notes["figures"][3:6] == [f"{np.mean(keys):.3g}", "128.5", f"{np.mean(kept):.0f}\u00a0%"]
    assert notes["figures"][6:] == [str(keys[90]), "91", f"{kept[90]:.0f}\u00a0%"]
    assert notes["held"] == [[60], [60]] and notes["free"] == [[60], [70]]


def test_a_browser_works_from_the_keyboard_and_on_a_phone(notes):
    assert notes["walk"] == [[71], [70], [69], [0], [0], [255], [255]]
    assert notes["outline"] == "solid" and notes["labels"] == [1, 1, 1] and notes["too_wide"] <= 0
