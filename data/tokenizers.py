"""Tokenizers: tiktoken.Encodings, and published ones that are used alike.

`eot`: the id of the end-of-text token, None without one; `bos`, where texts begin with a token.
"""
import json

import tiktoken

from data import hub

FILES = ("vocab.json", "merges.txt")               # of a published tokenizer, as on the hub


def encoding(name, folder=None):
    """The tokenizer bytes, gpt2, opt or smollm2; a ValueError says why it cannot be had.

    folder: of the last two, a model's folder or its name on the hub.
    """
    if name in PUBLISHED:
        return PUBLISHED[name](folder)
    if name == "bytes":
        return bytes_encoding()
    if name == "gpt2":
        return gpt2_encoding()
    raise ValueError(f"no tokenizer is called {name!r}; there are {', '.join(NAMES)}")


def bytes_encoding():
    ranks = {bytes([i]): i for i in range(256)}
    enc = tiktoken.Encoding("bytes", pat_str="(?s:.)", mergeable_ranks=ranks, special_tokens={})
    enc.eot = None
    return enc


def gpt2_encoding():
    try:
        enc = tiktoken.get_encoding("gpt2")
    except OSError as error:       # tiktoken fetches the merges once, by requests: OSErrors
        raise ValueError(f"the gpt2 tokenizer could not be downloaded ({type(error).__name__}); "
                         "take --tokenizer bytes") from None
    enc.eot = enc.eot_token
    return enc


class HubEncoding:
    """Byte pairs, numbered as in a model's vocabulary; it is used as a tiktoken.Encoding is.

    In tiktoken a token's id is also its turn among the merges; here ids may be in another order. So
    text is merged under the ranks of the merges, and a table turns ranks into ids. As in tiktoken's
    encode_ordinary, the name of a special token in a text is no special token.
    """

    def __init__(self, folder):
        vocab, merges = [hub.model_file(folder, file) for file in FILES]
        ids, byte, tokens = read_vocabulary(vocab, merges)
        ranks = {bytes(byte[letter] for letter in token): n for n, token in enumerate(tokens)}
        special = {name: len(ranks) + n for n, name in enumerate(self.SPECIAL)}
        self.id_of_rank = [ids.get(token) for token in (*tokens, *self.SPECIAL)]
        self.rank_of_id = {i: n for n, i in enumerate(self.id_of_rank) if i is not None}
        # A byte may have no id, where the tokenizer's own text never held it.
        unnumbered = self.id_of_rank[:256].count(None)
        one_to_one = len(self.rank_of_id) + unnumbered == len(ranks) + len(special)
        names = self.id_of_rank[len(ranks):] == list(range(len(special)))
        # Few ids have no merge: <mask>, madeupword0000; many where lines of merges are lost.
        if not one_to_one or not names or len(ids) - len(self.rank_of_id) > 16:
            raise ValueError(f"{vocab} does not number the tokens of {merges} as {self.NAME} does; "
                             "fetch both again")
        self.ids = sorted(self.rank_of_id)           # numbers between them may have no token
        self.merges = tiktoken.Encoding(self.NAME, pat_str=self.WORDS, mergeable_ranks=ranks,
                                        special_tokens=special)
        self.n_vocab = max(ids.values()) + 1         # a model's embedding may have more rows

    def encode_ordinary(self, text):
        ids = [self.id_of_rank[rank] for rank in self.merges.encode_ordinary(text)]
        return [i for i in ids if i is not None]

    def decode(self, ids):
        return self.merges.decode([self.rank(i) for i in ids])

    def decode_single_token_bytes(self, i):
        return self.merges.decode_single_token_bytes(self.rank(i))

    def rank(self, i):
        if i not in self.rank_of_id:
            raise ValueError(f"{i} is not the id of a token of {self.NAME}'s")
        return self.rank_of_id[i]


class OPTEncoding(HubEncoding):
    """OPT's: GPT-2's words and merges. A text begins with </s>, whose id is enc.bos."""
    NAME = "OPT"
    WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")      # ids 0 to 3
    bos = 2
    eot = 2


class SmolLM2Encoding(HubEncoding):
    """SmolLM2's: each digit is a word, and the words between digits are GPT-2's."""
    NAME = "SmolLM2"
    WORDS = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++"
             r"|\s++$|\s++(?=\p{N})|\s+(?!\S)|\s")
    SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>",
               "<file_sep>", "<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>",
               "<issue_closed>", "<jupyter_start>", "<jupyter_text>", "<jupyter_code>",
               "<jupyter_output>", "<jupyter_script>", "<empty_output>")         # ids 0 to 16
    eot = 0


PUBLISHED = dict(opt=OPTEncoding, smollm2=SmolLM2Encoding)
NAMES = ("bytes", "gpt2", *PUBLISHED)


def letters():
    """{letter: byte}: a visible byte is itself, the others are the letters from chr(256) on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [i for i in range(256) if i not in visible]
    return {chr(i): i for i in visible} | {chr(256 + n): i for n, i in enumerate(rest)}


def read_vocabulary(vocab, merges):
    """The hub's two files -> {token: id}, {letter: byte}, and the tokens in the order of merges."""
    byte = letters()
    try:
        ids = {token: int(i) for token, i in json.loads(vocab.read_text(encoding="utf-8")).items()}
        lines = merges.read_text(encoding="utf-8").split("\n")
        pairs = [line.split() for line in lines if line and not line.startswith("#version")]
        if not all(len(pair) == 2 and set("".join(pair)) <= byte.keys() for pair in pairs):
            raise ValueError("a merge is not two tokens")
        if not all(0 <= i < 2 ** 16 for i in ids.values()):
            raise ValueError("an id is not from 0 to 65535")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{vocab} or {merges} is damaged ({error}); fetch both again") from None
    return ids, byte, list(byte) + ["".join(pair) for pair in pairs]
