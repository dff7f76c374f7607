"""WikiText-2, raw: 13 MB of Wikipedia articles in three splits, the text on which the paper measures OPT.

    python data/wikitext2.py       then: python distill.py --teacher facebook/opt-125m
"""
import sys
import zipfile
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # where the package data is found
from data.common import FOLDER, Parser, download, fail, write

URL = "https://wikitext.smerity.com/wikitext-2-raw-v1.zip"


def read_splits(path):
    """{split: text} of the zip's wiki.train.raw, wiki.valid.raw and wiki.test.raw, in whatever folder."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {Path(member).name: member for member in archive.namelist()}
            return {split: archive.read(members[f"wiki.{name}.raw"]).decode("utf-8")
                    for split, name in (("train", "train"), ("val", "valid"), ("test", "test"))}
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, UnicodeDecodeError) as error:
        fail(f"{path} is damaged or not the raw WikiText-2 ({error}); delete it and run this again")


def main():
    parser = Parser(__doc__)
    parser.add_argument("--url", default=URL, help="of the zip: http, https or file")
    parser.add_argument("--tokenizer", default="opt", help="opt, gpt2 or bytes")
    parser.add_argument("--opt-folder", help="folder with OPT's vocab.json and merges.txt (default: they are "
                                             "downloaded once, to ~/.cache/nanosea/facebook/opt-125m)")
    args = parser.parse_args()

    path = FOLDER / "wikitext2" / "wikitext-2-raw-v1.zip"
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        download(args.url, path)
    write("wikitext2", read_splits(path), args.tokenizer, args.url, args.opt_folder)


if __name__ == "__main__":
    main()
