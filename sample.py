"""
Write text with a model that train.py or distill.py made, or look at what its attention selects.

    python sample.py                            from out/sea-stdlib/ckpt.pt
    python sample.py --prompt "def main():" --max-new-tokens 500 --temperature 0.5
    python sample.py --prompt "$(head -c 120 sea.py)" --page page.html        then open page.html
    python sample.py --checkpoint data/smollm2 --attention sea --prompt "The sea"
"""
import base64
import codecs
import json
import sys
import time
import zlib
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))      # python -P leaves it out
import sea
from data import engine
from data.common import Parser, any_output, fail, number, one_line, write_whole
from model import ATTENTIONS

TEMPLATE = Path(__file__).resolve().parent / "assets" / "attention.html"
ROOM = 1_800_000        # bytes of heads in a page, so that it can be mailed
LEAST = 0.001, 0.01     # shares that a page shows, from the first of these that lets all heads fit
MOST_TOKENS = 512       # in a page, which holds T x T numbers of each head
SMALL = 32              # pixels of a thumbnail's side


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument_group("text").add_argument
    add("--prompt", default="class Queue:\n    def ", help="text to go on from")
    add("--max-new-tokens", type=number(int, 1), default=500, help="tokens to write")
    add("--temperature", type=number(float, 0), default=0.7, help="0 takes the likeliest")
    add("--top-k", type=number(int, 0), default=0, help="choose among K likeliest tokens; 0: all")
    add("--seed", type=number(int, 0), default=1337, help="of the choices")
    add = parser.add_argument_group("attention").add_argument
    add("--attention", choices=ATTENTIONS, help="in place of the model's own")
    add("--keys-per-query", type=number(int, 1), metavar="K",
        help="keys that a query of SEA chooses; None: as trained")
    add("--page", type=Path, metavar="FILE", help="write a page of the prompt's attention instead")
    add("--layers", type=number(int, 0), nargs="+", metavar="N",
        help="layers in that page, from 0; None: all, or as many as 2 MB hold")
    add = parser.add_argument_group("running").add_argument
    add("--checkpoint", default="out/sea-stdlib/ckpt.pt",
        help="a checkpoint, a folder in the hub's format, or a name there")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto: a GPU if any")
    add("--no-kernels", dest="kernels", action="store_false", help="plain PyTorch on a GPU")
    args = parser.parse_args()
    args.device = engine.pick_device(args.device)
    if args.layers and not args.page:
        fail("--layers chooses what --page FILE shows; give both")
    if args.page and (args.page.is_dir() or not args.page.parent.is_dir()):
        fail(f"cannot write --page {args.page}; name a file in a folder that exists")
    if args.page and not args.prompt:
        fail("--page shows the attention in a text; give the text by --prompt")
    return args


def load(args):
    """The model, with the attention and the keys that are asked for, and its tokenizer."""
    model, tokenizer, _ = engine.load_model(args.checkpoint, args.device)
    attention = args.attention or model.config.attention
    if args.page and attention != "sea":
        fail(f"{args.checkpoint} is a model with {attention} attention, which has no estimate to "
             "show; give --attention sea")
    if args.keys_per_query and attention not in ("sea", "paper", "window"):
        fail(f"{attention} attention chooses no keys; leave out --keys-per-query")
    if max(args.layers or [0]) >= model.config.n_layer:
        fail(f"--layers: this model has layers 0 to {model.config.n_layer - 1}")
    if attention != model.config.attention:
        model = model.with_attention(attention)
    if args.keys_per_query:
        model.config.keys_per_query = args.keys_per_query
    enc = engine.load_encoding(tokenizer, args.checkpoint)
    if enc.n_vocab > model.config.vocab_size:
        fail(f"{args.checkpoint} knows {model.config.vocab_size} tokens, its tokenizer has "
             f"{enc.n_vocab}; take the tokenizer's files of that model")
    return model.eval(), enc


# --------------------------------------------------------------------------------------------------
# The page

@torch.no_grad()
def pictures(model, idx):
    """For each layer, of one sequence idx (1, T): the estimate, the mask, the attention used and
    the dense attention of the same q and k, (H, T, T) each."""
    c = model.config
    for q, k in [(layer.q, layer.k) for layer in model(idx, trace=True).trace]:
        shown = sea.estimated_attention(q, k, c.block_size, c.keys_per_query, c.coarse)
        # With a budget of all keys it is dense.
        dense = sea.estimated_attention(q, k, c.block_size, idx.shape[1], c.coarse)[2]
        yield [picture[0].float() for picture in (*shown, dense)]


def shades(share, most=255, least=0):
    """Bytes of shares: the cube root keeps 1 % and 2 % well apart. Those below least become 0."""
    return (most * share.masked_fill(share < least, 0) ** (1 / 3)).round().byte()


def compress(content):
    return base64.b64encode(zlib.compress(content.cpu().numpy())).decode()


