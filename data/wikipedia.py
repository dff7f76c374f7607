"""English Wikipedia: 103 articles of 2016, all on A, cleaned to 2.8 MB of plain text.

    python data/wikipedia.py       then: python distill.py --teacher data/smollm2 --data wikipedia

The articles are test data in the wheel of gensim 4.4.0 (27.8 MB). One in ten is held out whole.
Their text is licensed CC BY-SA 3.0, see data/wikipedia/SOURCE.txt.
"""
import bz2
import random
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # where the package data is found
from data import download
from data.common import (Parser, any_output, encoding, fail, make_folder, one_line,
                         write, write_whole)
from data.markup import clean

REQUIREMENT = "gensim==4.4.0"
SHA256 = "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"
# One and the same wheel for every system: only a file in it is read.
FLAGS = ("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311",
         "--platform", "manylinux_2_28_x86_64")
DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
OTHERWISE = ("get that wheel, or a dump of Wikipedia (.xml.bz2), elsewhere and give it by --file, "
             "or take another data set")
LARGEST = 100_000_000              # bytes of XML that are read; gensim's are 6 million
SOURCE = """{count} articles of the English Wikipedia, from {origin}, cleaned to plain text.
Their authors are in the histories of the articles, https://en.wikipedia.org/wiki/TITLE.
Licence: Creative Commons Attribution-ShareAlike 3.0 (CC BY-SA 3.0),
https://creativecommons.org/licenses/by-sa/3.0/

"""


def read_dump(path):
    """The XML of a wheel's dump, or of a dump itself, unpacked no further than it may be large."""
    content = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(f"gensim/test/test_data/{DUMP}")
            if member.file_size > LARGEST:
                raise ValueError(f"its dump is larger than {LARGEST:,} bytes")
            content = archive.read(member)
    unpacker = bz2.BZ2Decompressor()
    xml = unpacker.decompress(content, LARGEST)
    if not unpacker.eof:
        raise ValueError(f"it is cut off, or larger than {LARGEST:,} bytes unpacked")
    return content, xml


def articles(xml):
    """[(title, text)] of the articles, without redirects and those of a few lines."""
    root = ElementTree.fromstring(xml)
    space = root.tag.removesuffix("mediawiki")
    found = []
    for page in root.iter(f"{space}page"):
        title = page.findtext(f"{space}title") or ""
        text = page.findtext(f"{space}revision/{space}text") or ""
        if page.find(f"{space}redirect") is None and page.findtext(f"{space}ns") == "0":
            found.append((title, f"{title}\n\n{clean(text)}"))
    return [(title, text) for title, text in found if len(text) > 1000]


@any_output()
def main():
    parser = Parser(__doc__)
    parser.add_argument("--file", type=Path,
                        help="the wheel, or a dump of Wikipedia (.xml.bz2): no download")
    parser.add_data_flags("smollm2")
    args = parser.parse_args()

    encoding(args.tokenizer)                          # what is missing is said before any download
    folder = make_folder("wikipedia")
    kept = folder / DUMP
    with one_line(OSError), tempfile.TemporaryDirectory(dir=folder) as aside:
        path = args.file or kept
        if not args.file and not kept.is_file():
            print(f"fetching {REQUIREMENT} by pip: 27.8 MB, of which 1.7 MB are kept")
            with one_line(ValueError, hint=OTHERWISE):
                path = download.wheel(REQUIREMENT, SHA256, aside, FLAGS)
        try:
            content, xml = read_dump(path)
            found = articles(xml)
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, zlib.error,
                zipfile.BadZipFile, ElementTree.ParseError) as error:
            fail(f"{path} holds no dump of Wikipedia ({error}); {OTHERWISE}")
    if len(found) < 2:
        fail(f"{path} has {len(found)} articles with text; it takes 2 at least")
    if not args.file and path != kept:
        write_whole(kept, content)

    # Whole articles are held out, so that nothing of them is seen in training.
    random.Random(1337).shuffle(found)
    held_out = max(1, len(found) // 10)
    origin = args.file.name if args.file else f"{REQUIREMENT}'s test data"
    credit = SOURCE.format(count=len(found), origin=origin) + "\n".join(title for title, _ in found)
    texts = [text for _, text in found]
    write("wikipedia", dict(train=texts[held_out:], val=texts[:held_out]), args.tokenizer, origin,
          overwrite=args.overwrite)
    write_whole(folder / "SOURCE.txt", (credit + "\n").encode())


if __name__ == "__main__":
    main()
