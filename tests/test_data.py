"""Files of others: GGUF, safetensors, pickles, downloads, tokenizers, Wikipedia; two writers."""
import http.server
import json
import pickle
import random
import shutil
import signal
import struct
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import common, download, gguf, hub, safetensors, smollm2, text, wikipedia
from data.markup import clean

GOLDEN = Path(__file__).parent / "golden" / "tokenizer"
WEIGHTS = {"model.embed_tokens.weight": torch.arange(12.).view(4, 3) / 7,
           "model.norm.weight": torch.tensor([1.5, -2., 3e-5]).bfloat16(),
           "model.layers.0.x.weight": torch.tensor([[0.1, 65504.]]).half()}
SHAPES = {"embed_tokens.weight": (4, 3), "norm.weight": (3,), "layers.0.x.weight": (1, 2)}


def write_safetensors(path, weights):
    with open(path, "wb") as file:
        safetensors.write(file, weights)


def finder(folder):
    return lambda file: hub.model_file(folder, file)


def same_weights(folder, weights=WEIGHTS):
    read = hub.read_weights(finder(folder), SHAPES)
    assert read.keys() == SHAPES.keys()
    for name, weight in weights.items():
        assert read[name.removeprefix("model.")].dtype == torch.float32
        assert torch.equal(read[name.removeprefix("model.")], weight.float())


# --------------------------------------------------------------------------------------------------
# Weights

def test_safetensors_round_trip(tmp_path):
    write_safetensors(tmp_path / hub.SAFE, WEIGHTS)
    same_weights(tmp_path)


def test_a_header_of_odd_length(tmp_path):
    header = b'{"norm.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  '
    content = struct.pack("<Q", len(header)) + header + np.float32([1, 2]).tobytes()
    (tmp_path / hub.SAFE).write_bytes(content)
    read = hub.read_weights(finder(tmp_path), {"norm.weight": (2,)})
    assert len(header) % 4 and read["norm.weight"].tolist() == [1, 2]


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_new_and_old(tmp_path, zipped):
    torch.save(WEIGHTS, tmp_path / hub.BIN, _use_new_zipfile_serialization=zipped)
    same_weights(tmp_path)


@pytest.mark.parametrize("index, suffix", [(hub.SAFE_INDEX, "safetensors"), (hub.INDEX, "bin")])
def test_shards(tmp_path, index, suffix):
    weight_map = {}
    for n, (name, weight) in enumerate(WEIGHTS.items()):
        weight_map[name] = f"part-{n}.{suffix}"
        path = tmp_path / weight_map[name]
        if suffix == "safetensors":
            write_safetensors(path, {name: weight})
        else:
            torch.save({name: weight}, path)
    (tmp_path / index).write_text(json.dumps(dict(weight_map=weight_map)))
    same_weights(tmp_path)
    (tmp_path / f"part-1.{suffix}").unlink()
    with pytest.raises(ValueError, match="has no part-1"):
        same_weights(tmp_path)


def test_a_tied_head_is_dropped_and_must_be_equal(tmp_path):
    head = WEIGHTS["model.embed_tokens.weight"]
    write_safetensors(tmp_path / hub.SAFE, {**WEIGHTS, "lm_head.weight": head})
    same_weights(tmp_path)
    read = hub.read_weights(finder(tmp_path), {**SHAPES, "lm_head.weight": (4, 3)})
    assert torch.equal(read["lm_head.weight"], head)
    write_safetensors(tmp_path / hub.SAFE, {**WEIGHTS, "lm_head.weight": head + 1})
    with pytest.raises(ValueError, match="lm_head.weight is not embed_tokens.weight"):
        same_weights(tmp_path)


def test_a_shape_is_compared_before_anything_is_allocated(tmp_path):
    """A view of one number as 4 TB of them is 1 kB in a file."""
    torch.save({**WEIGHTS, "model.norm.weight": torch.ones(1).expand(10 ** 12)}, tmp_path / hub.BIN)
    with pytest.raises(ValueError, match=r"norm.weight is \(1000000000000,\)"):
        same_weights(tmp_path)


