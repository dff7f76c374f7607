r"""The page of sample.py --page: its numbers are SEA's, it bears any text and works in a browser.

README's picture, assets/page.png, is made by

    python sample.py --checkpoint data/smollm2 --attention sea --keys-per-query 24 \
        --prompt "$(head -c 469 LICENSE)" --page page.html
    chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --virtual-time-budget=9000 \
        --window-size=1000,1930 --screenshot=assets/page.png \
        "file://$PWD/page.html#layer=16&head=7&token=104"
"""
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
from assets import page as pages
from data.engine import save_checkpoint
from model import Config, Transformer
from sea import block_scores, estimated_attention, moments

# tokens to trip over: tags, halves of a character, controls
ODD = [b"</script>", b"<!--", b"<script>", b" <b>", b"&amp;\"'\\", b"PAGE_DATA", "\u00e9".encode(),
       b"\xf0\x9f", b"\x98", b"\n", b"\tif", b" x:\x01", "\u2028".encode(), "\U0001f600".encode(),
       b" ", b"end"]
CHROMIUM = (shutil.which("chromium") or shutil.which("chromium-browser")
            or shutil.which("google-chrome"))


def small_model(**more):
    """Large weights make its attention uneven, as a trained model's is."""
    torch.manual_seed(0)
    shape = dict(context=256, n_layer=4, n_head=4, n_embd=64, keys_per_query=16, block_size=8,
                 coarse=2)
    model = Transformer(Config(**{**shape, **more})).eval()
    for block in model.layers:
        for linear in (block.self_attn.q_proj, block.self_attn.k_proj):
            torch.nn.init.normal_(linear.weight, std=0.3)
    return model


def run(line, prompt, folder, model, monkeypatch, capsys):
    """Run sample.py on a model in a folder -> exit status, what it printed, its errors."""
    monkeypatch.chdir(folder)
    save_checkpoint(folder / "ckpt.pt", model, tokenizer="bytes", data="none")
    argv = ["sample.py", *line.split(), "--prompt", prompt, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*argv, "--checkpoint", "ckpt.pt"])
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
    pages.write_page(model, OddEncoding(), idx, folder / "page.html", None)
    return model, idx, folder / "page.html"


def data_of(page):
    """What a browser reads: a script ends at the first </script."""
    text = page.read_text(encoding="utf-8").split('<script id="data" type="application/json">')[1]
    return json.loads(re.split("</script", text)[0])


def unpack(packed):
    return np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8)


