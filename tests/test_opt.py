"""OPT's weights, tokenizer and data: as in transformers (make_golden.py's files, or live); and mistakes."""
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data import common, hub
from data.common import encoding, load
from data.hub import OPTEncoding
from model import OPT, POSITION_OFFSET, OPTConfig

GOLDEN = Path(__file__).parent / "golden"
ARCHITECTURES = "125m", "350m", "2.7b"       # pre-norm; post-norm with projections; D = 80 and two shards
SEA = dict(attention="sea", map_width=16, query_block=4, num_features=8)


def same_as_transformers(folder):
    """Logits and every hidden state of the model in a folder, within 1e-4 of its expected.pt."""
    expected = torch.load(folder / "expected.pt", weights_only=True)
    model, hidden = OPT.from_pretrained(folder).eval(), []
    model.layers[0].register_forward_pre_hook(lambda layer, args: hidden.append(args[0]))
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, args, out: hidden.append(out))
    with torch.no_grad():
        logits, _ = model(expected["idx"])
    assert expected["hidden"].std() > 0.5 and expected["logits"].std() > 0.5    # not a comparison of zeros
    assert len(hidden) == len(expected["hidden"]) == model.config.n_layer + 1
    torch.testing.assert_close(torch.stack(hidden), expected["hidden"], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)


