"""The published OPTs: how their files are fetched, and what is in them: shape, weights and tokenizer."""
import json
import os
import pickle
import urllib.request
from http.client import HTTPException
from pathlib import Path

import tiktoken
import torch

CACHE = Path.home() / ".cache" / "nanosea"
MODELS = tuple(f"facebook/opt-{size}" for size in ("125m", "350m", "1.3b", "2.7b", "6.7b"))
INDEX = "pytorch_model.bin.index.json"       # it names the shards of weights that are not one file


def fetch(url, path, otherwise):
    """Fetch url (http, https or file) to path, showing progress; what breaks off leaves nothing behind."""
    part = path.with_name(path.name + ".part")
    try:
        with urllib.request.urlopen(url, timeout=60) as reply, open(part, "wb") as out:
            size = int(reply.headers.get("Content-Length") or 0)
            while block := reply.read(1 << 16):
                out.write(block)
                print(f"\r{url}: {out.tell() / 1e6:.1f} of {size / 1e6:.1f} MB", end="", flush=True)
            print()
            if size and out.tell() != size:
                raise OSError(f"it broke off after {out.tell()} of {size} bytes")
        os.replace(part, path)
    except (OSError, ValueError, HTTPException) as error:
        raise ValueError(f"could not download {url} ({error}); try again, or {otherwise}") from None
    finally:
        part.unlink(missing_ok=True)


def model_file(name_or_folder, file, url=None):
    """The path of a model's file: in a local folder, or in ~/.cache/nanosea/NAME, downloaded there if absent.

    url: the address of the model's files, where that is not https://huggingface.co/NAME/resolve/main.
    """
    name, path = str(name_or_folder), Path(name_or_folder) / file
    if path.parent.is_dir():
        if not path.is_file():
            raise ValueError(f"{name} has no {file}; its files must be named as {MODELS[0]}'s on the hub")
        return path
    if name not in MODELS:
        raise ValueError(f"there is no folder {name}; the models known by name are {', '.join(MODELS)}")
    path = CACHE / name / file
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        fetch(f"{url or f'https://huggingface.co/{name}/resolve/main'}/{file}", path,
              "put the files into a folder and name it: distill.py --teacher, data/wikitext2.py --opt-folder")
    return path


def read_json(path):
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and fetch it again") from None


def read_shape(path):
    """What the hub's config.json fixes of OPTConfig; a ValueError if it is not of an OPT as built here."""
    config = read_json(path)
    names = dict(vocab_size="vocab_size", context="max_position_embeddings", n_layer="num_hidden_layers",
                 n_head="num_attention_heads", n_embd="hidden_size")
    if missing := [name for name in ("model_type", *names.values()) if name not in config]:
        raise ValueError(f"{path} does not say {', '.join(missing)}; it must be the config.json of an OPT")
    built = dict(model_type="opt", activation_function="relu", ffn_dim=4 * config["hidden_size"],
                 enable_bias=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False,
                 tie_word_embeddings=True)
    for name, value in built.items():
        if config.get(name, value) != value:
            raise ValueError(f"{path} has {name} {config[name]!r}; nanoSEA has only OPTs with {value!r}")
    return dict({ours: config[theirs] for ours, theirs in names.items()},
                post_norm=not config.get("do_layer_norm_before", True),
                token_embd=config.get("word_embed_proj_dim") or 0)


def read_weights(find, sharded, shapes):
    """The hub's weights, OPT's names, float32; a ValueError unless as `shapes`. find(file): its path."""
    path = find(INDEX if sharded else "pytorch_model.bin")
    shards = read_json(path).get("weight_map", {}).values() if sharded else [path]
    weights, short = {}, lambda name: name.removeprefix("model.").removeprefix("decoder.")
    for file in map(find, sorted({Path(shard).name for shard in shards})):
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            weights |= {short(name): w.to(torch.float32, copy=True) for name, w in tensors.items()}
        except (RuntimeError, OSError, EOFError, AttributeError, pickle.UnpicklingError):
            raise ValueError(f"{file} is cut off or holds no weights; delete it and fetch it again") from None
    head = weights.pop("lm_head.weight", None)             # the token embedding once more, where it is stored
    have = {name: tuple(w.shape) for name, w in weights.items()}
    wrong = [f"{name} is {have.get(name, 'missing')} and should be {shapes.get(name, 'absent')}"
             for name in sorted({*have, *shapes}) if have.get(name) != shapes.get(name)]
    if head is not None and not wrong and not head.equal(weights["embed_tokens.weight"]):
        wrong = ["lm_head.weight is not embed_tokens.weight"]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"{path} does not fit config.json: {', '.join(wrong[:4])}{more}; fetch both again")
    return weights


