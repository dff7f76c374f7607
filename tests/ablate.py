"""
What each part of SEA is worth: one dense teacher's weights under SEA, changed in one thing each, evaluated on
the same windows; with --steps, distilled for as many steps first. Prints a table and adds its rows to a CSV.

    python train.py --attention dense                      the teacher, out/dense-stdlib/ckpt.pt
    python tests/ablate.py                                 every variant, untrained
    python tests/ablate.py --list                          their names
    python tests/ablate.py --only sea "mean alone" --steps 150
    python tests/ablate.py --teacher data/smollm2 --context 2048 --eval-windows 12

A variant replaces functions of sea.py by functions below, in plain PyTorch: copy one and change it.
"""
import argparse
import csv
import math
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import distill  # noqa: E402
from data import engine  # noqa: E402
import sea  # noqa: E402
from data.common import Parser, fail, number, one_line  # noqa: E402
from train import evaluate  # noqa: E402

COLUMNS = "variant ppl_untrained ppl keys mass block_size keys_per_query context steps".split()
block_scores = sea.block_scores      # the originals, whatever a variant puts in their place


# --------------------------------------------------------------------------------------------------
# Other scores

def mean_alone(q, moments, block_size, first_row=0):
    """q . mean, without the variance."""
    mean, _ = moments.chunk(2, -1)
    return block_scores(q, torch.cat((mean, torch.zeros_like(mean)), -1), block_size, first_row)


def smallest_and_largest(k, block_size):
    """Quest's summary of a block (arXiv 2406.10774), in place of its moments."""
    W = k.shape[2] // block_size
    blocks = k[:, :, :W * block_size].unflatten(2, (W, block_size)).float()      # (B, Hkv, W, S, D)
    return torch.cat((blocks.amin(3), blocks.amax(3)), -1)