@pytest.fixture(scope="session")
def live(tmp_path_factory):
    """A folder as tests/golden, made now and larger: by a process that does not see this repository, because
    transformers takes our kernels.py for a package that it knows."""
    if not (importlib.util.find_spec("transformers") and importlib.util.find_spec("tokenizers")):
        pytest.skip("transformers and tokenizers are not installed")
    folder = tmp_path_factory.mktemp("live")
    script = Path(__file__).with_name("make_golden.py")
    subprocess.run([sys.executable, script, folder, "--scale", "2"], check=True)
    return folder


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_golden(name):
    same_as_transformers(GOLDEN / name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_live(live, name):
    same_as_transformers(live / name)


def test_defaults_are_a_pre_norm_decoder_without_projections():
    model = OPT(OPTConfig(n_layer=1, n_head=2, n_embd=16, attention="dense", context=8))
    assert sum(p.numel() for p in model.parameters()) == 256 * 16 + 10 * 16 + 12 * 16 * 16 + 13 * 16 + 2 * 16
    assert not any("project" in name for name in model.state_dict())


# ------------------------------------------------------------------------------------------------------------
# Positions and vocabulary

def test_positions_start_at_row_2():
    model, idx = OPT.from_pretrained(GOLDEN / "125m").eval(), torch.arange(8)[None]
    before = model(idx)[0]
    model.embed_positions.weight.data[:POSITION_OFFSET] = torch.nan
    assert torch.equal(model(idx)[0], before)
    model.embed_positions.weight.data[POSITION_OFFSET] += 1
    assert not torch.allclose(model(idx)[0][:, 0], before[:, 0])


def test_neighbours_start_alike():
    torch.manual_seed(0)
    config = OPTConfig(n_layer=1, n_head=1, n_embd=64, context=256, attention="dense")
    table = torch.nn.functional.normalize(OPT(config).embed_positions.weight)
    alike = table @ table.T                            # cosines
    assert alike.diag(1).min() > 0.9 and alike.diag(64).max() < 0.8


def test_vocabulary_is_padded():
    enc, golden = encoding("opt", GOLDEN / "125m"), json.loads((GOLDEN / "125m" / "texts.json").read_text())
    model, idx = OPT.from_pretrained(GOLDEN / "125m"), torch.load(GOLDEN / "125m" / "expected.pt")["idx"]
    ids = [enc.bos, *enc.encode_ordinary(golden["texts"][10])][:idx.shape[1]]
    assert idx[0].tolist() == ids                      # test_golden has the logits of this text
    assert max(ids) < enc.n_vocab < model.config.vocab_size == model(idx)[0].shape[-1]


def test_longer_context_interpolates_and_says_so(capsys):
    short = OPT.from_pretrained(GOLDEN / "350m")
    assert capsys.readouterr().out == ""
    model = OPT.from_pretrained(GOLDEN / "350m", context=63)
    assert "32" in (said := capsys.readouterr().out) and "63" in said and "interpolated" in said
    old, new = short.embed_positions.weight, model.embed_positions.weight
    assert model.config.context == 63 and new.shape[0] == 63 + POSITION_OFFSET and new.requires_grad
    assert torch.equal(old[:POSITION_OFFSET], new[:POSITION_OFFSET])
    old, new = old[POSITION_OFFSET:], new[POSITION_OFFSET:]
    torch.testing.assert_close(new[::2], old)          # 63 = 2 * 32 - 1: every old row, and the means between
    torch.testing.assert_close(new[1::2], (old[1:] + old[:-1]) / 2)
    assert model(torch.zeros(1, 63, dtype=torch.long))[0].isfinite().all()


def test_shorter_context_keeps_the_first_positions(capsys):
    idx = torch.arange(12)[None]
    model = OPT.from_pretrained(GOLDEN / "125m", context=12)
    assert torch.equal(model(idx)[0], OPT.from_pretrained(GOLDEN / "125m")(idx)[0])
    assert capsys.readouterr().out == "" and model.config.context == 12
    with pytest.raises(ValueError, match="context"):
        OPT.from_pretrained(GOLDEN / "125m", context=0)


# ------------------------------------------------------------------------------------------------------------
# Other attentions than the file's

@pytest.mark.parametrize("attention", ["dense", "sea", "performer", "window"])
def test_other_attentions_keep_the_published_weights(attention):
    dense, expected = OPT.from_pretrained(GOLDEN / "125m"), torch.load(GOLDEN / "125m" / "expected.pt")
    model = OPT.from_pretrained(GOLDEN / "125m", **{**SEA, "attention": attention}, keys_per_query=8)
    weights = model.state_dict()
    assert all(torch.equal(weights[name], p) for name, p in dense.state_dict().items())
    assert not any(p.is_meta for p in weights.values()) and all(p.requires_grad for p in model.parameters())
    model(expected["idx"], expected["idx"])[1].backward()


def test_sea_starts_as_its_teacher():
    expected = torch.load(GOLDEN / "125m" / "expected.pt")
    model = OPT.from_pretrained(GOLDEN / "125m", **SEA, keys_per_query=32).eval()
    gates = [block.self_attn.attention.gates for block in model.layers]
    assert all((gate.bias == 5).all() and (gate.weight == 0).all() for gate in gates)
    for gate in gates:
        gate.bias.data += 20                       # sigmoid(25) = 1: attention alone, and to the whole past
    torch.testing.assert_close(model(expected["idx"])[0], expected["logits"], atol=1e-3, rtol=0)


# ------------------------------------------------------------------------------------------------------------
# Mistakes: one sentence each

def change_config(**fields):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return change


def change_weights(change):
    def apply(folder):
        weights = torch.load(folder / "pytorch_model.bin")
        change(weights)
        torch.save(weights, folder / "pytorch_model.bin")
    return apply


def cut(file, share):
    def apply(folder):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[:int(share * len(content))])
    return apply


