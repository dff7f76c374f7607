"""What the data sets and scripts share: flags and their mistakes, tokenizers, files that are
written whole, and the .bin files and meta.json of a data set."""
import argparse
import errno
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from data import download, hub, tokenizers

SCRIPTS = Path(__file__).resolve().parent
# Data sets are folders beside the scripts; beside out/ where nothing can be written there.
FOLDER = SCRIPTS if os.access(SCRIPTS, os.W_OK) else Path("data").resolve()
TOKENIZERS = "bytes (nothing to download), gpt2, opt or smollm2"         # for the help of flags
DAMAGED = (OSError, ValueError, KeyError, TypeError, RecursionError)     # what read_meta raises
DATA_SETS = ("shakespeare", "stdlib", "text", "wikipedia", "wikitext2")  # each of its own script


def fail(message):
    """A mistake that the user can mend: one line that says how, and exit status 2."""
    with suppress(OSError):                          # a terminal that was closed
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def one_line(*errors, hint=""):
    """Around code, or as a decorator: these errors are mistakes that the user can mend."""
    try:
        yield
    except errors as error:
        if isinstance(error, BrokenPipeError):
            raise                                        # any_output's
        fail(first_line(error) + (hint and "; " + hint))


@contextmanager
def any_output():
    """Around a script's main: what its output cannot show becomes ?, and where nobody reads any
    more, as behind head, it ends without a word, as after Ctrl-C. A SIGTERM leaves no half file."""
    if hasattr(sys.stdout, "reconfigure"):           # not where stdout is closed
        sys.stdout.reconfigure(errors="replace")
    try:
        with signals_to(ended, "SIGTERM"):
            yield
        print(end="", flush=True)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            fail(f"cannot write ({first_line(error)}); see to the disk")
        if error.errno not in (errno.EPIPE, errno.EIO):          # EIO: the terminal was closed
            raise
    finally:
        try:
            print(end="", flush=True)
        except OSError:                              # Python would try once more, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def signals_to(handler, *names):
    """Around code: who handles these signals; those that are ignored, as by nohup, stay so."""
    before = {}
    for name in names:
        number = getattr(signal, name, None)             # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def ended(number, frame):
    """Leave as sys.exit does, so that what is on its way is cleared away."""
    raise SystemExit(128 + number)


