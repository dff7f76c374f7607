"""
Turn a dense model into one with sparse attention: the student keeps the teacher's weights, its
attention is replaced, and it learns to match what the teacher computes.

    python train.py --attention dense               a small teacher, out/dense-stdlib/ckpt.pt
    python distill.py                               its SEA student, out/dense-stdlib-sea
    python distill.py --attention window            a rival, also paper, performer, dense
    python distill.py --eval-only                   the student before any training
    python data/smollm2.py && python data/wikipedia.py && python distill.py --teacher data/smollm2
    python distill.py --teacher facebook/opt-125m   published weights, on data/wikitext2

Without flags the student has sea attention, and S, K, T and data are the teacher's; published
weights have a preset, T included. --resume, torchrun, Ctrl-C and mistakes are as train.py says.
"""
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))      # python -P leaves it out
import sea
import train
from data import engine
from data.common import Parser, fail, number, one_line
from model import CHOOSING
from train import evaluate, perplexity

PRESETS = {       # of teachers that train.py made
    "cuda": dict(steps=600, batch_size=8, lr=3e-4, eval_windows=400),
    "cpu": dict(steps=150, batch_size=16, lr=3e-4, eval_windows=400)}
PUBLISHED = {     # of published ones
    "cuda": dict(steps=300, batch_size=4, lr=3e-5, context=2048, eval_windows=100),
    "cpu": dict(steps=30, batch_size=1, lr=3e-5, context=512, eval_windows=12)}
LOSSES = dict(            # what a student lowers, and how much each counts
    logits=1.0,           # KL of the next token
    hidden=1.0,           # distance of the hidden states
    output=1.0,           # distance of the attentions' outputs
    text=0.1,             # the text's own loss
    estimate=0.1)         # KL of paper's estimate and the teacher's attention
WEIGHT_DECAY = 0.01       # of matrices
NEW_RATE = 10             # times --lr: of parameters that the teacher does not have
MOST_ROWS = 2048          # of a text, for what takes a T x T picture


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument_group("distillation").add_argument
    add("--teacher", default="out/dense-stdlib/ckpt.pt",
        help="a checkpoint, a folder in the hub's format, or a name there")
    add("--eval-only", nargs="?", const="val", choices=("val", "test"),
        help="train nothing: the teacher's weights under --attention, on that split")
    add("--eval-windows", type=number(int, 1), help="windows to evaluate on")
    train.add_flags(parser)

    args = engine.parse(parser, PRESETS)
    name = Path(args.teacher).absolute().parent.name
    if not args.teacher.endswith(".pt"):
        args = engine.parse(parser, PUBLISHED)
        name = Path(args.teacher).name
    args.out = Path(args.out or f"out/{name}-{args.attention or 'sea'}")
    if os.path.realpath(args.out / "ckpt.pt") == os.path.realpath(args.teacher):
        fail(f"--out {args.out} is the teacher's folder; give another one")
    return args


def distillation_losses(student, idx, targets, teacher):
    """One forward of both on idx, targets (B, T) -> the losses of LOSSES, in that order."""
    with torch.no_grad():
        wanted = teacher(idx, trace=True)
    queries_keys = [(layer.q, layer.k) for layer in wanted.trace]
    made = student(idx, teacher=queries_keys, trace=True)

    log_p = wanted.logits.flatten(0, 1).float().log_softmax(-1)                  # (B T, V)
    log_q = made.logits.flatten(0, 1).float().log_softmax(-1)
    logits = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    text = F.nll_loss(log_q, targets.flatten())
    hidden = distance(made.trace, wanted.trace, "hidden")
    output = distance(made.trace, wanted.trace, "attended")
    estimate = text.new_zeros(()) if made.kl is None else made.kl
    return torch.stack((logits, hidden, output, text, estimate))


def distance(ours, theirs, what):
    """Squared distance of what two models' layers computed, as a share of the second's square."""
    ours = torch.stack([getattr(layer, what) for layer in ours]).float()         # (L, B, T, C)
    theirs = torch.stack([getattr(layer, what) for layer in theirs]).float()
    # Of each layer by itself: the numbers of some are thousands of times those of others.
    share = (ours - theirs).square().mean((1, 2, 3)) / theirs.square().mean((1, 2, 3))
    return share.mean()


@torch.no_grad()
def keys_and_mass(model, tokens):
    """Keys that a query attends to, and their share of the dense attention's mass: means over the
    layers, heads and queries of the first window. (None, None) for all but sea and window."""
    c = model.config
    if c.attention not in ("sea", "window"):
        return None, None
    idx = torch.from_numpy(tokens[:min(c.context, MOST_ROWS)].astype("int64"))[None]     # (1, T)
    idx = idx.to(next(model.parameters()).device)
    position = torch.arange(idx.shape[1], device=idx.device)
    past = position <= position[:, None]                                         # (T, T)
    keys = mass = 0.
    for block, layer in zip(model.layers, model(idx, trace=True).trace):
        if c.attention == "sea":
            _, mask, _ = sea.estimated_attention(layer.q, layer.k, c.block_size, c.keys_per_query,
                                                 c.coarse)                       # (B, H, T, T)
        else:
            mask = block.self_attn.attention.mask(position[:, None], position)
        dense = sea.attention_to(past, layer.q * c.head_dim ** -0.5, layer.k)    # (B, H, T, T)
        keys += mask.sum(-1).float().mean().item() / c.n_layer
        mass += (dense * mask).sum(-1).mean().item() / c.n_layer
    return keys, mass