NORM, FC1 = "model.decoder.final_layer_norm.bias", "model.decoder.layers.1.fc1.weight"
MISTAKES = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda folder: (folder / "pytorch_model.bin").unlink(), "has no pytorch_model.bin"),
    "cut config": (cut("config.json", 0.5), "config.json is damaged"),
    "empty weights": (cut("pytorch_model.bin", 0), "is cut off"),
    "cut weights": (cut("pytorch_model.bin", 0.6), "is cut off"),
    "almost whole weights": (cut("pytorch_model.bin", 0.999), "is cut off"),
    "a list": (lambda folder: torch.save([1, 2], folder / "pytorch_model.bin"), "holds no weights"),
    "missing key": (change_weights(lambda w: w.pop(NORM)), "final_layer_norm.bias is missing"),
    "extra key": (change_weights(lambda w: w.update({"decoder.x": torch.ones(3)})), "x is .3,. .* be absent"),
    "wrong shape": (change_weights(lambda w: w.update({FC1: torch.ones(2, 32)})), r"fc1.weight is \(2, 32\)"),
    "untied head": (change_weights(lambda w: w.update({"lm_head.weight": torch.ones(3)})), "lm_head"),
    "wrong model": (change_config(model_type="llama"), "model_type 'llama'"),
    "wrong activation": (change_config(activation_function="gelu"), "activation_function 'gelu'"),
    "wrong MLP": (change_config(ffn_dim=100), "ffn_dim 100"),
    "no biases": (change_config(enable_bias=False), "enable_bias False"),
    "wrong size": (change_config(hidden_size=48, ffn_dim=192), "does not fit config.json.* and [0-9]+ more"),
    "wrong norm": (change_config(do_layer_norm_before=False), "final_layer_norm.* be absent"),
    "no sizes": (lambda folder: (folder / "config.json").write_text("{}"), "does not say model_type"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(tmp_path, mistake):
    folder, (change, said) = shutil.copytree(GOLDEN / "125m", tmp_path / "model"), MISTAKES[mistake]
    change(folder)
    with pytest.raises(ValueError, match=said) as error:
        OPT.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_missing_shard(tmp_path):
    folder = shutil.copytree(GOLDEN / "2.7b", tmp_path / "model")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match="has no pytorch_model-00002-of-00002.bin"):
        OPT.from_pretrained(folder)


def test_unknown_name():
    with pytest.raises(ValueError, match="there is no folder facebook/opt-13b; .*facebook/opt-125m"):
        OPT.from_pretrained("facebook/opt-13b")


@pytest.mark.parametrize("name, golden", [("facebook/opt-125m", "125m"), ("facebook/opt-6.7b", "2.7b")])
def test_download(tmp_path, monkeypatch, name, golden):
    """By name, from a mirror: file:// here. What was downloaded is used again; what failed leaves nothing."""
    monkeypatch.setattr(hub, "CACHE", tmp_path)
    with pytest.raises(ValueError, match="could not download file:///nowhere/config.json"):
        OPT.from_pretrained(name, url="file:///nowhere")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    first = OPT.from_pretrained(name, url=(GOLDEN / golden).as_uri()).state_dict()
    again = OPT.from_pretrained(name, url="file:///nowhere").state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)


# ------------------------------------------------------------------------------------------------------------
# The tokenizer

def same_ids(folder):
    """The ids of folder/texts.json, and back; </s> is in front of them."""
    enc, expected = encoding("opt", folder), json.loads((folder / "texts.json").read_text())
    assert enc.n_vocab == expected["n_vocab"] and len(expected["texts"]) > 20
    for text, ids in zip(expected["texts"], expected["ids"], strict=True):
        assert [enc.bos, *enc.encode_ordinary(text)] == ids
        assert enc.decode(ids) == "</s>" + text
        assert b"".join(map(enc.decode_single_token_bytes, ids[1:])) == text.encode()


def test_token_ids():
    same_ids(GOLDEN / "125m")


def test_token_ids_live(live):
    same_ids(live / "125m")


def test_published_token_ids():
    """The ids that transformers' own tests expect of OPT's published files, where these are in the cache."""
    folder = hub.CACHE / "facebook" / "opt-125m"
    if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
        pytest.skip(f"{folder} has no vocab.json and merges.txt")
    enc = encoding("opt", folder)
    assert enc.n_vocab == 50265 and enc.encode_ordinary("A photo of a cat") == [250, 1345, 9, 10, 4758]


def test_ids_without_a_merge_are_an_error():
    enc = encoding("opt", GOLDEN / "125m")
    for i in (enc.n_vocab - 1, enc.n_vocab, 50271, -1):            # the first one is a name, madeupword0002
        with pytest.raises(ValueError, match=f"{i} is not the id"):
            enc.decode([enc.bos, i])
        with pytest.raises(ValueError, match=f"{i} is not the id"):
            enc.decode_single_token_bytes(i)


