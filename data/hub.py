"""Published models: how their files are fetched, and what is in them: shape, weights, tokenizer."""
import glob
import json
import math
import os
import pickle
import re
import secrets
import struct
import time
import urllib.request
import zipfile
import zlib
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError

import tiktoken
import torch

CACHE = Path(os.path.expanduser("~")) / ".cache" / "nanosea"
OPTS = tuple(f"facebook/opt-{size}" for size in ("125m", "350m", "1.3b", "2.7b", "6.7b"))
MODELS = OPTS + ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct")
BIN = "pytorch_model.bin"
INDEX = BIN + ".index.json"                       # it names the shards of weights in several files
SAFE = "model.safetensors"
SAFE_INDEX = SAFE + ".index.json"
WEIGHTS = (SAFE, SAFE_INDEX, INDEX, BIN)          # in the order in which they are looked for


class Missing(ValueError):
    """A file that a folder or the hub does not have; another one may take its place."""


# --------------------------------------------------------------------------------------------------
# Fetching

WAITS = (0, 1, 4, 16)              # seconds before each try of a download that breaks off


def own_name(path):
    """A name beside path which no other process has: what is whole is moved from there to path."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")


class Download:
    """A file on its way: what there is of it, `part`, and of which version (its ETag)."""

    def __init__(self, url, path):
        self.url = url
        self.path = path
        self.part = own_name(path)
        self.version = ""

    def take_left_over(self):
        """Go on with what an earlier run left; renamed, it is no other process's any more."""
        for left in self.path.parent.glob(f"{glob.escape(self.path.name)}.*.left"):
            with suppress(OSError, ValueError):
                version = bytes.fromhex(left.name.split(".")[-2]).decode()
                os.replace(left, self.part)
                self.version = version
                return

    def leave_over(self):
        """Keep what has come for the next run, if its version is known; else remove it."""
        with suppress(OSError):
            if self.version and self.part.stat().st_size:
                name = f"{self.path.name}.{self.version.encode().hex()}.left"
                os.replace(self.part, self.path.with_name(name))
        with suppress(OSError):
            self.part.unlink(missing_ok=True)

    def receive(self):
        """Ask for what is missing -> whether the file is whole now; False where it broke off."""
        start = self.part.stat().st_size if self.version else 0
        request = urllib.request.Request(self.url)
        if start:
            request.add_header("Range", f"bytes={start}-")
            request.add_header("If-Range", self.version)
        with urllib.request.urlopen(request, timeout=60) as reply:
            version = reply.headers.get("ETag", "")
            partial = reply.status == 206              # else it is the whole file, from its start
            if partial and version != self.version:
                self.version = ""
                return False
            self.version = version
            size = int(reply.headers.get("Content-Length") or 0) + start * partial
            with open(self.part, "ab" if partial else "wb") as out:
                whole = self.copy(reply, out, size)
                return whole and size in (0, out.tell())

    def copy(self, reply, out, size):
        """What comes, to a file, showing progress -> False where reading, not writing, failed."""
        try:
            while True:
                try:
                    block = reply.read(1 << 16)
                except (OSError, HTTPException):
                    return False
                if not block:
                    return True
                out.write(block)
                shown = f"{out.tell() / 1e6:.1f} of {size / 1e6:.1f} MB"
                print(f"\r{self.url}: {shown}", end="", flush=True)
        finally:
            print()


def is_absent(error):
    """Whether a server, or a disk for file://, says that there is no such file."""
    if isinstance(error, HTTPError):
        return error.code == 404
    return isinstance(error, URLError) and isinstance(error.reason, FileNotFoundError)


def fetch(url, path, otherwise):
    """Fetch url (http, https or file) to path; what breaks off goes on, now or in the next run."""
    download = Download(url, path)
    try:
        download.take_left_over()
        for wait in WAITS:
            time.sleep(wait)
            if download.receive():
                break
        else:
            raise OSError("it breaks off again and again")
        os.replace(download.part, path)
    except (OSError, ValueError, HTTPException) as error:
        if isinstance(error, HTTPError) and error.code < 500:
            download.version = ""                       # what is left is of no use
        kind = Missing if is_absent(error) else ValueError
        said = f"could not download {url} ({error}); try again, or {otherwise}"
        raise kind(said) from None
    finally:
        download.leave_over()


