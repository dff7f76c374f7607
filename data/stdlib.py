"""The embedded data set: the sources of the running Python's own library, without its tests.

    python data/stdlib.py          about 12 MB of text, no network

Whole files are held out for validation, so that nothing of them is seen in training.
"""
import platform
import random
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # where the package data is found
from data.common import Parser, any_output, fail, write

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@any_output()
def main():
    parser = Parser(__doc__)
    parser.add_data_flags("bytes")
    args = parser.parse_args()

    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not LEFT_OUT & set(p.relative_to(root).parts))
    if len(files) < 100:
        fail(f"this Python keeps no library sources in {root}; take another, or "
             "python data/text.py FILE")
    random.Random(1337).shuffle(files)
    texts = [p.read_text(encoding="utf-8", errors="ignore") for p in files]
    held_out = len(texts) // 20
    splits = dict(train="\n".join(texts[held_out:]), val="\n".join(texts[:held_out]))
    source = f"standard library of Python {platform.python_version()}, {len(files)} files"
    write("stdlib", splits, args.tokenizer, source, overwrite=args.overwrite)


if __name__ == "__main__":
    main()
