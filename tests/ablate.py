"""
What each part of SEA is worth: one dense teacher's weights under SEA, changed in one thing each, evaluated on
the same windows; with --steps, distilled for as many steps first. Prints a table and adds its rows to a CSV.

    python train.py --attention dense                      the teacher, out/dense-stdlib/ckpt.pt
    python tests/ablate.py                                 every variant, untrained
    python tests/ablate.py --list                          their names
    python tests/ablate.py --only sea "mean alone" --steps 150
    python tests/ablate.py --only dense sea window --settings 4:56 8:48 8:240 8:48:16
    python tests/ablate.py --only dense sea --steps 60 --read 112 240 "true mass"
    python tests/ablate.py --teacher data/smollm2 --context 2048 --only sea --mass mass.csv

A variant replaces functions of sea.py by functions below, in plain PyTorch: copy one and change it. What
replaces nothing runs in the kernels, but for --no-kernels. With --steps, dense is trained as the others are,
on the same batches and losses: "dense continued".
"""
import argparse
import csv
import math
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import distill  # noqa: E402
from data import engine  # noqa: E402
import sea  # noqa: E402
from data.common import Parser, any_output, fail, number, one_line  # noqa: E402
from model import CHOOSING  # noqa: E402
from train import evaluate, perplexity  # noqa: E402

COLUMNS = ("variant read_as block_size keys_per_query coarse context steps trained_keys ppl_untrained ppl "
           "keys mass seconds").split()
MASS_COLUMNS = "variant read_as block_size keys_per_query context steps layer head keys mass".split()
SHOWN = dict(ppl_untrained=3, ppl=3, keys=1, mass=3, seconds=1)       # columns of numbers, and digits
block_scores = sea.block_scores        # the originals, whatever a variant puts in their place
budgets = sea.budgets
select = sea.select


# --------------------------------------------------------------------------------------------------
# Other scores

def mean_alone(q, moments, block_size, first_row=0):
    """q . mean, without the variance."""
    mean, _ = moments.chunk(2, -1)
    return block_scores(q, torch.cat((mean, torch.zeros_like(mean)), -1), block_size, first_row)


def smallest_and_largest(k, block_size):
    """Quest's summary of a block (arXiv 2406.10774), in place of its moments."""
    blocks = whole_blocks(k, block_size).unflatten(-1, (block_size, -1)).float()  # (B, Hkv, W, S, D)
    return torch.cat((blocks.amin(3), blocks.amax(3)), -1)


def bound(q, summary, block_size, first_row=0):
    """The largest q . k that a block with such a summary can hold."""
    scores = products(torch.cat((q.clamp(max=0), q.clamp(min=0)), -1), summary)
    return before_own(scores, block_size, first_row)


def whole_blocks(k, block_size):
    """No summary: a block's keys themselves, (B, Hkv, W, S D)."""
    W = k.shape[2] // block_size
    return k[:, :, :W * block_size].unflatten(2, (W, block_size)).flatten(3)


def full_covariance(q, blocks, block_size, first_row=0):
    """q . mean + q' covariance q / 2, that is half the variance of q . k: no diagonal alone."""
    each = products_by_block(q, blocks, block_size)
    return before_own(each.mean(-1) + each.var(-1, correction=0) / 2, block_size, first_row)


def log_mass(q, blocks, block_size, first_row=0):
    """A perfect estimate."""
    return before_own(products_by_block(q, blocks, block_size).logsumexp(-1), block_size, first_row)


def of_key_group(q, moments, block_size, first_row=0):
    """One score for the heads that share keys, of their estimated masses' sum: they load the same blocks."""
    scores = block_scores(q, moments, block_size, first_row)
    groups = scores.log_softmax(-1).unflatten(1, (moments.shape[1], -1))         # (B, Hkv, group, R, W)
    together = groups.logsumexp(2, keepdim=True).expand_as(groups).flatten(1, 2)
    return before_own(together, block_size, first_row)


def products_by_block(q, blocks, block_size):
    """q . k of each key of whole_blocks: (B, H, R, W, S)."""
    keys = blocks.unflatten(-1, (block_size, -1)).flatten(2, 3)                  # (B, Hkv, W S, D)
    return products(q, keys).unflatten(-1, (-1, block_size))


