"""
Write text with a model that train.py or distill.py made.

    python sample.py                            from out/ckpt.pt
    python sample.py --prompt "def main():" --max-new-tokens 500 --temperature 0.5
"""
import codecs

import torch

from data.common import Parser, encoding, fail
from train import load_checkpoint, pick_device, pick_precision


def parse_arguments():
    parser = Parser(__doc__)
    group = parser.add_argument_group("text")
    group.add_argument("--prompt", default="", help="text to go on from; empty: the start of a line")
    group.add_argument("--max-new-tokens", type=int, default=500, help="tokens to write")
    group.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    group.add_argument("--top-k", type=int, default=0, help="choose among the K likeliest tokens; 0: all")
    group.add_argument("--seed", type=int, default=1337, help="of the choices")
    group = parser.add_argument_group("running")
    group.add_argument("--checkpoint", default="out/ckpt.pt", help="file that train.py or distill.py wrote")
    group.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto: a GPU if any")
    args = parser.parse_args()
    args.device = pick_device(args.device)
    if args.max_new_tokens < 1 or not args.temperature >= 0 or args.top_k < 0:
        fail("--max-new-tokens must be 1 or more, --top-k and --temperature 0 or more")
    return args


def main():
    args = parse_arguments()
    model, rest = load_checkpoint(args.checkpoint, args.device)
    enc = encoding(rest["tokenizer"])
    prompt = enc.encode_ordinary(args.prompt or "\n")
    if len(prompt) > model.config.context:
        fail(f"the prompt has {len(prompt)} tokens, the model's context {model.config.context}; shorten it")
    torch.manual_seed(args.seed)
    idx = torch.tensor([prompt], device=args.device)
    to_text = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span several tokens
    print(args.prompt.encode(errors="replace").decode(), end="")       # half a surrogate pair cannot be shown
    with pick_precision(args.device)[0]:
        for token in model.eval().stream(idx, args.max_new_tokens, args.temperature, args.top_k or None):
            print(to_text.decode(enc.decode_single_token_bytes(token.item())), end="", flush=True)
    print(to_text.decode(b"", final=True))


if __name__ == "__main__":
    main()