def keep_lines(path, count):
    path.write_text("\n".join(path.read_text(encoding="utf-8").split("\n")[:count]), encoding="utf-8")


def change_vocab(change):
    def apply(folder):
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        change(vocab)
        (folder / "vocab.json").write_text(json.dumps(vocab))
    return apply


@pytest.mark.parametrize("change, said", [
    (change_vocab(lambda vocab: vocab.pop("\u0120t")), "does not number"),             # a merge without an id
    (change_vocab(lambda vocab: vocab.update({"<unk>": 7})), "does not number"),
    (change_vocab(lambda vocab: [vocab.pop(name) for name in OPTEncoding.SPECIAL]), "does not number"),
    (cut("vocab.json", 0.5), "damaged"), (cut("merges.txt", 0.5001), "damaged|does not number"),
    (lambda folder: keep_lines(folder / "merges.txt", 100), "does not number"),
    (lambda folder: (folder / "merges.txt").write_text("a b c\n"), "damaged"),
    (lambda folder: (folder / "merges.txt").unlink(), "has no merges.txt"),
])
def test_damaged_tokenizer(tmp_path, capsys, change, said):
    folder = shutil.copytree(GOLDEN / "125m", tmp_path / "model")
    change(folder)
    with pytest.raises(SystemExit, match="2"):
        encoding("opt", folder)
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------
# data/wikitext2.py, in a copy of data/

TEXTS = {"train": "the first article = \n" * 30, "valid": "a = \n" * 10, "test": "naïve 日本 \n" * 5}


def wikitext2(folder, *flags):
    """Run the script in folder/data, on a zip that this makes -> the finished process."""
    (folder / "data").mkdir(exist_ok=True)
    for script in Path(common.__file__).parent.glob("*.py"):
        shutil.copy(script, folder / "data")
    with zipfile.ZipFile(folder / "wikitext.zip", "w") as archive:
        for name, text in TEXTS.items():
            archive.writestr(f"wikitext-2-raw/wiki.{name}.raw", text)
    script = folder / "data" / "wikitext2.py"
    return subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)


def test_wikitext2(tmp_path, monkeypatch):
    done = wikitext2(tmp_path, "--url", (tmp_path / "wikitext.zip").as_uri(), "--opt-folder", GOLDEN / "125m")
    assert done.returncode == 0 and "to test (opt)" in done.stdout, done.stderr
    monkeypatch.setattr(common, "FOLDER", tmp_path / "data")
    (train, val, meta), (test, same) = load("wikitext2"), load("wikitext2", split="test")
    enc = encoding("opt", GOLDEN / "125m")
    for tokens, text in zip((train, val, test), TEXTS.values()):
        assert tokens.dtype == np.uint16 and enc.decode(tokens.tolist()) == text
    assert meta == same and meta["tokens"] == {"train": len(train), "val": len(val), "test": len(test)}
    assert meta["vocab_size"] == enc.n_vocab and meta["tokenizer"] == "opt"
    with pytest.raises(SystemExit):
        load("wikitext2", split="dev")


def test_wikitext2_by_bytes(tmp_path, monkeypatch):
    url = (tmp_path / "wikitext.zip").as_uri()
    assert wikitext2(tmp_path, "--url", url, "--tokenizer", "bytes").returncode == 0
    monkeypatch.setattr(common, "FOLDER", tmp_path / "data")
    assert bytes(load("wikitext2", split="test")[0].tolist()).decode() == TEXTS["test"]


def test_wikitext2_mistakes(tmp_path):
    zipped = (tmp_path / "wikitext.zip").as_uri()
    for url, said in (("file:///nowhere.zip", "could not download"), (Path(__file__).as_uri(), "is damaged")):
        done = wikitext2(tmp_path, "--url", url, "--tokenizer", "bytes")
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    (tmp_path / "data" / "wikitext2" / "wikitext-2-raw-v1.zip").unlink()          # as the message asks
    done = wikitext2(tmp_path, "--url", zipped, "--opt-folder", tmp_path)
    assert done.returncode == 2 and "has no vocab.json" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "data" / "wikitext2" / "meta.json").exists()
