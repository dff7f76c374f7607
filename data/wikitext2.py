"""WikiText-2, raw: 13 MB of Wikipedia in three splits, the text on which the paper measures OPT.

    python data/wikitext2.py       then: python distill.py --teacher facebook/opt-125m
"""
import sys
import zipfile
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # where the package data is found
from data.common import Parser, any_output, fail, fetched, write

URL = "https://wikitext.smerity.com/wikitext-2-raw-v1.zip"
SPLITS = dict(train="wiki.train.raw", val="wiki.valid.raw", test="wiki.test.raw")
MOST = 100_000_000                 # bytes a split; the largest has 11 million


def read_splits(path):
    """{split: text} of the zip's three files, in whatever folder they are."""
    texts = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = {Path(member.filename).name: member for member in archive.infolist()}
            for split, name in SPLITS.items():
                if members[name].file_size > MOST:
                    raise zipfile.BadZipFile(f"{name} is too large")
                texts[split] = archive.read(members[name]).decode("utf-8")
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError, ValueError) as error:
        fail(f"{path} is damaged or not the raw WikiText-2 ({error}); give another --file, or let "
             "--overwrite fetch it again")
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    return texts


@any_output()
def main():
    parser = Parser(__doc__)
    parser.add_argument("--url", default=URL, help="of the zip: http, https or file")
    parser.add_argument("--file", type=Path, help="the zip, if it is here: no download")
    parser.add_data_flags("opt")
    parser.add_argument("--opt-folder",
                        help="folder with OPT's vocab.json and merges.txt (default: they are "
                        "downloaded once, to ~/.cache/nanosea/facebook/opt-125m)")
    args = parser.parse_args()

    path = args.file or fetched(args.url, "wikitext2", "wikitext-2-raw-v1.zip", args.overwrite)
    source = str(args.file.name) if args.file else args.url
    folder = args.opt_folder if args.tokenizer == "opt" else None
    write("wikitext2", read_splits(path), args.tokenizer, source, folder, args.overwrite)


if __name__ == "__main__":
    main()