class Evil:
    def __reduce__(self):
        return print, ("run",)


def compressed(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10 ** 6))


OTHER_KINDS = {
    "pointer": (hub.BIN, lambda path: path.write_text("version https://git-lfs.github.com/spec"),
                "a Git LFS pointer"),
    "page": (hub.SAFE, lambda path: path.write_text("<!doctype html><title>404</title>"),
             "a web page"),
    "safetensors": (hub.BIN, lambda path: write_safetensors(path, WEIGHTS),
                    "a safetensors file"),
    "zip": (hub.SAFE, lambda path: torch.save(WEIGHTS, path), "a zip, as torch.save"),
    "code": (hub.BIN, lambda path: path.write_bytes(pickle.dumps(Evil(), 2)), "more than tensors"),
    "int8": (hub.BIN, lambda path: torch.save({"norm.weight": torch.ones(3).char()}, path),
             "torch.int8"),
    "list": (hub.BIN, lambda path: torch.save([1], path), "whole but holds no weights"),
    "zip bomb": (hub.BIN, compressed, "more than its size"),
}


@pytest.mark.parametrize("case", OTHER_KINDS)
def test_another_kind_of_file_is_named(tmp_path, capsys, case):
    file, write, said = OTHER_KINDS[case]
    write(tmp_path / file)
    shapes = {"norm.weight": (3,)} if case == "int8" else SHAPES
    with pytest.raises(ValueError, match=said) as error:
        hub.read_weights(finder(tmp_path), shapes)
    assert "\n" not in str(error.value) and "cut off" not in str(error.value)
    assert capsys.readouterr().out == ""


def entry(**changes):
    return {"norm.weight": dict(dtype="F32", shape=[2], data_offsets=[0, 8]) | changes}


@pytest.mark.parametrize("header, said", [
    (entry(data_offsets=[0, 2 ** 62]), "not .2."), (entry(data_offsets=[-8, 0]), "-8"),
    (entry(shape=[2 ** 40, 2 ** 40]), "bytes, which are not"),
    (entry(shape="ab"), "damaged header"),
    (entry(shape=[2 ** 61], data_offsets=[0, 2 ** 63 - 4]), "bytes, which are not"),
    (entry(data_offsets=[8, 16]), "overlap or leave gaps"), (entry(dtype="F8_E4M3"), "F8_E4M3"),
    (entry() | {"b": entry()["norm.weight"]}, "overlap"), ([1], "damaged header"),
    ({}, "bytes of no tensor"),
    (entry(shape=[200], data_offsets=[0, 800]), "is cut off"), ({"a": 1}, "damaged header"),
])
def test_lying_headers(tmp_path, header, said):
    content = json.dumps(header).encode()
    (tmp_path / hub.SAFE).write_bytes(struct.pack("<Q", len(content)) + content + bytes(8))
    with pytest.raises(ValueError, match=said) as error:
        hub.read_weights(finder(tmp_path), {"norm.weight": (2,)})
    assert "\n" not in str(error.value)


