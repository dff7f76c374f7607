"""What the data sets and scripts share: flags and their mistakes, tokenizers, files that are written whole,
and the .bin files and meta.json of a data set."""
import argparse
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tiktoken
import torch

from data import hub

FOLDER = Path(__file__).resolve().parent


def fail(message):
    """A mistake that the user can mend: one line that says how, and exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def one_line(*errors, hint=""):
    """Around code, or as a decorator: these errors are mistakes that the user can mend, see fail."""
    try:
        yield
    except errors as error:
        fail(first_line(error) + (hint and "; " + hint))


def number(kind, least, most=10 ** 9):
    """The type of a flag, for argparse: an int or a float between two bounds. nan and inf are not."""
    def read(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return kind(text)
    read.__name__ = kind.__name__            # argparse names it: invalid int value
    return read


class Parser(argparse.ArgumentParser):
    """An argparse whose mistakes are one line, and whose help keeps the text above and tells each default."""
    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    def __init__(self, description):
        super().__init__(description=description, formatter_class=self.Help)

    def error(self, message):
        fail(f"{message}; --help explains the flags")


def encoding(name, opt_folder=None):
    """The tokenizer `bytes` (256 ranks, nothing to download), `gpt2` or `opt`: a tiktoken.Encoding, or alike.

    opt reads vocab.json and merges.txt in opt_folder; without one, those of facebook/opt-125m, fetched once.
    """
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str="(?s:.)", mergeable_ranks=ranks, special_tokens={})
    if name not in ("gpt2", "opt"):
        fail(f"no tokenizer is called {name!r}; there are bytes, gpt2 and opt")
    try:
        if name == "opt":
            return hub.OPTEncoding(*(hub.model_file(opt_folder or hub.MODELS[0], file)
                                     for file in ("vocab.json", "merges.txt")))
        return tiktoken.get_encoding("gpt2")
    except OSError as error:       # tiktoken fetches the merges once, by requests, whose errors are OSErrors
        fail(f"the {name} tokenizer could not be downloaded ({type(error).__name__}); take --tokenizer bytes")
    except ValueError as error:
        fail(error)


def write(name, texts, tokenizer, source, opt_folder=None):
    """Tokenise {split: text} into data/NAME/SPLIT.bin, each moved into place when whole, meta.json last."""
    enc, folder, counts = encoding(tokenizer, opt_folder), FOLDER / name, {}
    folder.mkdir(exist_ok=True)
    for split, text in texts.items():
        tokens = np.array(enc.encode_ordinary(text), dtype=np.uint16)
        write_whole(folder / f"{split}.bin", tokens.tobytes())
        counts[split] = len(tokens)
    meta = dict(tokenizer=tokenizer, vocab_size=enc.n_vocab, tokens=counts, source=source)
    write_whole(folder / "meta.json", json.dumps(meta, indent=1).encode())
    shown = zip(counts.values(), ("tokens to train on", "to validate", "to test"))
    print(f"data/{name}: {', '.join(f'{n:,} {use}' for n, use in shown)} ({tokenizer})")


@contextmanager
def whole_file(path):
    """A file to write, which comes to `path` when it is whole and on the disk: a kill leaves the old one."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:             # torch.save turns some OSErrors into RuntimeErrors
        fail(f"cannot write {path} ({first_line(error)}); see to the disk and the folder")
    finally:
        part.unlink(missing_ok=True)


def write_whole(path, content):
    """Write a file whole or not at all."""
    with whole_file(path) as file:
        file.write(content)


def load(name, split=None):
    """data/NAME -> train tokens, validation tokens (uint16 arrays), meta; or tokens of `split`, meta.
    Whatever is wrong is said."""
    scripts = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in ("common", "engine", "hub"))
    folder = FOLDER / name
    again = f"prepare it again: python data/{name if name in scripts else 'text'}.py"
    if not (folder / "meta.json").is_file():
        there = sorted(p.parent.name for p in FOLDER.glob("*/meta.json"))
        fail(f"no data set data/{name}; ready: {', '.join(there) or 'none'}; "
             f"`python data/NAME.py` prepares NAME, one of {', '.join(scripts)}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        vocab_size, expected, tokenizer = int(meta["vocab_size"]), dict(meta["tokens"]), meta["tokenizer"]
        meta["source"]
    except (ValueError, KeyError, TypeError):
        fail(f"data/{name}/meta.json is damaged; {again}")
    splits = []
    for split in ("train", "val") if split is None else (split,):
        path = folder / f"{split}.bin"
        if split not in expected:
            fail(f"data/{name} has no {split} split; it has {', '.join(expected)}")
        if not path.is_file() or path.stat().st_size != 2 * expected[split]:
            fail(f"data/{name}/{split}.bin is missing or cut off; {again}")
        splits.append(np.fromfile(path, np.uint16))       # in memory, where no other program changes it
        if len(splits[-1]) and splits[-1].max() >= vocab_size:
            fail(f"data/{name}/{split}.bin holds token {splits[-1].max()}, {tokenizer} has {vocab_size}; "
                 f"{again}")
    return *splits, meta


def windows(data, starts, context, device):
    """Inputs and targets (N, context) int64 from the given starts: the targets are one token on."""
    rows = torch.stack([torch.from_numpy(data[i:i + context + 1].astype("int64")) for i in starts.tolist()])
    return rows[:, :-1].to(device), rows[:, 1:].to(device)


def random_batch(data, context, batch_size, seed, device):
    """Windows from random starts; equal seeds give equal batches."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - context, (batch_size,), generator=generator)
    return windows(data, starts, context, device)


def download(url, path):
    """hub.fetch for a script that has the flag --url."""
    with one_line(ValueError):
        hub.fetch(url, path, "give a mirror or a file:// address by --url")