def model_file(name_or_folder, file, url=None):
    """The path of a model's file: in a folder, or in ~/.cache/nanosea/NAME, downloaded if absent.

    url: the address of the model's files, where that is not HF_ENDPOINT/NAME/resolve/main.
    """
    name = str(name_or_folder)
    folder = Path(name_or_folder)
    if folder.is_file():
        raise ValueError(f"{name} is a file; name the folder that it is in")
    if folder.is_dir():
        if not (folder / file).is_file():
            raise Missing(f"{name} has no {file}; its files must be named as on the hub: "
                          f"config.json, {SAFE} or {BIN}, vocab.json, merges.txt")
        return folder / file
    if name not in MODELS:
        known = ", ".join(MODELS)
        raise ValueError(f"there is no folder {name}; the models known by name are {known}")
    folder = CACHE / name
    # Weights come in one kind of file; where there is one already, the hub is not asked for others.
    kept = [other for other in WEIGHTS if (folder / other).is_file()]
    if file in WEIGHTS and kept and file not in kept:
        raise Missing(f"{folder} has {kept[0]}, not {file}")
    if not (folder / file).is_file():
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        base = url or f"{endpoint.rstrip('/')}/{name}/resolve/main"
        make_folder(folder)
        fetch(f"{base}/{file}", folder / file, "put the files into a folder and name it: "
              "distill.py --teacher, data/wikitext2.py --opt-folder")
    return folder / file


def make_folder(folder):
    """Make a folder, and those that it is in."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder} ({error.strerror})") from None


# --------------------------------------------------------------------------------------------------
# config.json

SIZES = dict(vocab_size="vocab_size", context="max_position_embeddings",
             n_layer="num_hidden_layers", n_head="num_attention_heads", n_embd="hidden_size")
MOST = dict(n_layer=1000, n_head=1000, n_kv_head=1000)        # more than any model has
BUILT = dict(                      # what model.py has, and takes for granted where a file is silent
    opt=dict(activation_function="relu", enable_bias=True, layer_norm_elementwise_affine=True,
             _remove_final_layer_norm=False, tie_word_embeddings=True, quantization_config=None),
    llama=dict(hidden_act="silu", attention_bias=False, mlp_bias=False, rope_interleaved=False,
               partial_rotary_factor=1, quantization_config=None))


def read_json(path):
    """The object in a JSON file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and fetch it again") from None


def read_config(path):
    """What config.json fixes of model.Config; a ValueError names what is not built."""
    config = read_json(path)
    kind = config.get("model_type")
    if kind is None:
        raise ValueError(f"{path} does not say model_type; it must be a model's config.json")
    if kind not in ("opt", "llama"):
        raise ValueError(f"{path} has model_type {kind!r}; nanoSEA has opt and llama")
    own = dict(n_ffn="ffn_dim") if kind == "opt" else dict(n_ffn="intermediate_size")
    names = {**SIZES, **own}
    missing = [theirs for theirs in names.values() if theirs not in config]
    if missing:
        unsaid = ", ".join(missing)
        raise ValueError(f"{path} does not say {unsaid}; it must be a whole config.json")
    fields = {ours: config[theirs] for ours, theirs in names.items()}
    fields["architecture"] = kind
    fields["n_kv_head"] = fields["n_head"]
    if kind == "llama":
        fields["n_kv_head"] = config.get("num_key_value_heads") or fields["n_head"]
    check_sizes(path, fields)
    for name, value in BUILT[kind].items():
        only(path, config, name, value)
    return fields | (read_opt if kind == "opt" else read_llama)(path, config)


def only(path, config, name, value):
    """A ValueError if a file has another value than the one that is built."""
    if config.get(name, value) != value:
        have = config[name]
        raise ValueError(f"{path} has {name} {have!r}; nanoSEA has only models with {value!r}")


def check_sizes(path, fields):
    """A ValueError unless each size is a number as models have, and heads divide what they must."""
    for name, value in fields.items():
        most = MOST.get(name, 2 ** 24)
        if name != "architecture" and (type(value) is not int or not 0 < value <= most):
            raise ValueError(f"{path} gives {value!r} for {name}, which is not from 1 to {most}")
    for whole, part in (("n_embd", "n_head"), ("n_head", "n_kv_head")):
        if fields[whole] % fields[part]:
            raise ValueError(f"{path} has {whole} {fields[whole]}, "
                             f"which {part} {fields[part]} does not divide")


