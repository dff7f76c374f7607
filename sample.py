"""
Write text with a model that train.py or distill.py made, or look at what its attention selects.

    python sample.py                            from out/sea-stdlib/ckpt.pt
    python sample.py --prompt "def main():" --max-new-tokens 500 --temperature 0.5
    python sample.py --prompt "$(head -c 120 sea.py)" --page page.html        then open page.html
    python sample.py --checkpoint data/smollm2 --attention sea --prompt "The sea"
"""
import codecs
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))      # python -P leaves it out
from assets.page import MOST_TOKENS, write_page
from data import engine
from data.common import Parser, any_output, fail, number, one_line
from model import ATTENTIONS, CHOOSING


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
    add("--keys-per-query", type=number(int, 1), metavar="K", help="to choose; else as trained")
    add("--page", type=Path, metavar="FILE", help="write a page of the prompt's attention instead")
    add("--layers", type=number(int, 0), nargs="+", metavar="N",
        help="layers in that page, from 0; else all, or as many as 2 MB hold")
    add = parser.add_argument_group("running").add_argument
    add("--checkpoint", default="out/sea-stdlib/ckpt.pt",
        help="a checkpoint, a folder in the hub's format, or a name there")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto: a GPU if any")
    add("--no-kernels", dest="kernels", action="store_false", help="plain PyTorch on a GPU")
    args = parser.parse_args()
    args.device = engine.pick_device(args.device)
    if args.layers and not args.page:
        fail("--layers chooses what --page FILE shows; give both")
    if args.page and not (args.page.suffix == ".html" and args.page.parent.is_dir()):
        fail(f"--page {args.page}: name a file that ends in .html, in a folder that exists")
    if args.page and not args.prompt:
        fail("--page shows the attention in a text; give the text by --prompt")
    return args


def load(args):
    """The model, with the attention and the keys that are asked for, and its tokenizer."""
    model, tokenizer, _ = engine.load_model(args.checkpoint, args.device)
    attention = args.attention or model.config.attention
    if args.page and attention != "sea":
        fail(f"{attention} attention has no estimate to show; give --attention sea")
    if args.keys_per_query and attention not in CHOOSING:
        fail(f"{attention} attention chooses no keys; leave out --keys-per-query")
    if max(args.layers or [0]) >= model.config.n_layer:
        fail(f"--layers: this model has layers 0 to {model.config.n_layer - 1}")
    if attention != model.config.attention:
        model = model.with_attention(attention)
    if args.keys_per_query:
        model.config.keys_per_query = args.keys_per_query          # the layers share this object
    enc = engine.load_encoding(tokenizer, args.checkpoint)
    if enc.n_vocab > model.config.vocab_size:
        fail(f"{args.checkpoint} knows {model.config.vocab_size} tokens, its tokenizer has "
             f"{enc.n_vocab}; take the tokenizer's files of that model")
    return model.eval(), enc


def write_text(model, enc, idx, args, graph):
    torch.manual_seed(args.seed)
    # A character may span several tokens; half a surrogate pair of the prompt cannot be shown.
    to_text = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(args.prompt.encode(errors="replace").decode(), end="")
    ids = torch.tensor(enc.ids, device=args.device) if hasattr(enc, "ids") else None
    # Weights of the type to compute in; with the kernels a token is one CUDA graph.
    _, dtype = engine.pick_precision(args.device)
    model.to(getattr(torch, dtype))
    choice = args.temperature, args.top_k or None, ids, graph
    tokens = 0
    begin = time.perf_counter()
    with suppress(KeyboardInterrupt):                      # Ctrl-C ends the text
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
    backend = engine.pick_backend(args.device, args.kernels)
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
        write_text(model, enc, idx, args, backend == "triton")


if __name__ == "__main__":
    main()