def head_of(page, layer, head, T, S=8):
    """missed (T), blocks (T, W), keys (T, T), look (T, coarse blocks) of a head, as bytes."""
    content = unpack(data_of(page)["layers"][str(layer)][head])
    pictures, rest = [], content[T:]
    for width in (T // S, T, data_of(page)["n_coarse"]):         # by columns: bits, then bytes
        length = -(-T * width // 8)
        picture = np.unpackbits(rest[:length], count=T * width)
        count = picture.sum()
        picture[picture > 0] = rest[length:length + count]
        rest = rest[length + count:]
        pictures.append(picture.reshape(width, T).T)
    assert len(rest) == 0
    return content[:T], *pictures


def shares(content, steps=127):
    return (content / steps) ** 3


LOST = "missed", "skipped"


def kinds(query, blocks, look, S=8, Z=2):
    """What each block is to a query, by the page's words."""
    own = query // S
    found = ["chosen" if byte > 127 else "missed" for byte in blocks[query, :own]]
    for c in range(own // Z * Z):
        if look[query, c // Z] < 128:
            assert found[c] == "missed"
            found[c] = "skipped"
    found[own - 1:] = ["before", "own"]
    found[0] = "first"
    return found


# ---- the data

def test_the_numbers_are_those_of_sea(written):
    model, idx, page = written
    data, T = data_of(page), idx.shape[1]
    assert list(data["layers"]) == ["0", "1", "2", "3"] and data["heads"] == data["count"] == 4
    assert (data["block_size"], data["n"], data["steps"], data["least"]) == (8, 2, 127, 0.001)
    for layer, head in ((0, 0), (1, 3), (3, 2)):
        missed, blocks, keys, look = head_of(page, layer, head, T)
        seen = model(idx, trace=True).trace[layer]
        shown = estimated_attention(seen.q, seen.k, 8, 16, 2)
        estimate, mask, used = [picture[0, head].detach().numpy() for picture in shown]
        wide = block_scores(seen.q / 4, moments(seen.k, 16), 16)[0, head].softmax(-1).nan_to_num(0)
        assert np.abs(shares(look & 127) - wide.detach().numpy()).max() < 0.013
        assert ((look > 127).sum(-1) == np.minimum(np.arange(T) // 16, 10)).all()
        assert ((blocks > 127) == mask[:, ::8]).all()
        assert np.abs(shares(blocks & 127) - 8 * estimate[:, ::8]).max() < 0.013
        assert np.abs(shares(keys) - used)[mask].max() < 0.013
        assert not keys[used.astype(bool) & (used < 0.0009)].any() and not np.triu(keys, 1).any()

        scores = (seen.q[0, head] @ seen.k[0, head].T / 4).detach().numpy()
        dense = np.tril(np.exp(scores))
        dense /= dense.sum(-1, keepdims=True)
        assert np.abs(shares(keys) - dense)[~mask].max() < 0.013
        assert np.abs(shares(missed) - (dense * ~mask).sum(-1)).max() < 0.013
        assert shares(missed).max() > 0.05                           # there is something to show


def test_thumbnails_hold_the_peaks(written):
    model, idx, page = written
    small = unpack(data_of(page)["glance"]).reshape(4, 4, 32, 32)
    missed, blocks, keys, look = head_of(page, 1, 2, idx.shape[1])
    mask = np.repeat(blocks > 127, 8, 1)
    dense = np.where(mask, shares(keys) * (1 - shares(missed))[:, None], shares(keys))
    used, lost = [(dense * part).reshape(32, 8, 32, 8).max((1, 3)) for part in (mask, ~mask)]
    assert np.abs(shares(small[1, 2] & 127) - np.maximum(used, lost)).max() < 0.03
    sure = np.abs(lost - used) > 0.02
    assert ((small[1, 2] > 127) == (lost > used))[sure].all() and (lost > used)[sure].any()


def test_characters_stay_whole():
    text = "d\u00e9j\u00e0 \u65e5\u672c \U0001f600!"
    single = [bytes([byte]) for byte in text.encode()]
    texts = pages.texts_of(single)
    assert "".join(texts) == text and texts[:4] == ["d", "", "\u00e9", "j"]
    assert texts[7:13] == ["", "", "\u65e5", "", "", "\u672c"]
    assert pages.texts_of([b" \xf0\x9f", b"\x98\x80"]) == [" ", "\U0001f600"]
    assert pages.texts_of([b"a", b"\xf0\x9f"]) == ["a", "\\xf0\\x9f"]


def test_any_text_is_safe(written):
    wanted = pages.texts_of(ODD * 16)
    assert data_of(written[2])["tokens"] == wanted
    assert wanted[6:10] == ["\u00e9", "", "", "\\xf0\\x9f\\x98\n"]
    text = written[2].read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script") == 2 and text.count("<!--") == 1
    assert "http" not in text and " src=" not in text and "@import" not in text


def test_a_page_can_be_mailed(written, tmp_path, monkeypatch):
    assert written[2].stat().st_size < 2_000_000
    monkeypatch.setattr(pages, "ROOM", 1000)
    pages.write_page(written[0], OddEncoding(), written[1], tmp_path / "a.html", None)
    data = data_of(tmp_path / "a.html")                  # nothing fits: the least that there is
    assert (list(data["layers"]), data["steps"], data["least"]) == (["0"], 15, 0.05)


def test_what_fits_is_first_rough_then_left_out():
    picture = torch.rand(64, 64, generator=torch.manual_seed(0)) ** 4
    head = picture.sum(-1) / 99, picture[:, :8] + 2, picture, picture[:, :2]
    layers = {i: [head] for i in (0, 2, 3, 5, 7)}

    def full(steps, least):
        return 5 * len(pages.pack(*head, steps, least))
    for room, wanted in ((full(127, 0.001), (5, 127, 0.001)), (full(127, 0.001) - 1, (5, 31, 0.01)),
                         (full(15, 0.02), (5, 15, 0.02)), (full(15, 0.05), (5, 15, 0.05)),
                         (full(15, 0.05) - 1, (3, 15, 0.03)), (1, (1, 15, 0.05))):
        packed, *detail = pages.pack_what_fits(layers, room)
        assert (len(packed), *detail) == wanted
    assert full(127, 0.001) > full(31, 0.01) > full(15, 0.02) > full(15, 0.05)


# ---- the flags

def test_layers_can_be_chosen(tmp_path, monkeypatch, capsys):
    line = "--page a.html --layers 3 1"
    status, out, _ = run(line, "some text", tmp_path, small_model(), monkeypatch, capsys)
    assert status == 0 and "layers 1 3 of 0 to 3" in out
    assert list(data_of(tmp_path / "a.html")["layers"]) == ["1", "3"]


def test_keys_per_query_and_speed(tmp_path, monkeypatch, capsys):
    means = []
    for number in (8, 40):
        line = f"--page a.html --layers 0 --keys-per-query {number}"
        assert run(line, "some text " * 12, tmp_path, small_model(), monkeypatch, capsys)[0] == 0
        means.append((head_of(tmp_path / "a.html", 0, 1, 120)[1] > 127).mean())
    assert means[1] > means[0] + 0.1
    status, out, err = run("--max-new-tokens 3", "ab", tmp_path, small_model(), monkeypatch, capsys)
    assert status == 0 and out.startswith("ab") and "tokens/s" not in out
    assert re.fullmatch(r"[\d.]+ tokens/s, [\d.]+ GiB\n", err)


def test_a_dense_model_under_another_attention(tmp_path, monkeypatch, capsys):
    model = small_model(attention="dense", architecture="llama", n_kv_head=2)
    line = "--page a.html --attention sea --layers 0"
    status, out, _ = run(line, "some text " * 8, tmp_path, model, monkeypatch, capsys)
    assert status == 0 and len(data_of(tmp_path / "a.html")["layers"]["0"]) == 4


@pytest.mark.parametrize("line, prompt, kind, hint", [
    ("--page a.html", "", "sea", "--prompt"),
    ("--page no/such/a.html", "x", "sea", "no/such/a.html"),
    ("--page .", "x", "sea", "name a file"),
    ("--page a.txt", "x", "sea", "ends in .html"),
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
    real = pages.write_whole

    def late(*args):
        monkeypatch.setattr(os, function, full)                  # the disk is full from here on
        real(*args)
    monkeypatch.setattr(pages, "write_whole", late)
    status, _, err = run("--page a.html", "x", tmp_path, small_model(), monkeypatch, capsys)
    assert status == 2 and "No space left" in err and len(err.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "ckpt.pt"]
    assert (tmp_path / "a.html").read_text() == "the old page"


# ---- in a browser: a script in a copy of the page does what a person would, and leaves notes

VISIT = """
<script>
async function visit() {
  const later = (ms = 300) => new Promise(resolve => setTimeout(resolve, ms));
  const notes = {}, canvases = figures.map(figure => figure.querySelector("canvas"));
  const having = name => groups.flatMap(({span, to}) => span.classList.contains(name) ? [to] : []);
  const choose = (select, value) => { select.value = value;
                                      select.dispatchEvent(new Event("change")) };
  const point = (i, type) => {
    groupOf[i].span.dispatchEvent(new PointerEvent(type, {bubbles: true}));
    return having("picked");
  };
  const press = key => { text.dispatchEvent(new KeyboardEvent("keydown", {key}));
                         return having("picked") };
  const at = (element, type, x, y) => {
    const box = element.getBoundingClientRect();
    element.dispatchEvent(new PointerEvent(type,
      {clientX: box.left + x * box.width, clientY: box.top + y * box.height}));
  };
  const alphas = canvas => [...canvas.getContext("2d").getImageData(0, 100, 256, 1).data]
    .filter((_, i) => i % 4 === 3);
  await later();
  notes.groups = groups.length; notes.text = text.textContent; notes.start = having("picked");
  notes.alphas = canvases.map(alphas);
  const before = canvases.map(canvas => canvas.toDataURL());
  choose(layer, 1);
  choose(head, 3);
  await later();
  notes.changed = canvases.map((canvas, i) => canvas.toDataURL() !== before[i]);
  notes.hovered = point(90, "pointermove"); notes.said = said.textContent;
  notes.kinds = groups.map(({span}) => span.className.split(" ")[1]);
  notes.bars = groups.map(({span}) => +span.style.getPropertyValue("--share"));
  notes.masses = groups.map(({span}) => +span.style.getPropertyValue("--mass"));
  notes.labels = groups.map(({span}) => span.dataset.label).filter(label => label);
  await later(500);
  notes.hash = [location.hash];
  point(250, "pointermove");
  notes.late = groups.map(({span}) => span.className.split(" ")[1]);
  notes.held = [point(60, "click"), point(70, "pointermove")];
  notes.free = [point(60, "click"), point(70, "pointermove")];
  text.focus();
  notes.walk = ["ArrowRight", "ArrowLeft", "ArrowLeft", "Home", "ArrowLeft", "End", "ArrowRight"]
    .map(press);
  notes.outline = getComputedStyle(text).outlineStyle;
  at(canvases[3], "pointermove", 40.5 / T, 90.5 / T);
  notes.named = named.textContent; notes.pair = [having("picked"), having("key")];
  at(canvases[0], "pointermove", 200.5 / T, 90.5 / T);
  notes.unseen = named.textContent;
  at(rows, "pointermove", 64.5 / T, 0.5);
  notes.pointed = rows.title;
  notes.rows = [...rows.getContext("2d").getImageData(0, 0, 256, 5).data]
    .filter((_, i) => i % 4 === 3);
  at(glance, "pointermove", 2.5 / 4, 1.5 / 4);
  notes.title = glance.title;
  at(glance, "click", 2.5 / 4, 1.5 / 4);
  await later(800);
  notes.clicked = [layer.value, head.value]; notes.hash.push(location.hash);
  location.hash = "layer=3&head=0&token=5";
  await later();
  notes.shared = [layer.value, head.value, having("picked"), said.textContent.slice(0, 26)];
  notes.select_labels = [layer, head].map(select => select.labels.length);
  notes.too_wide = document.documentElement.scrollWidth - innerWidth;
  const pixels = glance.getContext("2d").getImageData(0, 0, glance.width, glance.height).data;
  notes.glance = pixels.filter((_, i) => i % 4 === 3 && pixels[i]).length / (pixels.length / 4);
  const note = document.body.appendChild(document.createElement("pre"));
  note.id = "notes"; note.textContent = btoa(encodeURIComponent(JSON.stringify(notes)));
}
addEventListener("load", visit);
</script>
"""


def browse(page, folder):
    """Load a page in a narrow headless Chromium -> the document that it became, its console."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
               "--no-first-run", "--disable-background-networking", "--disable-component-update",
               "--disable-sync", f"--user-data-dir={folder / 'profile'}", "--window-size=500,800",
               "--virtual-time-budget=9000", "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, encoding="utf-8",
                          errors="replace")
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
    T = idx.shape[1]
    assert notes["groups"] == T - 32 and notes["start"] == [T - 1]
    assert notes["text"] == 16 * ("</script><!--<script> <b>&amp;\"'\\PAGE_DATA"
                                  "\u00e9\\xf0\\x9f\\x98"
                                  "\u21b5\n\\x09if x:\\x01\u2028\U0001f600 end")
    missed, blocks, keys, look = head_of(page, 0, 0, T)
    found = kinds(100, blocks, look)
    inside = np.repeat([kind not in LOST for kind in found], 8)[:101]
    seen = np.array([kind not in ("own", "skipped") for kind in found])
    opacity = 255 / 127 * keys[100, :101]
    dense = np.where(inside, opacity * (1 - shares(missed[100])) ** (1 / 3), opacity)
    wanted = dict(estimate=255 / 127 * np.repeat((blocks[100, :13] & 127) * seen, 8)[:101],
                  select=255 * inside, attend=opacity * inside, dense=dense)
    for name, row in zip(wanted, notes["alphas"]):
        assert np.abs(row[:101] - wanted[name]).max() < 0.51 and not any(row[101:]), name
    assert 0.2 < notes["glance"] < 0.6


def test_a_browser_shows_the_steps_of_a_token(notes, written):
    _, idx, page = written
    missed, blocks, keys, look = head_of(page, 1, 3, idx.shape[1])
    ends = [i for i in range(256) if i % 16 not in (7, 8)]           # the characters' last tokens
    found = kinds(90, blocks, look)
    blocks_seen = np.array([kind not in (*LOST, "own") for kind in found])
    bands = np.array(notes["rows"]).reshape(5, 256)      # of token 90: two rows of coarse blocks
    assert not bands[:, 91:].any() and ((bands[1, :96:16] > 0) == np.append(look[90, :5] > 127, 1)).all()
    assert np.abs(bands[0, :80] - np.repeat(255 / 127 * (look[90, :5] & 127), 16)).max() < 0.51
    assert ((bands[3, :91:8] > 0) == (blocks_seen | (np.array(found) == "own"))).all()
    assert all(notes["changed"]) and notes["hovered"] == [90]
    assert notes["kinds"] == [found[i // 8] if i <= 90 else "later" for i in ends]
    assert {"first", "before", "own", "chosen", "missed"} <= set(notes["kinds"])
    late = kinds(250, blocks, look)
    assert notes["late"] == [late[i // 8] if i <= 250 else "later" for i in ends]
    assert "skipped" in late
    wanted = [max(keys[90, i - 2 if i % 16 == 9 else i:i + 1]) / 127 for i in ends]
    assert np.allclose(notes["bars"], wanted)
    mass = [0 if kind == "skipped" else (byte & 127) / 127
            for kind, byte in zip(found, blocks[90, :11])]
    assert np.allclose(notes["masses"], [mass[i // 8] if i < 88 else 0 for i in ends])
    marked = [kind for kind in found if kind not in LOST]
    assert [label.split()[0] for label in notes["labels"] if label[0].isalpha()] == [
        "first", "before", "own"]
    assert len(notes["labels"]) == len(marked)
    count = 8 * (len(marked) - 1) + 90 % 8 + 1
    into = (look[90, :5] > 127).sum() + 1
    assert f"chooses 2 of 11 earlier blocks, looking into {into} of 6 coarse ones; with those" \
        in notes["said"]
    assert f"it uses {count} of 91 keys" in notes["said"]
    assert f"SEA missed {100 * shares(missed[90]):.0f}\u00a0% of its dense" in notes["said"]
    assert f"; {100 * shares(missed).mean():.0f}\u00a0% on average" in notes["said"]
    inside = np.repeat([kind not in LOST for kind in found], 8)[:91]
    for row in (keys[90, :91] * inside, keys[90, :91] * ~inside):    # the largest of each colour
        assert f"({row.argmax()}) {100 * shares(row.max()):.0f}\u00a0%" in notes["said"]


def test_a_browser_names_pairs_and_shares_what_is_shown(notes, written):
    _, blocks, _, look = head_of(written[2], 1, 3, 256)
    assert notes["held"] == [[60], [60]] and notes["free"] == [[60], [70]]
    assert notes["pair"] == [[90], [41]]                             # 40 and 41 are one character
    assert re.match(r"Query .*\(90\), key .*\(40\): in block 5, ", notes["named"])
    assert kinds(90, blocks, look)[5].replace("missed", "not chosen") in notes["named"]
    assert notes["pointed"].startswith(notes["named"][:9]) and "(64): in block 8" in notes["pointed"]
    assert "not seen" in notes["unseen"]
    assert notes["hash"] == ["#layer=1&head=3&token=90", "#layer=2&head=1&token=90"]
    assert notes["clicked"] == ["2", "1"] and notes["title"] == "layer, head: 2,1"
    assert ("attention none, dense" in notes["named"]) == (kinds(90, blocks, look)[5] in LOST)
    assert notes["shared"] == ["3", "0", [5], "Layer 3, head 0. Token \u201cPA"]


def test_a_browser_works_from_the_keyboard_and_on_a_phone(notes):
    assert notes["walk"] == [[73], [70], [69], [0], [0], [255], [255]]
    assert notes["outline"] == "solid" and notes["select_labels"] == [1, 1]
    assert notes["too_wide"] <= 0
