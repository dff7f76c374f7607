"""Published models: where their files are, and what is in them: shape and weights."""
import json
import math
import os
import pickle
import re
import struct
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import torch

from data import safetensors
from data.download import Missing, fetch

CACHE = Path(os.path.expanduser("~")) / ".cache" / "nanosea"
OPTS = tuple(f"facebook/opt-{size}" for size in ("125m", "350m", "1.3b", "2.7b", "6.7b"))
MODELS = OPTS + ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct")
BIN = "pytorch_model.bin"
INDEX = BIN + ".index.json"                       # it names the shards of weights in several files
SAFE = "model.safetensors"
SAFE_INDEX = SAFE + ".index.json"
WEIGHTS = (SAFE, SAFE_INDEX, INDEX, BIN)          # in the order in which they are looked for


def model_file(name_or_folder, file, url=None):
    """The path of a model's file: in a folder, or in ~/.cache/nanosea/NAME, downloaded if absent.

    url: the address of the model's files, where that is not HF_ENDPOINT/NAME/resolve/main.
    """
    name = str(name_or_folder)
    folder = Path(name_or_folder)
    if folder.is_file():
        raise ValueError(f"{name} is a file; name the folder that it is in (our own "
                         "checkpoints end in .pt)")
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
        fetch(f"{base}/{file}", folder / file, "put the files into a folder and name it: "
              "distill.py --teacher, data/wikitext2.py --opt-folder")
    return folder / file


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
        for name, tensor in read_file(file).items():
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
        elif tensor.dtype not in safetensors.NAMES or tensor.layout != torch.strided:
            known = ", ".join(safetensors.DTYPES)
            wrong.append(f"{name} is {tensor.dtype}, which is none of {known}")
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


def read_file(path):
    """{name: tensor} of one of the files that hold weights."""
    wanted = SAFE if path.suffix == ".safetensors" else BIN
    kind = kind_of(path)
    if kind and wanted not in kind:
        raise ValueError(f"{path} is {kind}")
    return safetensors.read(path) if wanted == SAFE else read_pickle(path)


def read_pickle(path):
    """{name: tensor} of a file by torch.save, of now (a zip) or of before 2020; no code is run."""
    try:
        zipped = zipfile.is_zipfile(path)
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
    if isinstance(error, EOFError) or re.search("truncated|unexpected EOF|central directory", text):
        return "is cut off"
    more = re.search(r"Unsupported (?:global|class|operand)[^\n]*?(?= was | is |\n|$)", text)
    if more:
        return f"holds more than tensors ({more[0]}), which is not run"
    return f"holds no weights ({(text or type(error).__name__).splitlines()[0][:120]})"