def products(q, x):
    """q (B, H, R, D) . x (B, Hkv, N, D) -> (B, H, R, N) in float32: small differences decide."""
    x = x.float().repeat_interleave(q.shape[1] // x.shape[1], 1)
    with torch.autocast(q.device.type, enabled=False):
        return q.float() @ x.mT


def before_own(scores, block_size, first_row):
    """Scores (B, H, R, W) with -inf from the query's own block on."""
    block, own = block_and_own(scores, block_size, first_row)
    return scores.masked_fill(block >= own, -torch.inf)


def block_and_own(scores, block_size, first_row):
    """The numbers of the blocks of scores (B, H, R, W), (W,), and those of the queries' own: (R, 1)."""
    R, W = scores.shape[2:]
    block = torch.arange(W, device=scores.device)
    return block, sea.own_block(R, first_row, block_size, scores.device)


# --------------------------------------------------------------------------------------------------
# Other choices

def one_look(q, k, block_size, keys_per_query, coarse):
    """All blocks are scored."""
    first_row = k.shape[2] - q.shape[2]
    with torch.no_grad():
        scores = sea.block_scores(q, sea.moments(k, block_size), block_size, first_row)
        return sea.select(scores, block_size, budgets(block_size, keys_per_query)[0], first_row)


def looking_at(n_wide):
    """A first look that keeps n_wide coarse blocks, in place of max(8, K // 16)."""
    def chosen_and_looked_at(*settings):
        return budgets(*settings)[0], n_wide
    return chosen_and_looked_at


def forcing(first, lasts):
    """A select that always takes block 0 if so told and the `lasts` blocks before a query's own one."""
    def select(scores, block_size, n, first_row=0):
        block, own = block_and_own(scores, block_size, first_row)
        fixed = (block < own) & ((block == 0) & first | (block >= own - lasts))  # (R, W)
        rivals = scores.masked_fill(fixed, -torch.inf)
        return fixed | best(rivals, max(0, n + 2 - first - lasts))              # in all as many as SEA
    return select


def shared_by_heads(scores, block_size, n, first_row=0):
    """The paper's budget: the n H best of all heads' blocks, each by its share of its head's mass."""
    H = scores.shape[1]
    fixed = select(scores[:, :1], block_size, 0, first_row)                      # (B, 1, R, W)
    shares = scores.log_softmax(-1)                                              # NaN: no block yet
    shares = shares.masked_fill(fixed | (scores == -torch.inf), -torch.inf)      # (B, H, R, W)
    together = shares.transpose(1, 2).flatten(2)                                 # (B, R, H W)
    return fixed | best(together, n * H).unflatten(2, (H, -1)).transpose(1, 2)


def best(rivals, n):
    """The n largest of each row, but for those of -inf: bool."""
    largest = rivals.argsort(dim=-1, descending=True, stable=True)[..., :n]
    taken = torch.zeros_like(rivals, dtype=torch.bool).scatter(-1, largest, True)
    return taken & (rivals != -torch.inf)


def counting_the_rest(share):
    """An attend that takes in the other blocks, too: each as one key, the mean of its keys, with the mean of
    its values, which counts share * S times. (The paper mixes in the mean of all values.)"""
    def with_means(x, block_size):
        blocks = whole_blocks(x, block_size).unflatten(-1, (block_size, -1))     # (B, Hkv, W, S, D)
        return torch.cat((x, blocks.mean(3)), 2)                                 # (B, Hkv, T + W, D)

    def attend(q, k, v, chosen, block_size):
        T = k.shape[2]
        scores = products(q, with_means(k, block_size))                          # (B, H, R, T + W)
        scores[..., T:] += math.log(share * block_size)
        block, own = block_and_own(chosen, block_size, T - q.shape[2])
        mask = torch.cat((sea.chosen_keys(chosen, T, block_size), (block < own) & ~chosen), -1)
        v = with_means(v, block_size).repeat_interleave(q.shape[1] // v.shape[1], 1)
        return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v
    return attend


# name: kind of attention, functions of sea.py in their new form
VARIANTS = {
    "dense": ("dense", {}),
    "sea": ("sea", {}),
    "true mass": ("sea", dict(look_twice=one_look, moments=whole_blocks, block_scores=log_mass)),
    "one look": ("sea", dict(look_twice=one_look)),
    "look at 4": ("sea", dict(budgets=looking_at(4))),
    "look at 16": ("sea", dict(budgets=looking_at(16))),
    "look at 32": ("sea", dict(budgets=looking_at(32))),
    "mean alone": ("sea", dict(block_scores=mean_alone)),
    "full covariance": ("sea", dict(moments=whole_blocks, block_scores=full_covariance)),
    "Quest's bound": ("sea", dict(moments=smallest_and_largest, block_scores=bound)),
    "first block not forced": ("sea", dict(select=forcing(False, 1))),
    "block before not forced": ("sea", dict(select=forcing(True, 0))),
    "neither forced": ("sea", dict(select=forcing(False, 0))),
    "last two forced": ("sea", dict(select=forcing(True, 2))),
    "budget shared by heads": ("sea", dict(select=shared_by_heads)),
    "choice of a key group": ("sea", dict(block_scores=of_key_group)),
    "the rest by its means": ("sea", dict(attend=counting_the_rest(1))),
    "a third of the rest": ("sea", dict(attend=counting_the_rest(1 / 3))),
    "window": ("window", {}),
    "paper": ("paper", {}),
    "performer": ("performer", {}),
}


@contextmanager
def as_variant(name, kernels=False):
    """sea.py as a variant has it, for a while; with the kernels if it replaces nothing."""
    functions = VARIANTS[name][1]
    kept = {known: getattr(sea, known) for known in (*functions, "backend")}
    sea.use_kernels(kernels and not functions)
    vars(sea).update(functions)
    try:
        yield
    finally:
        vars(sea).update(kept)


# --------------------------------------------------------------------------------------------------
# What a student keeps

@torch.no_grad()
def keys_and_mass(model, layers):
    """Keys that a query reads, and their share of dense attention's mass: means (n_layer, 2, H); None of
    an attention that chooses no keys. layers: a trace, whose queries and keys each layer is given.

    It watches the masks that PyTorch's attention gets, so that nothing may go through the kernels.
    """
    seen = []

    def watch(q, k, v, attn_mask=None, scale=None, **rest):
        if attn_mask is not None:
            seen.append(sums(q * (scale or q.shape[3] ** -0.5), k, attn_mask))
        return q                                                    # has the shape of the answer

    attention = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = watch
    try:
        for block, layer in zip(model.layers, layers):
            block.self_attn.attention(layer.q, layer.k, layer.v)
    finally:
        F.scaled_dot_product_attention = attention
    B, H, T, _ = layers[0].q.shape
    return torch.stack(seen).unflatten(0, (len(layers), -1)).sum(1) / (B * T) if seen else None


def sums(q, k, mask):
    """Over the last queries q (B, H, r, D), scaled: keys of the mask and dense attention's mass on them."""
    position = torch.arange(k.shape[2], device=k.device)
    future = position > position[-q.shape[2]:, None]                             # (r, T)
    dense = products(q, k).masked_fill(future, -torch.inf).softmax(-1)           # (B, H, r, T)
    read = mask.expand_as(dense).float()
    return torch.stack((read, dense * read)).sum((1, 3, 4))                      # (2, H)


# --------------------------------------------------------------------------------------------------
# The table

def variant_name(text):
    """The type of --only, for argparse."""
    if text not in VARIANTS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {'; '.join(VARIANTS)}")
    return text


def keys_or_variant(text):
    """The type of --read."""
    return number(int, 1)(text) if text.isdecimal() else variant_name(text)


def setting(text):
    """The type of --settings: block_size, keys_per_query and coarse."""
    numbers = [number(int, 1)(part) for part in text.split(":")]
    if len(numbers) not in (2, 3):
        raise argparse.ArgumentTypeError(f"{text} is not block_size:keys_per_query[:coarse]")
    return (*numbers, 8)[:3]


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add_flags(parser)
    add("--only", nargs="+", type=variant_name, default=list(VARIANTS), metavar="NAME",
        help="variants to run")
    add("--list", action="store_true", help="print the names of the variants, run none")
    add("--settings", nargs="+", type=setting, metavar="S:K[:COARSE]",
        help="block sizes, keys a query and, if not 8, blocks in a coarse one; else the teacher's")
    add("--steps", type=number(int, 0), default=0, help="steps of distilling")
    add("--read", nargs="+", type=keys_or_variant, default=[], metavar="K or NAME",
        help="read each distilled student with so many keys, or as such a variant, too")
    add("--no-kernels", dest="kernels", action="store_false", help="plain PyTorch, for edits of sea.py")
    add("--mass", metavar="FILE", help="CSV that the keys and the mass of each layer and head are added to")
    parser.set_defaults(eval_windows=200, csv="ablate.csv")
    args = completed(parser.parse_args())
    if args.read and not args.steps:
        fail("--read reads distilled students; give --steps, too")
    return args


def add_flags(parser):
    """The flags that chance.py has, too."""
    add = parser.add_argument
    add("--teacher", default="out/dense-stdlib/ckpt.pt", help="a dense model, as of distill.py")
    add("--data", help="folder in data/; else the teacher's")
    add("--context", type=number(int, 1), help="T; else as of distill.py")
    add("--batch-size", type=number(int, 1), default=4, help="sequences in a batch")
    add("--lr", type=number(float, 0), help="peak learning rate; else as of distill.py")
    add("--eval-windows", type=number(int, 1), help="windows to evaluate on")
    add("--seed", type=number(int, 0), default=1337, help="of new weights and batches")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto: a GPU if any")
    add("--csv", help="table that rows are added to")


def completed(args):
    """Flags that were not given are as of distill.py, what it has beside these as it stands there."""
    args.device = engine.pick_device(args.device)
    preset = (distill.PRESETS if args.teacher.endswith(".pt") else distill.PUBLISHED)[args.device]
    args.context = args.context or preset.get("context")
    args.lr = preset["lr"] if args.lr is None else args.lr
    return argparse.Namespace(**vars(args), eval_only=None, accumulate=1)


def load_dense(args):
    """The teacher; tokens to train on, and to evaluate on."""
    teacher, _, tokens, held_out = distill.load_teacher(args)
    if teacher.config.attention != "dense":
        fail(f"{args.teacher} has {teacher.config.attention} attention; a teacher must be dense")
    return teacher, tokens, held_out


def table(path, columns):
    """A CSV, new or gone on with, that rows, dictionaries, are added to as soon as they are known."""
    header = ",".join(columns)
    with one_line(OSError, ValueError, hint=f"give another file than {path}"):
        old = Path(path).read_text().splitlines()[:1] if Path(path).exists() else []
    if old and old != [header]:
        fail(f"{path} has other columns; give another file")
    writer = csv.DictWriter(open(path, "a", newline="", buffering=1), columns, lineterminator="\n")
    if not old:
        writer.writeheader()
    return writer


def rows_of(name, setting, teacher, tokens, held_out, args, precision):
    """Make, train and measure a student -> for each way of reading it a row, and its keys_and_mass."""
    begin = time.time()
    kind = VARIANTS[name][0]
    S, K, coarse = setting
    torch.manual_seed(args.seed)
    student = teacher.with_attention(kind, block_size=S, keys_per_query=K, coarse=coarse)
    same = dict(variant=name, block_size=S, coarse=coarse, context=args.context, steps=args.steps,
                trained_keys=K)
    reads = [K]
    if args.steps:
        with as_variant(name, args.kernels):
            loss = evaluate(student, held_out, args.batch_size, args.eval_windows, precision)
            distill.distill(student, teacher, tokens, args, precision, distill.make_optimizer(student),
                            range(1, args.steps + 1))
        same["ppl_untrained"] = perplexity(loss)
        reads += args.read if kind in CHOOSING else []

    for read in reads:
        read_as, keys = (name, read) if isinstance(read, int) else (read, K)
        reader = student.with_attention(VARIANTS[read_as][0], keys_per_query=keys)
        with as_variant(read_as, args.kernels):
            loss = evaluate(reader, held_out, args.batch_size, args.eval_windows, precision)
            kept = look(read_as, reader, held_out, args, precision)
        row = same | dict(read_as=read_as, keys_per_query=keys, ppl=perplexity(loss))
        if kept is not None:
            row["keys"], row["mass"] = kept.mean((0, 2)).tolist()
        yield row | dict(seconds=time.time() - begin), kept
        begin = time.time()


def look(name, model, held_out, args, precision):
    """keys_and_mass on the first window."""
    idx = torch.from_numpy(held_out[:args.context].astype("int64"))[None].to(args.device)
    with torch.no_grad(), precision:
        layers = model.eval()(idx, trace=True).trace
        with as_variant(name):
            return keys_and_mass(model, layers)


def show(row):
    name = row["variant"] if row["read_as"] == row["variant"] else f"{row['variant']} as {row['read_as']}"
    words = [f"{name:26}", f"{row['block_size']}:{row['keys_per_query']}:{row['coarse']}".ljust(10)]
    for column, digits in SHOWN.items():
        words.append(f"{row[column]:10.{digits}f}" if column in row else " " * 10)
    print(*words, flush=True)


def add_heads(writer, row, kept):
    """A row for each layer and head."""
    same = {column: row[column] for column in MASS_COLUMNS if column in row}
    for layer, (keys, mass) in enumerate(kept.tolist()):
        for head in range(len(keys)):
            writer.writerow(same | dict(layer=layer, head=head, keys=keys[head], mass=mass[head]))


@any_output()
@one_line(KeyboardInterrupt, OSError, FloatingPointError, torch.OutOfMemoryError,
          hint="the CSV keeps the rows that were known")
def main():
    args = parse_arguments()
    if args.list:
        return print(*VARIANTS, sep="\n")
    precision, _ = engine.pick_precision(args.device)
    teacher, tokens, held_out = load_dense(args)
    c = teacher.config
    settings = args.settings or [(c.block_size, c.keys_per_query, c.coarse)]
    rows = table(args.csv, COLUMNS)
    heads = table(args.mass, MASS_COLUMNS) if args.mass else None

    print("variant".ljust(26), "S:K:coarse", *(f"{column:>10.10}" for column in SHOWN))
    for name in args.only:
        # The others have neither S nor K.
        for its in settings if VARIANTS[name][0] in CHOOSING else settings[:1]:
            for row, kept in rows_of(name, its, teacher, tokens, held_out, args, precision):
                rows.writerow(row)
                show(row)
                if heads and kept is not None:
                    add_heads(heads, row, kept)


if __name__ == "__main__":
    main()