def damage(content, rng):
    """Cut, or with bytes changed, or with a number near the start made huge."""
    content = bytearray(content)
    kind = rng.randrange(3)
    if kind == 0:
        return content[:rng.randrange(len(content))]
    if kind == 1:
        for _ in range(rng.randrange(1, 9)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        return content
    at = rng.randrange(min(200, len(content) - 8))
    content[at:at + 8] = struct.pack("<Q", rng.choice([2 ** 31, 2 ** 40, 2 ** 63, 2 ** 64 - 1]))
    return content


def test_random_attack(tmp_path):
    """Every damaged file is read or refused by a ValueError."""
    write_safetensors(tmp_path / hub.SAFE, WEIGHTS)
    torch.save(WEIGHTS, tmp_path / hub.BIN)
    torch.save(WEIGHTS, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    values = np.ones(4, "<f4").tobytes()
    write_gguf(tmp_path / "x.gguf", {"key": 7, "list": ["a", "b"]}, {"t": (0, [4], values)})
    readers = {hub.SAFE: safetensors.read, hub.BIN: hub.read_pickle, "old.bin": hub.read_pickle,
               "x.gguf": gguf.read}
    rng = random.Random(0)
    refused = 0
    for file, read in readers.items():
        content = (tmp_path / file).read_bytes()
        for _ in range(40):
            path = tmp_path / f"damaged-{file}"
            path.unlink(missing_ok=True)               # mapped files are not written into
            path.write_bytes(damage(content, rng))
            try:
                read(path)
            except ValueError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 60


# --------------------------------------------------------------------------------------------------
# config.json

LLAMA = dict(model_type="llama", vocab_size=96, max_position_embeddings=64, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=48,
             rms_norm_eps=1e-5, rope_theta=100000.0, tie_word_embeddings=True)


def read_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    return hub.read_config(folder / "config.json")


def test_llama_config(tmp_path):
    expected = dict(architecture="llama", vocab_size=96, context=64, n_layer=2, n_head=4,
                    n_kv_head=2, n_embd=32, n_ffn=48, rope_base=100000.0, norm_eps=1e-5, tied=True)
    assert read_config(tmp_path) == expected
    new = dict(rope_parameters=dict(rope_theta=5e4, rope_type="default"), head_dim=8)
    assert read_config(tmp_path, **new)["rope_base"] == 5e4


@pytest.mark.parametrize("changes, said", [
    (dict(rope_scaling=dict(type="linear", factor=2)), "rope_scaling {'type': 'linear'"),
    (dict(rope_parameters=dict(rope_type="llama3", rope_theta=1)), "llama3"),
    (dict(attention_bias=True), "attention_bias True"), (dict(mlp_bias=True), "mlp_bias True"),
    (dict(head_dim=16), "head_dim 16"), (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
    (dict(num_key_value_heads=3), "n_kv_head 3 does not divide"),
    (dict(model_type="mamba"), "'mamba'"),
    (dict(num_hidden_layers=10 ** 9), "n_layer"), (dict(hidden_size="32"), "'32' for n_embd"),
    (dict(vocab_size=True), "vocab_size"), (dict(rope_theta=-1), "rope_base"),
    (dict(quantization_config=dict(bits=4)), "quantization_config"),
    (dict(rope_scaling=[1]), "rope_scaling"),
])
def test_what_is_not_built_is_refused_by_name(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said) as error:
        read_config(tmp_path, **changes)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# Downloads

class Ranges(http.server.BaseHTTPRequestHandler):
    """A server that breaks each reply off after `most` bytes; with `ranges` it does ranges."""
    content = random.Random(1).randbytes(300_000)
    most = 120_000
    ranges = True
    asked = []

    def do_GET(self):
        if self.path != "/file":
            return self.send_error(404)
        start = 0
        self.asked.append(self.headers.get("Range"))
        if self.headers.get("Range") and self.ranges and self.headers["If-Range"] == '"v1"':
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("ETag", '"v1"')
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:start + self.most])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "WAITS", (0, 0, 0))
    monkeypatch.setattr(Ranges, "asked", [])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}/file"
        running.shutdown()


def test_a_broken_download_goes_on(tmp_path, server):
    download.fetch(server, tmp_path / "file", "walk")
    assert (tmp_path / "file").read_bytes() == Ranges.content
    assert Ranges.asked == [None, "bytes=120000-", "bytes=240000-"]
    assert len(list(tmp_path.iterdir())) == 1


def test_the_next_run_goes_on_too(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download, "WAITS", (0,))
    for _ in range(2):
        with pytest.raises(ValueError, match="breaks off again and again.*or walk"):
            download.fetch(server, tmp_path / "file", "walk")
    download.fetch(server, tmp_path / "file", "walk")
    assert (tmp_path / "file").read_bytes() == Ranges.content and len(list(tmp_path.iterdir())) == 1