def number(kind, least, most=10 ** 9):
    """The type of a flag: an int or a float between two bounds; nan and inf are not."""
    def read(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return kind(text)
    read.__name__ = kind.__name__            # argparse names it: invalid int value
    return read


class Parser(argparse.ArgumentParser):
    """An argparse whose mistakes are one line; its help tells each default that is a value."""
    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            told = action.default not in (None, "") and not isinstance(action.default, bool)
            return super()._get_help_string(action) if told else action.help

    def __init__(self, description):
        super().__init__(description=description, formatter_class=self.Help)

    def error(self, message):
        fail(f"{message}; --help explains the flags")

    def add_data_flags(self, tokenizer):
        """The flags of every script that writes a data set, with their defaults."""
        self.add_argument("--tokenizer", default=tokenizer, help=TOKENIZERS)
        self.add_argument("--overwrite", action="store_true",
                          help="replace what another file or tokenizer made under this name")


def encoding(name, folder=None):
    """The tokenizer of that name, see data/tokenizers.py; its files are in folder, or as usual."""
    if folder is None and name == "smollm2":
        folder = FOLDER / "smollm2"
        if not (folder / "vocab.json").is_file():
            fail("the smollm2 tokenizer is not here; python data/smollm2.py fetches it with its "
                 "model, or take --tokenizer bytes")
    with one_line(ValueError):
        return tokenizers.encoding(name, folder or hub.OPTS[0])


def make_folder(name):
    """The folder data/NAME, made if it is not there."""
    with one_line(OSError, hint="see to it, or run this in a folder where you may write"):
        (FOLDER / name).mkdir(parents=True, exist_ok=True)
    return FOLDER / name


def write(name, texts, tokenizer, source, folder=None, overwrite=False):
    """Tokenise {split: text or list of texts} into data/NAME/SPLIT.bin, and meta.json last.

    Texts of a list are parted by the tokenizer's end-of-text token, or by blank lines without one.
    A data set that was made of something else stays, unless `overwrite` is given.
    """
    enc = encoding(tokenizer, folder)
    target = make_folder(name)
    tokens = {split: np.array(tokens_of(enc, text), np.uint16) for split, text in texts.items()}
    counts = {split: len(ids) for split, ids in tokens.items()}
    meta = dict(tokenizer=tokenizer, vocab_size=enc.n_vocab, tokens=counts, source=source)
    if not overwrite:
        check_same_data(name, meta)

    for split, ids in tokens.items():
        write_whole(target / f"{split}.bin", ids.tobytes())
    write_whole(target / "meta.json", json.dumps(meta, indent=1).encode())
    uses = ("tokens to train on", "to validate", "to test")
    shown = [f"{count:,} {use}" for count, use in zip(counts.values(), uses)]
    print(f"data/{name}: {', '.join(shown)} ({tokenizer})")


def check_same_data(name, meta):
    """Stop if data/NAME is a data set of another text or tokenizer; a damaged one is none."""
    try:
        before = read_meta(FOLDER / name / "meta.json")
    except DAMAGED:
        return
    changed = [f"{key} was {before[key]!r}, now {value!r}" for key, value in meta.items()
               if before[key] != value]
    if changed:
        fail(f"data/{name} is there already, of something else ({'; '.join(changed)}); "
             "--overwrite replaces it")


def tokens_of(enc, text):
    """The ids of a text, or of a list of texts that each end with the end-of-text token."""
    if isinstance(text, str):
        return enc.encode_ordinary(text)
    if enc.eot is None:
        return enc.encode_ordinary("\n\n\n".join(text))
    tokens = []
    for one in text:
        tokens += enc.encode_ordinary(one)
        tokens.append(enc.eot)
    return tokens


@contextmanager
def whole_file(path):
    """A file to write, which comes to `path` when it is whole; a kill leaves the old one.

    It has a name of its own until then, so that two processes do not write into one file.
    """
    part = download.own_name(path)
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        cause = first_line(first_cause(error))
        fail(f"cannot write {path} ({cause}); see to the disk and the folder")
    finally:
        with suppress(OSError):                  # what failed first is what matters
            part.unlink(missing_ok=True)


def first_cause(error):
    """The OSError behind an error: torch.save makes a RuntimeError of a full disk."""
    while not isinstance(error, OSError) and error.__context__:
        error = error.__context__
    return error


def write_whole(path, content):
    """Write a file whole or not at all."""
    with whole_file(path) as file:
        file.write(content)


def prepare_stdlib():
    """The embedded data set, if it is not there: that takes nothing but Python."""
    if not (FOLDER / "stdlib" / "meta.json").exists():
        if subprocess.run([sys.executable, SCRIPTS / "stdlib.py"]).returncode:
            raise SystemExit(2)


def load(name, held_out="val"):
    """data/NAME -> tokens (uint16) of the splits train and `held_out`, and meta."""
    folder = FOLDER / name
    shown = Path("data") / name                      # a whole path stays as it is
    own_script = name in DATA_SETS and name != "text"
    script = f"{name}.py" if own_script else f"text.py FILE --name {folder.name}"
    again = f"prepare it again: python data/{script}"
    if not (folder / "meta.json").is_file():
        there = sorted(path.parent.name for path in FOLDER.glob("*/meta.json"))
        fail(f"no data set data/{name}; ready: {', '.join(there) or 'none'}; "
             f"`python data/NAME.py` prepares NAME, one of {', '.join(DATA_SETS)}")
    try:
        meta = read_meta(folder / "meta.json")
    except DAMAGED:
        fail(f"{shown}/meta.json is damaged; {again}")
    splits = []
    for split in "train", held_out:
        if split not in meta["tokens"]:
            fail(f"{shown} has no {split} split; it has {', '.join(meta['tokens'])}")
        splits.append(read_split(folder / f"{split}.bin", split, meta, again))
    return *splits, meta


def read_meta(path):
    """meta.json, which must say what load needs."""
    meta = json.loads(path.read_text(encoding="utf-8"))
    int(meta["vocab_size"])
    dict(meta["tokens"])
    for needed in ("tokenizer", "source"):
        meta[needed]
    return meta


def read_split(path, split, meta, again):
    """The tokens of a split; in memory, where no other program changes them."""
    shown = f"data/{path.parent.name}/{path.name}"
    if not path.is_file() or path.stat().st_size != 2 * meta["tokens"][split]:
        fail(f"{shown} is missing or cut off; {again}")
    with one_line(OSError):
        tokens = np.fromfile(path, np.uint16)
    if len(tokens) and tokens.max() >= int(meta["vocab_size"]):
        fail(f"{shown} holds token {tokens.max()}, {meta['tokenizer']} has {meta['vocab_size']}; "
             f"{again}")
    return tokens


def windows(data, starts, context, device):
    """Inputs and targets (N, context) int64 from the given starts: the targets are one token on."""
    rows = [data[start:start + context + 1].astype("int64") for start in starts.tolist()]
    rows = torch.from_numpy(np.stack(rows))
    return rows[:, :-1].to(device), rows[:, 1:].to(device)


def random_batch(data, context, batch_size, seed, device):
    """Windows from random starts; equal seeds give equal batches."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - context, (batch_size,), generator=generator)
    return windows(data, starts, context, device)


def fetched(url, name, file, again):
    """The path of data/NAME/FILE, downloaded if it is not there, or `again`."""
    path = FOLDER / name / file
    if again or not path.exists():
        with one_line(ValueError):
            download.fetch(url, path, "give a mirror or a file:// address by --url")
    return path
