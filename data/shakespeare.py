"""Tiny Shakespeare: 1.1 MB of plays, the first text of many language models.

    python data/shakespeare.py     then: python train.py --data shakespeare
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # where the package data is found
from data.common import Parser, any_output, fetched, write
from data.text import read, splits

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@any_output()
def main():
    parser = Parser(__doc__)
    parser.add_argument("--url", default=URL, help="where to download from: http, https or file")
    parser.add_data_flags("bytes")
    args = parser.parse_args()

    text = read(fetched(args.url, "shakespeare", "input.txt", args.overwrite))
    write("shakespeare", splits(text), args.tokenizer, args.url, overwrite=args.overwrite)


if __name__ == "__main__":
    main()