def test_a_server_without_ranges_is_asked_from_the_start(tmp_path, server, monkeypatch):
    monkeypatch.setattr(Ranges, "ranges", False)
    with pytest.raises(ValueError, match="breaks off"):
        download.fetch(server, tmp_path / "file", "walk")
    monkeypatch.setattr(Ranges, "most", 10 ** 6)
    download.fetch(server, tmp_path / "file", "walk")
    assert (tmp_path / "file").read_bytes() == Ranges.content


def test_what_is_not_there_is_missing(tmp_path, server):
    with pytest.raises(download.Missing, match="404"):
        download.fetch(server + "2", tmp_path / "file", "walk")
    assert not list(tmp_path.iterdir())


def test_the_endpoint_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "CACHE", tmp_path / "cache")
    folder = tmp_path / "HuggingFaceTB" / "SmolLM2-135M" / "resolve" / "main"
    folder.mkdir(parents=True)
    torch.save(WEIGHTS, folder / hub.BIN)
    monkeypatch.setenv("HF_ENDPOINT", tmp_path.as_uri() + "/")
    same_weights("HuggingFaceTB/SmolLM2-135M")
    monkeypatch.setenv("HF_ENDPOINT", "file:///nowhere")
    same_weights("HuggingFaceTB/SmolLM2-135M")               # from the cache, asking for nothing


def test_a_file_is_no_folder():
    with pytest.raises(ValueError, match="is a file; name the folder"):
        hub.model_file(__file__, "config.json")


# --------------------------------------------------------------------------------------------------
# Writing