def bound(q, summary, block_size, first_row=0):
    """The largest q . k that a block with such a summary can hold."""
    summary = summary.repeat_interleave(q.shape[1] // summary.shape[1], 1)       # (B, H, W, 2D)
    scores = torch.cat((q.clamp(max=0), q.clamp(min=0)), -1).float() @ summary.mT
    block = torch.arange(scores.shape[3], device=q.device)
    return scores.masked_fill(block >= sea.own_block(q.shape[2], first_row, block_size, q.device), -torch.inf)


# --------------------------------------------------------------------------------------------------
# Other choices

def one_look(q, k, block_size, keys_per_query, coarse):
    """All blocks are scored."""
    first = k.shape[2] - q.shape[2]
    scores = sea.block_scores(q, sea.moments(k, block_size), block_size, first)
    return sea.select(scores, block_size, max(1, keys_per_query // block_size), first)


def true_mass(q, k, block_size, keys_per_query, coarse):
    """A perfect estimate: the mass of each block itself."""
    first = k.shape[2] - q.shape[2]
    scores = sea.block_mass(q, k, block_size, first).log()
    return sea.select(scores, block_size, max(1, keys_per_query // block_size), first)


def forcing(is_fixed, more):
    """A select that always takes the blocks of is_fixed(block, own), and n + more beside them."""
    def select(scores, block_size, n, first_row=0):
        own = sea.own_block(scores.shape[2], first_row, block_size, scores.device)
        block = torch.arange(scores.shape[3], device=scores.device)
        fixed = (block < own) & is_fixed(block, own)
        rivals = scores.masked_fill(fixed, -torch.inf)
        best = rivals.argsort(dim=-1, descending=True, stable=True)[..., :max(0, n + more)]
        chosen = torch.zeros_like(rivals, dtype=torch.bool).scatter(-1, best, True)
        return fixed | chosen & (rivals != -torch.inf)
    return select


def first(block, own):
    return block == 0


def before(block, own):
    return block == own - 1


def neither(block, own):
    return block < 0


def first_and_last_two(block, own):
    return (block == 0) | (block >= own - 2)


# name: kind of attention, functions of sea.py in their new form, times the block size
VARIANTS = {
    "dense": ("dense", {}, 1),
    "sea": ("sea", {}, 1),
    "true mass": ("sea", dict(look_twice=true_mass), 1),
    "one look": ("sea", dict(look_twice=one_look), 1),
    "mean alone": ("sea", dict(block_scores=mean_alone), 1),
    "Quest's bound": ("sea", dict(moments=smallest_and_largest, block_scores=bound), 1),
    "first block not forced": ("sea", dict(select=forcing(before, 1)), 1),
    "block before not forced": ("sea", dict(select=forcing(first, 1)), 1),
    "neither forced": ("sea", dict(select=forcing(neither, 2)), 1),
    "last two forced": ("sea", dict(select=forcing(first_and_last_two, -1)), 1),
    "half of S": ("sea", {}, 1 / 2),
    "twice S": ("sea", {}, 2),
    "window": ("window", {}, 1),
    "paper": ("paper", {}, 1),
    "performer": ("performer", {}, 1),
}


@contextmanager
def replaced(functions):
    """sea.py with other functions for a while."""
    kept = {name: getattr(sea, name) for name in functions}
    for name, function in functions.items():
        setattr(sea, name, function)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(sea, name, function)


# --------------------------------------------------------------------------------------------------
# The table

def variant_name(text):
    """The type of --only, for argparse."""
    if text not in VARIANTS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {'; '.join(VARIANTS)}")
    return text


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--teacher", default="out/dense-stdlib/ckpt.pt", help="a dense model, as of distill.py")
    add("--data", help="folder in data/; None: the teacher's")
    add("--only", nargs="+", type=variant_name, default=list(VARIANTS), metavar="NAME", help="variants to run")
    add("--list", action="store_true", help="print the names of the variants, run none")
    add("--block-size", type=number(int, 1), help="S; None: the teacher's")
    add("--keys-per-query", type=number(int, 1), help="K; None: the teacher's")
    add("--context", type=number(int, 1), default=0, help="T; 0: the teacher's")
    add("--steps", type=number(int, 0), default=0, help="steps of distilling")
    add("--batch-size", type=number(int, 1), default=4, help="sequences in a batch")
    add("--lr", type=number(float, 0), default=3e-4, help="peak learning rate")
    add("--eval-windows", type=number(int, 1), default=200, help="windows to evaluate on")
    add("--seed", type=number(int, 0), default=1337, help="of new weights and batches")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto: a GPU if any")
    add("--csv", default="ablate.csv", help="table that rows are added to")
    args = parser.parse_args()
    args.device = engine.pick_device(args.device)
    # What distill.py has flags for.
    return argparse.Namespace(**vars(args), eval_only="val", accumulate=1)


def make_student(teacher, attention, times, args):
    """A student with blocks `times` as large and, on average, as many keys a query."""
    torch.manual_seed(args.seed)
    S = args.block_size or teacher.config.block_size
    K = args.keys_per_query or teacher.config.keys_per_query
    size = max(1, round(S * times))
    keys = max(1, K // S) * S + round(2.5 * (S - size))     # two fixed blocks, and half the own one
    return teacher.with_attention(attention, block_size=size, keys_per_query=max(1, keys))


def row_of(name, teacher, tokens, held_out, args, precision):
    """Make, train and measure a variant -> a row of the table."""
    attention, functions, times = VARIANTS[name]
    student = make_student(teacher, attention, times, args)
    with replaced(functions):
        untrained = evaluate(student, held_out, args.batch_size, args.eval_windows, precision)
        if args.steps:
            optimizer = distill.make_optimizer(student)
            distill.distill(student, teacher, tokens, args, precision, optimizer)
        loss = evaluate(student, held_out, args.batch_size, args.eval_windows, precision)
        keys, mass = distill.keys_and_mass(student.eval(), held_out)
    return dict(variant=name, ppl_untrained=math.exp(untrained), ppl=math.exp(loss), keys=keys, mass=mass,
                block_size=student.config.block_size, keys_per_query=student.config.keys_per_query,
                context=args.context, steps=args.steps)


@one_line(KeyboardInterrupt, OSError, hint="the CSV keeps the rows that were known")
def main():
    args = parse_arguments()
    if args.list:
        return print(*VARIANTS, sep="\n")
    engine.pick_backend(args.device, kernels=False)
    precision, _ = engine.pick_precision(args.device)
    teacher, _, tokens, held_out = distill.load_teacher(args)
    if teacher.config.attention != "dense":
        fail(f"{args.teacher} has {teacher.config.attention} attention; a teacher must be dense")

    new = not Path(args.csv).exists()
    table = csv.DictWriter(open(args.csv, "a", newline="", buffering=1), COLUMNS, lineterminator="\n")
    if new:
        table.writeheader()
    print(f"{'variant':26}{'untrained':>10}{'ppl':>10}{'keys':>8}{'mass':>8}")
    for name in args.only:
        row = row_of(name, teacher, tokens, held_out, args, precision)
        shown = f"{row['keys']:8.1f}{row['mass']:8.3f}" if row["keys"] else ""
        print(f"{name:26}{row['ppl_untrained']:10.3f}{row['ppl']:10.3f}{shown}", flush=True)
        table.writerow(row)


if __name__ == "__main__":
    main()