class OPTEncoding:
    """OPT's tokenizer: GPT-2's merges, numbered as in OPT's vocabulary. It is used as a tiktoken.Encoding is.

    In tiktoken a token's id is also its turn among the merges; OPT's ids are in another order. So text is
    merged under the ranks of the merges, and a table turns ranks into ids. As in tiktoken's encode_ordinary,
    "</s>" in a text is no special token; OPT wants one in front: [enc.bos, *enc.encode_ordinary(text)].
    """
    WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"    # GPT-2's
    SPECIAL = "<s>", "<pad>", "</s>", "<unk>"        # ids 0 to 3
    bos = 2

    def __init__(self, vocab, merges):
        ids, byte, tokens = read_vocabulary(vocab, merges)
        ranks = {bytes(byte[letter] for letter in token): rank for rank, token in enumerate(tokens)}
        special = {name: len(ranks) + i for i, name in enumerate(self.SPECIAL)}
        self.id_of_rank = [ids.get(token) for token in (*tokens, *self.SPECIAL)]
        self.rank_of_id = {i: rank for rank, i in enumerate(self.id_of_rank)}
        one_to_one = None not in self.rank_of_id and len(self.rank_of_id) == len(ranks) + 4
        unmerged = len(ids) - len(self.id_of_rank)  # few: <mask>, madeupword0000; many where merges are lost
        if self.id_of_rank[-4:] != [0, 1, 2, 3] or not one_to_one or unmerged > 16:
            raise ValueError(f"{vocab} does not number the tokens of {merges} as OPT does; fetch both again")
        self.ids = sorted(self.rank_of_id)           # 50265 numbers, a few of them without a token
        self.merges = tiktoken.Encoding("opt", pat_str=self.WORDS, mergeable_ranks=ranks,
                                        special_tokens=special)
        self.n_vocab = max(ids.values()) + 1         # 50265; OPT's embedding has 50272 rows, some are unused

    def encode_ordinary(self, text):
        return [self.id_of_rank[rank] for rank in self.merges.encode_ordinary(text)]

    def decode(self, ids):
        return self.merges.decode([self.rank(i) for i in ids])

    def decode_single_token_bytes(self, i):
        return self.merges.decode_single_token_bytes(self.rank(i))

    def rank(self, i):
        if i not in self.rank_of_id:
            raise ValueError(f"{i} is not the id of a token of OPT's")
        return self.rank_of_id[i]


def read_vocabulary(vocab, merges):
    """The hub's two files -> {token: id}, {letter: byte}, and the tokens in the order of their merges.

    A byte is written as a letter: a visible one as itself, the other 68 as the letters from chr(256) on.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [i for i in range(256) if i not in visible]
    byte = {chr(i): i for i in visible} | {chr(256 + n): i for n, i in enumerate(rest)}
    try:
        ids = {token: int(i) for token, i in json.loads(vocab.read_text(encoding="utf-8")).items()}
        lines = merges.read_text(encoding="utf-8").split("\n")
        pairs = [line.split() for line in lines if line and not line.startswith("#version")]
        if not all(len(pair) == 2 and set("".join(pair)) <= byte.keys() for pair in pairs):
            raise ValueError("a merge is not two tokens")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{vocab} or {merges} is damaged ({error}); fetch both again") from None
    return ids, byte, [*byte, *("".join(pair) for pair in pairs)]