def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "file"
    common.write_whole(path, b"c" * 100_000)

    def write(letter):
        for _ in range(30):
            common.write_whole(path, letter * 100_000)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        content = path.read_bytes()
        assert len(content) == 100_000 and len(set(content)) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_the_embedded_data_set_is_prepared_where_it_is_missing(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(common, "FOLDER", tmp_path)
    monkeypatch.setattr(common.subprocess, "run", lambda x: commands.append(x) or SimpleNamespace(returncode=2))
    with pytest.raises(SystemExit, match="2"):
        common.prepare_stdlib()
    assert [Path(command[-1]).name for command in commands] == ["stdlib.py"]
    common.write_whole(common.make_folder("stdlib") / "meta.json", b"{}")
    common.prepare_stdlib()
    assert len(commands) == 1


@pytest.mark.parametrize("write", [lambda file: file.write(bytes(10 ** 6)),
                                   lambda file: torch.save(torch.zeros(10 ** 6), file)],
                         ids=["bytes", "torch.save"])
def test_a_full_disk_names_itself(write, tmp_path, capsys):
    """torch.save says `unexpected pos` of it; here a file may have 50 kB."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(SystemExit, match="2"), common.whole_file(tmp_path / "file") as file:
            write(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert said.count("File too large") == said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_sigterm_leaves_no_half_file(tmp_path):
    @common.any_output()
    def main():
        with common.whole_file(tmp_path / "file") as file:
            file.write(b"half of it")
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        main()
    assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGTERM) is before


def test_folders_and_files_confused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "FOLDER", tmp_path)
    (tmp_path / "taken").write_text("a file")
    for action in (lambda: common.write("taken", dict(train="a", val="b"), "bytes", "a test"),
                   lambda: common.write_whole(tmp_path, b"x"), lambda: text.read(tmp_path)):
        with pytest.raises(SystemExit, match="2"):
            action()
        assert capsys.readouterr().err.count("\n") == 1


def run(script, line, monkeypatch, capsys):
    """Call a script's main -> its exit status and what it wrote to stderr."""
    monkeypatch.setattr(sys, "argv", [Path(script.__file__).name, *line.split()])
    status = 0
    try:
        script.main()
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_another_text_does_not_replace_a_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "FOLDER", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("one text " * 20)
    Path("b.txt").write_text("another " * 20)
    shutil.copytree(GOLDEN, "data/smollm2")
    for line in ("a.txt", "a.txt", "b.txt --name other"):
        assert run(text, line, monkeypatch, capsys) == (0, "")
    before = content(Path("data/text"))
    for line, said in (("b.txt", "source was 'a.txt', now 'b.txt'"),
                       ("a.txt --tokenizer smollm2", "tokenizer was 'bytes', now 'smollm2'")):
        status, err = run(text, line, monkeypatch, capsys)
        assert status == 2 and said in err and "--overwrite" in err and err.count("\n") == 1
        assert content(Path("data/text")) == before
    assert run(text, "b.txt --overwrite", monkeypatch, capsys) == (0, "")
    assert common.load("text")[2]["source"] == "b.txt"
    for damaged in ("", "{}", "[]"):
        Path("data/text/meta.json").write_text(damaged)
        assert run(text, "a.txt", monkeypatch, capsys) == (0, "")


def test_byte_order_marks_and_utf_16(tmp_path, capsys):
    path = tmp_path / "text"
    path.write_bytes("\ufeffnaïve".encode())
    assert text.read(path) == "naïve"
    for content in ("plain text".encode("utf-16"), "plain text".encode("utf-16-le")):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match="2"):
            text.read(path)
        assert "iconv" in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_only_data_sets_are_offered(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        common.load("nothing")
    offered = capsys.readouterr().err.split("one of ")[1].strip().split(", ")
    assert offered == ["shakespeare", "stdlib", "text", "wikipedia", "wikitext2"]


# --------------------------------------------------------------------------------------------------
# Tokenizers

def same_ids(enc, key):
    golden = json.loads((GOLDEN / "texts.json").read_text())
    assert enc.eot == 0 and not hasattr(enc, "bos")
    for words, ids in zip(golden["texts"], golden[key], strict=True):
        assert enc.encode_ordinary(words) == ids
        if "\x04" not in words:                          # bytes without ids are lost
            assert enc.decode(ids) == words


def test_ids_of_a_small_tokenizer():
    same_ids(common.encoding("smollm2", GOLDEN), "ids")


def test_ids_of_smollm2():
    if not (common.FOLDER / "smollm2" / "config.json").is_file():
        pytest.skip("data/smollm2 is not prepared")
    enc = common.encoding("smollm2")
    assert enc.n_vocab == 49152 and enc.decode_single_token_bytes(2) == b"<|im_end|>"
    same_ids(enc, "smollm2")


def golden_metadata():
    """The golden tokenizer as a GGUF file has it."""
    vocab = json.loads((GOLDEN / "vocab.json").read_text())
    merges = (GOLDEN / "merges.txt").read_text().split("\n")[1:-1]
    return {"tokenizer.ggml.tokens": sorted(vocab, key=vocab.get), "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
            "llama.context_length": 64}


def test_tokenizer_files_of_a_gguf_file(tmp_path):
    for name, content in smollm2.tokenizer_files(golden_metadata()).items():
        (tmp_path / name).write_bytes(content)
    same_ids(common.encoding("smollm2", tmp_path), "ids")
    made = json.loads((tmp_path / "tokenizer.json").read_text())
    assert made["model"]["vocab"] == json.loads((GOLDEN / "vocab.json").read_text())
    assert [made["added_tokens"][i]["content"] for i in (0, 2, 16)] == [
        "<|endoftext|>", "<|im_end|>", "<empty_output>"]
    names = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (names["bos_token"], names["eos_token"]) == ("<|im_start|>", "<|im_end|>")


def test_transformers_reads_them_as_we_do(tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, content in smollm2.tokenizer_files(golden_metadata()).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    golden = json.loads((GOLDEN / "texts.json").read_text())
    for words, ids in zip(golden["texts"], golden["ids"], strict=True):
        if "<|endoftext|>" not in words:                 # a special token to them
            assert theirs(words)["input_ids"] == ids


def test_a_damaged_model_replaces_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "FOLDER", tmp_path / "data")
    monkeypatch.setattr(smollm2, "FOLDER", tmp_path / "data")
    path = tmp_path / "tiny.gguf"
    metadata = golden_metadata() | LLAMA_GGUF
    norm = {"output_norm.weight": (0, [2], np.ones(2, "<f4").tobytes())}
    write_gguf(path, metadata, norm)
    assert run(smollm2, f"--file {path}", monkeypatch, capsys) == (0, "")
    before = content(tmp_path / "data" / "smollm2")
    assert "--overwrite" in run(smollm2, f"--file {path}", monkeypatch, capsys)[1]
    for lost in metadata:
        write_gguf(path, {key: metadata[key] for key in metadata if key != lost}, {})
        status, err = run(smollm2, f"--file {path} --overwrite", monkeypatch, capsys)
        assert status == 2 and err.count("\n") == 1 and "SmolLM2" in err, lost
        assert content(tmp_path / "data" / "smollm2") == before


def test_a_missing_tokenizer_says_how(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match="2"):
        common.encoding("smollm2")
    said = capsys.readouterr().err
    assert "python data/smollm2.py" in said and "--tokenizer bytes" in said
    assert said.count("\n") == 1


def test_texts_end_with_the_end_of_text(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "FOLDER", tmp_path)
    common.write("two", dict(train=["a", "b"], val=["c"]), "smollm2", "a test", GOLDEN)
    train, val, _ = common.load("two")
    assert (train == 0).sum() == 2 and train[-1] == 0 and val[-1] == 0
    common.write("two", dict(train=["a", "b"], val=["c"]), "bytes", "a test", overwrite=True)
    assert bytes(common.load("two")[0].tolist()) == b"a\n\n\nb"


# --------------------------------------------------------------------------------------------------
# GGUF

def string(words):
    return struct.pack("<Q", len(words.encode())) + words.encode()


def write_gguf(path, metadata, tensors):
    """{key: int, str or list of str}, {name: (type, shape, bytes)} -> a file of version 3."""
    content = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        content += string(key)
        if isinstance(value, int):
            content += struct.pack("<II", 4, value)
        elif isinstance(value, str):
            content += struct.pack("<I", 8) + string(value)
        else:
            content += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(string, value))
    body = b""
    for name, (kind, shape, stored) in tensors.items():
        content += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        content += struct.pack("<IQ", kind, len(body))
        body += stored + bytes(-len(stored) % 32)
    path.write_bytes(content + bytes(-len(content) % 32) + body)


