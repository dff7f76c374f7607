"""
Make tests/golden/tokenizer: a small tokenizer of SmolLM2's kind, and what `tokenizers` says of texts.

    pip install tokenizers
    python data/smollm2.py; python tests/make_golden_tokenizer.py        # test_data.py reads the files

texts.json holds the ids of the small tokenizer, and those of SmolLM2's own vocabulary.
"""
import json
import sysconfig
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

FOLDER = Path(__file__).resolve().parent / "golden" / "tokenizer"
SMOLLM2 = Path(__file__).resolve().parents[1] / "data" / "smollm2"
TEXTS = [
    "", "a", " ", "   ", "\n", "\n\n  \n", "\t\ttabs\tand  two spaces ", " leading", "a\r\nb", "trailing  ",
    "Hello, world! It's the student's; they'll see, we've seen, I'd say I'm DON'T.",
    "def f(self, x=None):\n    if x is not None:\n        return [i ** 2 for i in range(10)]\n\n# end",
    "3.14159 2024-05-07 1000000 0x1F x2y3", "a  3", "a   33  4 \n5\n\n6", "'s3 's 3's", "½ ² Ⅷ ٣ 4½",
    "naïve café Straße Ångström", "Привет, мир", "日本語のテキスト、漢字", "שלום عالم", "emoji 😀👩‍👩‍👧🏽 🇨🇭!",
    "zero\u200bwidth\u00a0no-break\u3000wide\u2028line", "e\u0301 \u0000\u0007\x7f\x85", "=" * 70,
    " " * 200 + "x", " " * 50 + "7", "<|endoftext|> <|im_start|>user", "bytes \x04without\x13 ids \U00050000",
]


def tokenizer(model):
    """As the file tokenizer.json of SmolLM2 says."""
    made = Tokenizer(model)
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return made


def read(folder):
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
    return tokenizer(models.BPE(vocab, [tuple(line.split(" ")) for line in lines if line]))


def main():
    special = list(json.loads((SMOLLM2 / "vocab.json").read_text(encoding="utf-8")))[:17]
    small = tokenizer(models.BPE())
    source = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text()
    texts = [source, *20 * TEXTS[:-1]]                     # not of the bytes without ids
    small.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    FOLDER.mkdir(parents=True, exist_ok=True)
    small.model.save(str(FOLDER))
    ids = [read(FOLDER).encode(text).ids for text in TEXTS]
    smollm2 = [read(SMOLLM2).encode(text).ids for text in TEXTS]
    golden = json.dumps(dict(texts=TEXTS, ids=ids, smollm2=smollm2))
    (FOLDER / "texts.json").write_text(golden)


if __name__ == "__main__":
    main()