def describe(name, model, tokens, args, precision):
    """Print a model's loss on held-out text -> the loss, and words on its keys in a window."""
    with one_line(FloatingPointError, hint=f"the {name} is spoilt"):
        loss = evaluate(model, tokens, args.batch_size, args.eval_windows, precision)
    with precision:
        keys, mass = keys_and_mass(model.eval(), tokens)
    kept = f"keys_attended {keys:.1f} mass_kept {mass:.3f} " if keys else ""
    engine.say(f"{name}: loss {loss:.4f} ppl {perplexity(loss):.3f} {kept}")
    return loss, kept


def make_optimizer(student):
    """AdamW. Matrices decay; what the teacher does not have learns at NEW_RATE times the rate."""
    groups = {}
    for name, p in student.named_parameters():
        decay = WEIGHT_DECAY if p.dim() >= 2 else 0.
        times = NEW_RATE if ".attention." in name else 1
        group = groups.setdefault((decay, times), dict(params=[], weight_decay=decay, times=times))
        group["params"].append(p)
    return torch.optim.AdamW(list(groups.values()), betas=(0.9, 0.95), fused=True)


def distill(student, teacher, tokens, args, precision, optimizer, steps):
    """Train the student -> the last losses. steps: numbers of the steps to do."""
    student.train()
    teacher.eval()
    losses_of = partial(distillation_losses, teacher=teacher)
    return train.train(student, optimizer, losses_of, LOSSES, tokens, args, precision, steps)


def load_teacher(args):
    """The teacher, the name of its tokenizer, tokens to train on, and tokens to evaluate on."""
    teacher, tokenizer, data = engine.load_model(args.teacher, args.device)
    args.context = args.context or teacher.config.context
    args.data = args.data or data
    tokens, held_out, meta = train.open_data(args, args.eval_only or "val")
    if meta["tokenizer"] != tokenizer or meta["vocab_size"] > teacher.config.vocab_size:
        fail(f"data/{args.data} is written in {meta['tokenizer']} tokens and the teacher reads "
             f"{tokenizer}; prepare it with --tokenizer {tokenizer} --overwrite, or take "
             "another --data")
    teacher.set_context(args.context)
    return teacher, tokenizer, tokens, held_out


def make_student(teacher, args):
    """The teacher's weights under the attention and the settings of the flags."""
    dense = teacher.config.attention == "dense"
    if not dense and not args.eval_only:
        fail(f"{args.teacher} has {teacher.config.attention} attention; a teacher must be dense")
    # A dense model becomes sea by default; another, which is only evaluated, stays as it is.
    args.attention = args.attention or ("sea" if dense else teacher.config.attention)
    settings = {name: getattr(args, name) for name in ("block_size", "keys_per_query")
                if getattr(args, name)}
    if settings and args.attention not in CHOOSING:
        fail(f"{args.attention} attention chooses no keys; leave out --block-size and "
             "--keys-per-query")
    with one_line(ValueError):
        student = teacher.with_attention(args.attention, **settings)
    engine.check_fit(student.config, args.batch_size, args.device)
    engine.check_budget(student.config)
    return student


@engine.training_script
def main():
    args = parse_arguments()
    if not args.eval_only:
        engine.check_out(args)
    backend, precision, kind = engine.start(args)
    teacher, tokenizer, tokens, held_out = load_teacher(args)
    student = make_student(teacher, args)
    engine.say(f"teacher {args.teacher} ({teacher.config.attention}), student {args.attention}, "
               f"data/{args.data}, T {args.context}, {backend} backend, {kind}")
    if args.eval_only:
        loss, _ = describe(args.attention, student, held_out, args, precision)
        engine.say(f"final: {args.eval_only}_loss {loss:.4f} "
                   f"{args.eval_only}_ppl {perplexity(loss):.3f}")
        return

    optimizer = make_optimizer(student)
    keeper = engine.Keeper(args, student, optimizer, tokens, tokenizer, teacher)
    if not args.resume:
        engine.keep_tokenizer(tokenizer, args.teacher, args.out)
        loss_teacher, _ = describe("teacher", teacher, held_out, args, precision)
        loss_before, _ = describe("student before", student, held_out, args, precision)
        keeper.content["before"] = loss_teacher, loss_before

    begin = time.time()
    losses = distill(student, teacher, tokens, args, precision, optimizer, keeper.steps())
    seconds = time.time() - begin
    loss, kept = describe("student after", student, held_out, args, precision)
    loss_teacher, loss_before = keeper.content["before"]
    kl = f"attention_kl {losses['estimate']:.4f} " if losses["estimate"] else ""
    engine.say(f"final: val_loss {loss:.4f} val_ppl {perplexity(loss):.3f} "
               f"ppl_before {perplexity(loss_before):.3f} "
               f"teacher_ppl {perplexity(loss_teacher):.3f} {kept}{kl}"
               f"steps {args.steps} seconds {seconds:.0f} "
               f"peak_gib {engine.peak_memory(args.device):.2f}")


if __name__ == "__main__":
    main()