def read_opt(path, config):
    """The fields that only OPT's files have."""
    only(path, config, "ffn_dim", 4 * config["hidden_size"])
    return dict(post_norm=not config.get("do_layer_norm_before", True),
                token_embd=config.get("word_embed_proj_dim") or 0)


def read_llama(path, config):
    """The fields that only Llama's files have; defaults as in transformers' LlamaConfig."""
    only(path, config, "head_dim", config["hidden_size"] // config["num_attention_heads"])
    # transformers 5 writes the base of the rotary positions into rope_parameters.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    named = isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default"))
    if named != "default":
        raise ValueError(f"{path} has rope_scaling {rope!r}; nanoSEA has only unscaled positions")
    only(path, rope, "partial_rotary_factor", 1)
    fields = dict(rope_base=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
                  norm_eps=config.get("rms_norm_eps", 1e-6))
    for name, value in fields.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{path} gives {value!r} for {name}, which is no positive number")
    return fields | dict(tied=bool(config.get("tie_word_embeddings", False)))


# --------------------------------------------------------------------------------------------------
# Weights

DTYPES = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16)
KINDS = {b"version https://git-lfs": "a Git LFS pointer; `git lfs pull` fetches the file itself",
         b"<": "a web page; fetch the file itself",
         b"GGUF": "a GGUF file; python data/smollm2.py --file reads it",
         b"PK": f"a zip, as torch.save writes it; name it {BIN}",
         b"\x80": f"a pickle, as torch.save wrote it; name it {BIN}"}
DAMAGE = (RuntimeError, OSError, EOFError, AttributeError, LookupError, TypeError, ValueError,
          AssertionError, ArithmeticError, MemoryError, struct.error, zlib.error,
          pickle.UnpicklingError, zipfile.BadZipFile)      # what files of others may raise


def find_weights(find):
    """The path of a model's weights, or of the index of their shards. find(file): its path."""
    for file in WEIGHTS[:-1]:
        with suppress(Missing):
            return find(file)
    return find(WEIGHTS[-1])


def read_weights(find, shapes):
    """The weights in float32, {name: tensor}, which must be as `shapes`. find(file): its path.

    Names are the hub's without the leading "model." and "decoder.".
    """
    path = find_weights(find)
    stored = {}
    for file in shards(path, find):
        tensors = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)
        for name, tensor in tensors.items():
            short = name.removeprefix("model.").removeprefix("decoder.")
            # Old files of Llama hold the frequencies of their rotary positions, which are computed.
            if not short.endswith("rotary_emb.inv_freq"):
                stored[short] = tensor
    head = stored.get("lm_head.weight")
    if "lm_head.weight" not in shapes:               # the token embedding once more, where stored
        stored.pop("lm_head.weight", None)
    wrong = differences(stored, shapes)
    if not wrong and "lm_head.weight" not in shapes and head is not None:
        if not head.equal(stored["embed_tokens.weight"]):
            wrong = ["lm_head.weight is not embed_tokens.weight, but config.json ties them"]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        said = ", ".join(wrong[:4]) + more
        raise ValueError(f"{path} does not fit config.json: {said}; fetch both again")
    return {name: stored[name].to(torch.float32, copy=True) for name in shapes}


def shards(path, find):
    """The files of the weights: the one at path, or those which the index at path names."""
    if path.suffix != ".json":
        return [path]
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files or not all(map(is_name, files.values())):
        raise ValueError(f"{path} names no shards; delete it and fetch it again")
    return [find(Path(file).name) for file in sorted(set(files.values()))]


def is_name(file):
    return isinstance(file, str) and Path(file).name != ""


def differences(stored, shapes):
    """What is not as it should be, in words."""
    wrong = []
    for name in sorted({*stored, *shapes}):
        tensor = stored.get(name)
        have = "missing" if tensor is None else tuple(tensor.shape)
        want = shapes.get(name, "absent")
        if have != want:
            wrong.append(f"{name} is {have} and should be {want}")
        elif tensor.dtype not in DTYPES.values() or tensor.layout != torch.strided:
            wrong.append(f"{name} is {tensor.dtype}, which is none of {', '.join(DTYPES)}")
    return wrong


