"""
Write text with a model that train.py or distill.py made, or look at what its attention selects.

    python sample.py                            from out/ckpt.pt
    python sample.py --prompt "def main():" --max-new-tokens 500 --temperature 0.5
    python sample.py --prompt "$(head -c 120 sea.py)" --attention page.html        then open page.html
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

from data.common import Parser, encoding, fail, number, one_line, write_whole
from data.engine import load_checkpoint, peak_memory, pick_device, pick_precision
from model import Trace

TEMPLATE = Path(__file__).resolve().parent / "assets" / "attention.html"
ROOM = 1_900_000        # bytes of pictures in a page, so that it can be mailed
MOST_TOKENS = 512       # in a page: each picture is T x T


def parse_arguments():
    parser = Parser(__doc__)
    group = parser.add_argument_group("text")
    group.add_argument("--prompt", default="", help="text to go on from; empty: the start of a line")
    group.add_argument("--max-new-tokens", type=number(int, 1), default=500, help="tokens to write")
    group.add_argument("--temperature", type=number(float, 0), default=0.8, help="0 takes the likeliest")
    group.add_argument("--top-k", type=number(int, 0), default=0,
                       help="choose among the K likeliest tokens; 0: all")
    group.add_argument("--seed", type=number(int, 0), default=1337, help="of the choices")
    group = parser.add_argument_group("attention")
    group.add_argument("--keys-per-query", type=number(int, 1), metavar="N",
                       help="past keys that SEA selects per query and head; None: as trained")
    group.add_argument("--attention", type=Path, metavar="FILE",
                       help="write no text but a page, such as page.html, that shows the prompt's attention")
    group.add_argument("--layers", type=number(int, 0), nargs="+", metavar="N",
                       help="layers in that page, from 0; None: all of them, or as many as 2 MB hold")
    group = parser.add_argument_group("running")
    group.add_argument("--checkpoint", default="out/ckpt.pt", help="file that train.py or distill.py wrote")
    group.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto: a GPU if any")
    group.add_argument("--stats", action="store_true", help="tell tokens/s and peak memory after the text")
    args = parser.parse_args()
    args.device = pick_device(args.device)
    if args.layers and not args.attention:
        fail("--layers chooses what --attention FILE shows; give both")
    if args.attention and (args.attention.is_dir() or not args.attention.parent.is_dir()):
        fail(f"cannot write --attention {args.attention}; name a file in a folder that exists")
    if args.attention and not args.prompt:
        fail("--attention shows the attention in a text; give the text by --prompt")
    return args


@torch.no_grad()
def pictures(model, idx):
    """For each layer, of one sequence idx (1, T): the estimate, the mask, the attention used and the dense
    attention of the same q and k, (H, T, T) each."""
    with Trace(model) as seen:
        model(idx)
    for attention, q, k, v in seen.attended:
        estimate, mask, used = attention.look(q, k, v)
        future = torch.ones_like(mask).triu(1)
        dense = (q @ k.mT).masked_fill(future, -torch.inf).softmax(-1)
        yield tuple(picture[0].float() for picture in (estimate, mask, used, dense))


def head_data(estimate, mask, used, dense):
    """What a page holds of a head. A byte is 255 times the cube root, which keeps 1 % and 2 % well apart."""
    def pack(picture):
        shades = (255 * picture ** (1 / 3)).round().byte().cpu().numpy()
        return base64.b64encode(zlib.compress(shades.tobytes(), 9)).decode()

    kept = [round(share, 4) for share in (dense * mask).sum(-1).tolist()]
    return dict(estimate=pack(estimate), mask=pack(mask), used=pack(used), dense=pack(dense),
                keys=mask.sum(-1).int().tolist(), kept=kept)         # of each query


def layers_that_fit(sizes):
    """All layers or, evenly from the first to the last, as many as there is room for; one at least."""
    for count in range(len(sizes), 0, -1):
        layers = torch.linspace(0, len(sizes) - 1, count).round().long().tolist()
        if sum(sizes[i] for i in layers) <= ROOM:
            break
    return layers


def write_page(model, enc, idx, path, layers):
    """Put the text and the pictures of all heads into a copy of the template, which needs no other file."""
    heads = [[head_data(*head) for head in zip(*layer)] for layer in pictures(model, idx)]
    layers = sorted(set(layers or [])) or layers_that_fit([len(json.dumps(layer)) for layer in heads])
    tokens = [enc.decode_single_token_bytes(i).decode(errors="backslashreplace") for i in idx[0].tolist()]
    data = dict(tokens=tokens, query_block=model.config.query_block, layers={i: heads[i] for i in layers})
    data = json.dumps(data).replace("<", "\\u003c")                  # no text can end the page's script
    page = TEMPLATE.read_text(encoding="utf-8").replace("PAGE_DATA", data).encode()
    write_whole(path, page)
    print(f"{path}: {len(tokens)} tokens, {len(page) / 1e6:.2f} MB, layers {' '.join(map(str, layers))}"
          + ("" if len(layers) == len(heads) else f" of 0 to {len(heads) - 1}; --layers chooses others"))


def write_text(model, enc, idx, args):
    torch.manual_seed(args.seed)
    to_text = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span several tokens
    print(args.prompt.encode(errors="replace").decode(), end="")       # half a surrogate pair cannot be shown
    ids = torch.tensor(enc.ids, device=args.device) if hasattr(enc, "ids") else None
    begin = time.perf_counter()
    with pick_precision(args.device)[0], suppress(KeyboardInterrupt):      # Ctrl-C ends the text
        for token in model.stream(idx, args.max_new_tokens, args.temperature, args.top_k or None, ids):
            print(to_text.decode(enc.decode_single_token_bytes(token.item())), end="", flush=True)
    print(to_text.decode(b"", final=True))
    if args.stats:
        speed = args.max_new_tokens / (time.perf_counter() - begin)
        print(f"{speed:.1f} tokens/s, prompt included; {peak_memory(args.device):.2f} GiB", file=sys.stderr)


@one_line(MemoryError, torch.OutOfMemoryError, hint="shorten the prompt")
def main():
    args = parse_arguments()
    model, rest = load_checkpoint(args.checkpoint, args.device)
    enc, config = encoding(rest["tokenizer"]), model.eval().config
    if args.attention and config.attention != "sea":
        fail(f"{args.checkpoint} is a model with {config.attention} attention, which has no estimate to show")
    if max(args.layers or [0]) >= config.n_layer:
        fail(f"--layers: this model has layers 0 to {config.n_layer - 1}")
    if args.keys_per_query:
        with one_line(ValueError, hint="leave out --keys-per-query"):
            model.set_keys_per_query(args.keys_per_query)
    prompt = [enc.bos] if hasattr(enc, "bos") else []                  # OPT's texts begin with </s>
    prompt += enc.encode_ordinary(args.prompt or "\n")
    if len(prompt) > config.context:
        fail(f"the prompt has {len(prompt)} tokens, the model's context {config.context}; shorten it")
    if len(prompt) > MOST_TOKENS and args.attention:
        fail(f"the prompt has {len(prompt)} tokens, a page at most {MOST_TOKENS}; shorten it")
    idx = torch.tensor([prompt], device=args.device)
    if args.attention:
        write_page(model, enc, idx, args.attention, args.layers)
    else:
        write_text(model, enc, idx, args)


if __name__ == "__main__":
    main()