LLAMA_GGUF = {
    "general.architecture": "llama", "tokenizer.ggml.pre": "smollm", "llama.embedding_length": 32,
    "llama.attention.layer_norm_rms_epsilon": 1, "llama.feed_forward_length": 48,
    "llama.context_length": 64, "llama.block_count": 2, "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2, "llama.rope.freq_base": 10000}


def test_gguf_blocks_by_hand(tmp_path):
    half = lambda x: np.float16(x).tobytes()
    q4 = half(0.5) + half(-1) + bytes([0x21, 0xF0] + [0] * 14)
    q8 = half(0.25) + np.int8([-128, 127] + [4] * 30).tobytes()
    write_gguf(tmp_path / "x", {"a": 7, "b": ["x", "é"], "c": "y"}, {
        "q4": (3, [32, 1], q4), "q8": (8, [32], q8),
        "f16": (1, [2, 2], np.float16([1, 2, 3, 4]).tobytes())})
    metadata, tensors = gguf.read(tmp_path / "x")
    assert metadata == {"a": 7, "b": ["x", "é"], "c": "y"}
    # low halves are values 0 to 15, high halves 16 to 31: 0.5 * step - 1
    assert tensors["q4"].shape == (1, 32)
    assert tensors["q4"][0].tolist() == [-0.5, -1] + [-1] * 14 + [0, 6.5] + [-1] * 14
    assert tensors["q8"].tolist() == [-32, 31.75] + [1] * 30
    assert tensors["f16"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("kind, shape, said", [
    (2, [32], "tensor t of type 2"), (8, [33], "rows of 33"), (0, [2 ** 40, 2 ** 40], "cut off"),
    (0, [2 ** 63], "cut off"), (0, [1] * 5, "5 dimensions")])
def test_lying_gguf(tmp_path, kind, shape, said):
    write_gguf(tmp_path / "x", {}, {"t": (kind, shape, bytes(64))})
    with pytest.raises(ValueError, match=said):
        gguf.read(tmp_path / "x")


@pytest.mark.parametrize("at", [8, 16, 24])      # tensors, values, the first key
def test_lying_gguf_counts(tmp_path, at):
    write_gguf(tmp_path / "x", {"key": 1}, {"t": (0, [2], bytes(8))})
    content = bytearray((tmp_path / "x").read_bytes())
    content[at:at + 8] = struct.pack("<Q", 2 ** 60)
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        gguf.read(tmp_path / "x")


def test_rows_of_queries_and_keys_are_put_back():
    rows = torch.arange(16.)[:, None].numpy()     # 2 heads of 8: pairs (0, 4), (1, 5)
    stored = np.concatenate([rows[[0, 4, 1, 5, 2, 6, 3, 7]], rows[[8, 12, 9, 13, 10, 14, 11, 15]]])
    config = dict(num_attention_heads=2, num_key_value_heads=1)
    tensors = {"blk.3.attn_q.weight": stored, "output_norm.weight": rows[:, 0]}
    weights = smollm2.hub_weights(config, tensors)
    assert weights["model.layers.3.self_attn.q_proj.weight"][:, 0].tolist() == list(range(16))
    assert weights["model.norm.weight"].dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# Wikipedia

@pytest.mark.parametrize("markup, plain", [
    ("'''A''' is [[b|the b]].<ref name=x>{{cite|a}}</ref><ref name=y/> And [[c]].",
     "A is the b. And c."),
    ("{{Infobox|a={{b|{{c}}}}|d=[[e|f]]}}Text<!-- a\nb --> on.", "Text on."),
    ("It is {{convert|5|km|mi}} long and {{lang|fr|[[x|beau]]}}.", "It is 5 km long and beau."),
    ("Before {| class=x\n| a\n{| b |}\n|} after", "Before after"),
    ("[[File:a.jpg|thumb|A [[b|c]] [sic] of {{x}}]]So it goes.[[Category:D]]", "So it goes."),
    ("See [http://x.org the site] &amp; [http://y.org]more.&nbsp;End", "See the site & more. End"),
    ("One.\n== Two ==\n=== Three ===\nFour.\n== Empty ==\n== References ==\nfive",
     "One.\n\nTwo\n\nThree\n\nFour."),
    ("* a\n* b\n:c", "- a\n- b\nc"), ("A ({{IPA|x}}; {{y}}) b , c ( ; d).", "A b, c (d)."),
])
def test_cleaning(markup, plain):
    assert clean(markup) == plain + "\n"


def test_wikipedia_from_a_file(tmp_path, monkeypatch, capsys):
    page = ("<page><title>T{0}</title><ns>0</ns><revision><text>" + "Words. " * 300
            + "</text></revision></page>")
    xml = "<mediawiki xmlns='x'>" + "".join(page.format(n) for n in range(12)) + "</mediawiki>"
    dump = tmp_path / "dump.xml.bz2"
    dump.write_bytes(wikipedia.bz2.compress(xml.encode()))
    monkeypatch.setattr(common, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["wikipedia.py", "--file", str(dump), "--tokenizer", "bytes"])
    wikipedia.main()
    train, val, meta = common.load("wikipedia")
    held_out = bytes(val.tolist()).split(b"\n")[0]
    assert held_out.startswith(b"T") and held_out + b"\n" not in bytes(train.tolist())
    assert "CC BY-SA" in (tmp_path / "wikipedia" / "SOURCE.txt").read_text()
    dump.write_bytes(dump.read_bytes()[:50])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        wikipedia.main()
    assert capsys.readouterr().err.count("\n") == 1
