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

sys.path.insert(0, str(Path(__file__).resolve().parent))      # python -P leaves it out
import sea
from data import engine
from data.common import Parser, any_output, fail, number, one_line, write_whole
from model import ATTENTIONS

TEMPLATE = Path(__file__).resolve().parent / "assets" / "attention.html"
ROOM = 1_900_000        # bytes of pictures in a page, so that it can be mailed
MOST_TOKENS = 512       # in a page: each picture is T x T


def parse_arguments():
    parser = Parser(__doc__)
    group = parser.add_argument_group("text")
    group.add_argument("--prompt", default="class Queue:\n    def ", help="text to go on from")
    group.add_argument("--max-new-tokens", type=number(int, 1), default=500, help="tokens to write")
    group.add_argument("--temperature", type=number(float, 0), default=0.7,
                       help="0 takes the likeliest")
    group.add_argument("--top-k", type=number(int, 0), default=0,
                       help="choose among the K likeliest tokens; 0: all")
    group.add_argument("--seed", type=number(int, 0), default=1337, help="of the choices")

    group = parser.add_argument_group("attention")
    group.add_argument("--attention", choices=ATTENTIONS, help="in place of the model's own")
    group.add_argument("--keys-per-query", type=number(int, 1), metavar="K",
                       help="keys that a query of SEA chooses; None: as trained")
    group.add_argument("--page", type=Path, metavar="FILE",
                       help="write no text but a page that shows the prompt's attention")
    group.add_argument("--layers", type=number(int, 0), nargs="+", metavar="N",
                       help="layers in that page, from 0; None: all, or as many as 2 MB hold")

    group = parser.add_argument_group("running")
    group.add_argument("--checkpoint", default="out/sea-stdlib/ckpt.pt",
                       help="a checkpoint, a folder in the hub's format, or a name there")
    group.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"),
                       help="auto: a GPU if any")
    group.add_argument("--no-kernels", dest="kernels", action="store_false",
                       help="plain PyTorch on a GPU")
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
    return model.eval(), engine.load_encoding(tokenizer, args.checkpoint)


# --------------------------------------------------------------------------------------------------
# The page

@torch.no_grad()
def pictures(model, idx):
    """For each layer, of one sequence idx (1, T): the estimate, the mask, the attention used and
    the dense attention of the same q and k, (H, T, T) each."""
    c = model.config
    for layer in model(idx, trace=True).trace:
        k = layer.k.repeat_interleave(c.n_head // c.n_kv_head, 1)                # (1, H, T, D)
        estimate, mask, used = sea.estimated_attention(layer.q, k, c.block_size,
                                                       c.keys_per_query, c.coarse)
        future = torch.ones_like(mask).triu(1)
        scores = (layer.q @ k.mT).float() * c.head_dim ** -0.5
        dense = scores.masked_fill(future, -torch.inf).softmax(-1)
        yield estimate[0].float(), mask[0].float(), used[0].float(), dense[0]


def head_data(estimate, mask, used, dense):
    """What a page holds of a head. A byte is 255 times the cube root, which keeps 1 % and 2 % well
    apart."""
    def pack(picture):
        shades = (255 * picture ** (1 / 3)).round().byte().cpu().numpy()
        return base64.b64encode(zlib.compress(shades.tobytes(), 9)).decode()

    kept = [round(share, 4) for share in (dense * mask).sum(-1).tolist()]
    return dict(estimate=pack(estimate), mask=pack(mask), used=pack(used), dense=pack(dense),
                keys=mask.sum(-1).int().tolist(), kept=kept)         # of each query


def layers_that_fit(sizes):
    """All layers or, evenly from the first to the last, as many as there is room for; one at
    least."""
    for count in range(len(sizes), 0, -1):
        layers = torch.linspace(0, len(sizes) - 1, count).round().long().tolist()
        if sum(sizes[i] for i in layers) <= ROOM:
            break
    return layers


def write_page(model, enc, idx, path, layers):
    """Put the text and the pictures of all heads into a copy of the template, which needs no other
    file."""
    heads = [[head_data(*head) for head in zip(*layer)] for layer in pictures(model, idx)]
    sizes = [len(json.dumps(layer)) for layer in heads]
    layers = sorted(set(layers or [])) or layers_that_fit(sizes)
    tokens = [enc.decode_single_token_bytes(i) for i in idx[0].tolist()]
    tokens = [token.decode(errors="backslashreplace") for token in tokens]
    shown = {i: heads[i] for i in layers}
    data = dict(tokens=tokens, block_size=model.config.block_size, layers=shown)
    data = json.dumps(data).replace("<", "\\u003c")              # no text can end the page's script
    page = TEMPLATE.read_text(encoding="utf-8").replace("PAGE_DATA", data).encode()
    write_whole(path, page)
    names = " ".join(map(str, layers))
    if len(layers) < len(heads):
        names += f" of 0 to {len(heads) - 1}; --layers chooses others"
    print(f"{path}: {len(tokens)} tokens, {len(page) / 1e6:.2f} MB, layers {names}")


# --------------------------------------------------------------------------------------------------
# The text

def write_text(model, enc, idx, args):
    torch.manual_seed(args.seed)
    # A character may span several tokens; half a surrogate pair of the prompt cannot be shown.
    to_text = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(args.prompt.encode(errors="replace").decode(), end="")
    ids = torch.tensor(enc.ids, device=args.device) if hasattr(enc, "ids") else None
    top_k = args.top_k or None
    precision, _ = engine.pick_precision(args.device)
    tokens = 0
    begin = time.perf_counter()
    with precision, suppress(KeyboardInterrupt):           # Ctrl-C ends the text
        for token in model.stream(idx, args.max_new_tokens, args.temperature, top_k, ids):
            tokens += 1
            if token.item() == enc.eot:
                break
            print(to_text.decode(enc.decode_single_token_bytes(token.item())), end="", flush=True)
    print(to_text.decode(b"", final=True))
    seconds = time.perf_counter() - begin
    memory = engine.peak_memory(args.device)
    print(f"{tokens / seconds:.1f} tokens/s, {memory:.2f} GiB", file=sys.stderr)


@any_output()
@one_line(MemoryError, torch.OutOfMemoryError, hint="shorten the prompt")
@one_line(OSError, FloatingPointError)
def main():
    args = parse_arguments()
    engine.pick_backend(args.device, args.kernels)
    model, enc = load(args)
    prompt = [enc.bos] if hasattr(enc, "bos") else []                  # OPT's texts begin with </s>
    prompt += enc.encode_ordinary(args.prompt or "\n")
    context = model.config.context
    if len(prompt) > context:
        fail(f"the prompt has {len(prompt)} tokens, the model's context {context}; shorten it")
    if len(prompt) > MOST_TOKENS and args.page:
        fail(f"the prompt has {len(prompt)} tokens, a page at most {MOST_TOKENS}; shorten it")
    idx = torch.tensor([prompt], device=args.device)
    if args.page:
        write_page(model, enc, idx, args.page, args.layers)
        return
    write_text(model, enc, idx, args)


if __name__ == "__main__":
    main()
