"""Any UTF-8 text file as a data set; its last tenth is the validation split.

    python data/text.py FILE       then: python train.py --data text
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # where the package data is found
from data.common import Parser, any_output, fail, write


def read(path):
    """The text of a file, which must be UTF-8 and not empty; a byte order mark is no part of it."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 (byte {error.start}); convert it first, e.g. iconv -t UTF-8")
    except (OSError, ValueError) as error:                  # a NUL in its name is one
        fail(f"cannot read {path}: {getattr(error, 'strerror', None) or error}")
    # UTF-16 without its mark reads as UTF-8, every other character a NUL.
    if text.count("\0") > len(text) // 10:
        fail(f"{path} is full of NUL bytes, as UTF-16 is; convert it first, "
             "e.g. iconv -f UTF-16LE -t UTF-8")
    if len(text) < 2:
        fail(f"{path} is empty; give a text of at least a few thousand characters")
    return text


def splits(text):
    """{split: text}: nine tenths to train on, the rest to validate."""
    cut = max(1, len(text) * 9 // 10)
    return dict(train=text[:cut], val=text[cut:])


@any_output()
def main():
    parser = Parser(__doc__)
    parser.add_argument("file", help="a UTF-8 text file")
    parser.add_argument("--name", default="text", help="folder in data/ to write")
    parser.add_data_flags("bytes")
    args = parser.parse_args()
    if not re.fullmatch(r"[A-Za-z0-9_-]+", args.name):
        fail(f"--name {args.name!r}: use letters, digits, - and _")

    write(args.name, splits(read(args.file)), args.tokenizer, Path(args.file).name,
          overwrite=args.overwrite)


if __name__ == "__main__":
    main()