def pack(estimate, mask, used, dense, block_size, least):
    """What a page holds of a head: of T queries the attention that SEA missed, of T x W blocks the
    estimate, 128 more where they are chosen, of T x T keys the attention that is used or, outside
    the mask, was missed."""
    first_keys = slice(0, len(mask) // block_size * block_size, block_size)
    blocks = shades(block_size * estimate[:, first_keys], 127, least)
    blocks += 128 * mask[:, first_keys].byte()
    missed = dense * (1 - mask)
    keys = shades(used + missed, 255, least)
    return compress(torch.cat((shades(missed.sum(-1)), blocks.flatten(), keys.flatten())))


def thumbnails(mask, dense):
    """Heads (H, T, T) as small pictures of their peaks, 128 more where SEA missed the peak."""
    peaks = torch.stack((dense * mask, dense * (1 - mask)))
    used, missed = F.adaptive_max_pool2d(peaks, SMALL)               # (H, SMALL, SMALL)
    return shades(torch.maximum(used, missed), 127) + 128 * (missed > used).byte()


def layers_that_fit(sizes):
    """All layers or, evenly from first to last, as many as there is room for, one at least."""
    for count in range(len(sizes), 0, -1):
        layers = torch.linspace(0, len(sizes) - 1, count).round().long().tolist()
        if sum(sizes[i] for i in layers) <= ROOM:
            break
    return layers


def texts_of(tokens):
    """The text of each token; of a character that several make, the last has it, others none."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="backslashreplace")
    texts = [decoder.decode(token) for token in tokens]
    texts[-1] += decoder.decode(b"", final=True)
    return texts


def write_page(model, enc, idx, path, layers):
    """Put the text and the attention of all heads into a copy of the template: one file for all."""
    c = model.config
    for least in LEAST:
        heads, glance = [], []
        for layer in pictures(model, idx):
            heads.append([pack(*head, c.block_size, least) for head in zip(*layer)])
            glance.append(thumbnails(layer[1], layer[3]))
        sizes = [len("".join(heads[i])) for i in layers or range(c.n_layer)]
        if sum(sizes) <= ROOM:
            break
    layers = sorted(set(layers or layers_that_fit(sizes)))
    tokens = texts_of([enc.decode_single_token_bytes(i) for i in idx[0].tolist()])
    data = dict(tokens=tokens, block_size=c.block_size, n=max(1, c.keys_per_query // c.block_size),
                least=least, count=c.n_layer, heads=c.n_head, glance=compress(torch.stack(glance)),
                layers={i: heads[i] for i in layers})
    data = json.dumps(data).replace("<", "\\u003c")              # no text can end the page's script
    page = TEMPLATE.read_text(encoding="utf-8").replace("PAGE_DATA", data).encode()
    write_whole(path, page)
    size = f"{len(tokens)} tokens, {len(page) / 1e6:.2f} MB"
    others = f"of 0 to {c.n_layer - 1}; --layers chooses others" if len(layers) < c.n_layer else ""
    print(f"{path}: {size}, layers", *layers, others)


# --------------------------------------------------------------------------------------------------
# The text

def write_text(model, enc, idx, args):
    torch.manual_seed(args.seed)
    # A character may span several tokens; half a surrogate pair of the prompt cannot be shown.
    to_text = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(args.prompt.encode(errors="replace").decode(), end="")
    ids = torch.tensor(enc.ids, device=args.device) if hasattr(enc, "ids") else None
    precision, _ = engine.pick_precision(args.device)
    choice = args.temperature, args.top_k or None, ids
    tokens = 0
    begin = time.perf_counter()
    with precision, suppress(KeyboardInterrupt):           # Ctrl-C ends the text
        for token in model.stream(idx, args.max_new_tokens, *choice):
            tokens += 1
            if token.item() == enc.eot:
                break
            print(to_text.decode(enc.decode_single_token_bytes(token.item())), end="", flush=True)
    print(to_text.decode(b"", final=True))
    seconds = time.perf_counter() - begin
    print(f"{tokens / seconds:.1f} tokens/s, {engine.peak_memory(args.device):.2f} GiB",
          file=sys.stderr)


@any_output()
@one_line(MemoryError, torch.OutOfMemoryError, hint="shorten the prompt")
@one_line(OSError, FloatingPointError)
def main():
    args = parse_arguments()
    engine.pick_backend(args.device, args.kernels)
    model, enc = load(args)
    prompt = [enc.bos] if hasattr(enc, "bos") else []                  # OPT's texts begin with </s>
    prompt += enc.encode_ordinary(args.prompt or "\n")
    most = min(model.config.context, MOST_TOKENS if args.page else model.config.context)
    if len(prompt) > most:
        fail(f"the prompt has {len(prompt)} tokens, {most} are the most that fit here; shorten it")
    idx = torch.tensor([prompt], device=args.device)
    if args.page:
        write_page(model, enc, idx, args.page, args.layers)
    else:
        write_text(model, enc, idx, args)


if __name__ == "__main__":
    main()