def kind_of(path):
    """What a file that is no weights is, by its first bytes; "" if that is not known."""
    with open(path, "rb") as file:
        start = file.read(32)
    if start[8:9] == b"{":                         # the first 8 bytes are a length, any bytes
        return f"a safetensors file; name it {SAFE}"
    for magic, kind in KINDS.items():
        if start.startswith(magic):
            return kind
    return ""


def read_safetensors(path):
    """{name: tensor} of a file: a header's length, the header in JSON, and the bytes it tells of.

    Tensors are views of the file and keep its type; nothing is allocated that a header asks for.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        kind = kind_of(path)
        if kind and SAFE not in kind:
            raise ValueError(f"{path} is {kind}")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is cut off or holds no weights; delete it and fetch it again")
        text = file.read(length)
    try:
        header = dict(json.loads(text))
        header.pop("__metadata__", None)
        # In the order of their bytes, of which each tensor begins where the one before it ends.
        entries = sorted(header.items(), key=lambda entry: entry[1]["data_offsets"])
        spans = [check_entry(*entry) for entry in entries]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged header ({error}); fetch it again") from None
    ends = [0, *[end for _, end in spans]]
    if [begin for begin, _ in spans] != ends[:-1]:
        raise ValueError(f"{path} has a damaged header (tensors overlap or leave gaps); "
                         "fetch it again")
    if ends[-1] != size - 8 - length:
        cause = "is cut off" if ends[-1] > size - 8 - length else "has bytes of no tensor"
        raise ValueError(f"{path} {cause}; delete it and fetch it again")
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length:]
    return {name: view(content[begin:end], entry)
            for (name, entry), (begin, end) in zip(entries, spans)}


def check_entry(name, entry):
    """Where a tensor begins and ends, if that is as its type and shape say."""
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} is {entry['dtype']}, which is none of {', '.join(DTYPES)}")
    for number in (begin, end, *entry["shape"]):
        if type(number) is not int or not 0 <= number < 2 ** 63:
            raise ValueError(f"{name} has {number!r} for a size")
    width = DTYPES[entry["dtype"]].itemsize
    if end - begin != width * math.prod(entry["shape"]):
        raise ValueError(f"{name} has {end - begin} bytes, which are not {entry['shape']}")
    return begin, end


def view(content, entry):
    """Bytes as a tensor; they are copied where they do not lie as their type must."""
    dtype = DTYPES[entry["dtype"]]
    if content.storage_offset() % dtype.itemsize:
        content = content.clone()
    return content.view(dtype).view(entry["shape"])


def read_pickle(path):
    """{name: tensor} of a file by torch.save, of now (a zip) or of before 2020; no code is run."""
    kind = kind_of(path)
    if kind and BIN not in kind:
        raise ValueError(f"{path} is {kind}")
    try:
        zipped = zipfile.is_zipfile(path)
        if path.stat().st_size == 0 or (kind.startswith("a zip") and not zipped):
            raise EOFError
        if zipped:
            check_zip(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except DAMAGE as error:
        raise ValueError(f"{path} {pickle_cause(error)}; fetch it again") from None
    if not isinstance(tensors, dict) or not all(map(is_weight, tensors.items())):
        raise ValueError(f"{path} is whole but holds no weights: it is a {type(tensors).__name__} "
                         "of other things than tensors; take the file with the model's")
    return tensors


def check_zip(path):
    """torch.save compresses nothing: a file with more in it than its size is a trap. And torch.load
    does not look at the sums that tell of a changed bit."""
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > os.path.getsize(path):
            raise ValueError("it unpacks to more than its size")
        if archive.testzip():
            raise ValueError(f"{archive.testzip()} in it has changed since it was written")


def is_weight(item):
    name, tensor = item
    return isinstance(name, str) and torch.is_tensor(tensor) and tensor.device.type == "cpu"


def pickle_cause(error):
    """Why torch.load failed, in a few words."""
    text = str(error)
    if isinstance(error, EOFError) or re.search("truncated|unexpected EOF", text):
        return "is cut off"
    more = re.search(r"Unsupported (?:global|class|operand)[^\n]*?(?= was | is |\n|$)", text)
    if more:
        return f"holds more than tensors ({more[0]}), which is not run"
    return f"holds no weights ({(text or type(error).__name__).splitlines()[0][:120]})"


# --------------------------------------------------------------------------------------------------
# Tokenizers

class HubEncoding:
    """Byte pairs, numbered as in a model's vocabulary; it is used as a tiktoken.Encoding is.

    In tiktoken a token's id is also its turn among the merges; here ids may be in another order. So
    text is merged under the ranks of the merges, and a table turns ranks into ids. As in tiktoken's
    encode_ordinary, the name of a special token in a text is no special token.
    """

    def __init__(self, vocab, merges):
        ids, byte, tokens = read_vocabulary(vocab, merges)
        ranks = {bytes(byte[letter] for letter in token): n for n, token in enumerate(tokens)}
        special = {name: len(ranks) + n for n, name in enumerate(self.SPECIAL)}
        self.id_of_rank = [ids.get(token) for token in (*tokens, *self.SPECIAL)]
        self.rank_of_id = {i: n for n, i in enumerate(self.id_of_rank) if i is not None}
        # A byte may have no id, where the tokenizer's own text never held it.
        unnumbered = self.id_of_rank[:256].count(None)
        one_to_one = len(self.rank_of_id) + unnumbered == len(ranks) + len(special)
        names = self.id_of_rank[len(ranks):] == list(range(len(special)))
        # Few ids have no merge: <mask>, madeupword0000; many where lines of merges are lost.
        if not one_to_one or not names or len(ids) - len(self.rank_of_id) > 16:
            raise ValueError(f"{vocab} does not number the tokens of {merges} as {self.NAME} does; "
                             "fetch both again")
        self.ids = sorted(self.rank_of_id)           # numbers between them may have no token
        self.merges = tiktoken.Encoding(self.NAME, pat_str=self.WORDS, mergeable_ranks=ranks,
                                        special_tokens=special)
        self.n_vocab = max(ids.values()) + 1         # a model's embedding may have more rows

    def encode_ordinary(self, text):
        ids = [self.id_of_rank[rank] for rank in self.merges.encode_ordinary(text)]
        return [i for i in ids if i is not None]

    def decode(self, ids):
        return self.merges.decode([self.rank(i) for i in ids])

    def decode_single_token_bytes(self, i):
        return self.merges.decode_single_token_bytes(self.rank(i))

    def rank(self, i):
        if i not in self.rank_of_id:
            raise ValueError(f"{i} is not the id of a token of {self.NAME}'s")
        return self.rank_of_id[i]


class OPTEncoding(HubEncoding):
    """OPT's: GPT-2's words and merges. A text begins with </s>, whose id is enc.bos."""
    NAME = "OPT"
    WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")      # ids 0 to 3
    bos = 2
    eot = 2


class SmolLM2Encoding(HubEncoding):
    """SmolLM2's: each digit is a word, and the words between digits are GPT-2's."""
    NAME = "SmolLM2"
    WORDS = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++"
             r"|\s++$|\s++(?=\p{N})|\s+(?!\S)|\s")
    SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>",
               "<file_sep>", "<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>",
               "<issue_closed>", "<jupyter_start>", "<jupyter_text>", "<jupyter_code>",
               "<jupyter_output>", "<jupyter_script>", "<empty_output>")         # ids 0 to 16
    eot = 0


def letters():
    """{letter: byte}: a visible byte is itself, the others are the letters from chr(256) on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [i for i in range(256) if i not in visible]
    return {chr(i): i for i in visible} | {chr(256 + n): i for n, i in enumerate(rest)}


def read_vocabulary(vocab, merges):
    """The hub's two files -> {token: id}, {letter: byte}, and the tokens in the order of merges."""
    byte = letters()
    try:
        ids = {token: int(i) for token, i in json.loads(vocab.read_text(encoding="utf-8")).items()}
        lines = merges.read_text(encoding="utf-8").split("\n")
        pairs = [line.split() for line in lines if line and not line.startswith("#version")]
        if not all(len(pair) == 2 and set("".join(pair)) <= byte.keys() for pair in pairs):
            raise ValueError("a merge is not two tokens")
        if not all(0 <= i < 2 ** 16 for i in ids.values()):
            raise ValueError("an id is not from 0 to 65535")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{vocab} or {merges} is damaged ({error}); fetch both again") from None
    return ids, byte, list(byte) + ["".join(pair) for pair in pairs]
