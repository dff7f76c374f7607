"""
What each part of SEA is worth: students of one dense teacher, alike but for one thing, distilled for the same
few steps on the same batches and evaluated on the same windows. Prints a table and adds its rows to a CSV.

    python train.py --attention dense                      the teacher, out-dense/ckpt.pt
    python tests/ablate.py                                 every variant, one after the other
    python tests/ablate.py --list                          their names
    python tests/ablate.py --only sea "sea, no cell keys"  some of them; several processes may share a CSV

Columns: perplexity before training and after it, keys per query and the share of the dense attention's mass
on them (in the first held-out window), the attention KL of the last batch, seconds of training, steps.
"evaluated at half" is a row for the same student on windows of half the context, which is other text unless
--eval-windows covers all: compare such rows with each other.
"""
import argparse
import csv
import math
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.common import Parser, fail, number, one_line  # noqa: E402
from data.engine import check_fit, pick_precision  # noqa: E402
from distill import (SETTINGS, WEIGHTS, distill, load_teacher, measure, open_data,  # noqa: E402
                     with_attention)
from sea import (Cache, Picture, SEAttention, cell_bounds, flat_csr_to_dense, implementation,  # noqa: E402
                 row_scores, sinusoids)
from train import add_compile, complete  # noqa: E402

DIGITS = dict(ppl_before=3, ppl=3, keys=1, mass=3, kl=4, seconds=0, steps=0)   # columns that are shown
COLUMNS = ["variant", *DIGITS, "context", *SETTINGS, "batch_size", "lr", "seed"]


# ------------------------------------------------------------------------------------------------------------
# What is done to SEA

class BudgetPerHead(SEAttention):
    def choose(self, log_mass, first_row):
        """Each head's n-th best cells come before any head's next ones, so all get as many, within one."""
        W, M = self.config.map_width, self.config.query_block
        rows = torch.arange(first_row, first_row + log_mass.shape[2], device=log_mass.device)
        empty = cell_bounds(rows // M * M, W).diff() == 0                                     # R W
        order = log_mass.masked_fill(empty, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        return super().choose((W - order.argsort(-1)).float(), first_row)                     # best: W


class OwnBlock(SEAttention):
    def choose(self, log_mass, first_row):
        mask = super().choose(log_mass, first_row)
        return mask._replace(queries=torch.zeros_like(mask.queries))


class TrueMass(SEAttention):
    """Cells chosen by the mass itself, from the student's own q and k: what a perfect estimate would give."""

    def estimate_and_select(self, q, k, v, teacher, cache):
        code = self.encode(q, k, v, sinusoids(0, v), cache)                                   # B H T 2D
        mass = implementation(q.device).pool(q, k, self.config.query_block, self.config.map_width)
        return self.choose(mass, 0), self.gates(code).sigmoid(), torch.zeros((), device=q.device)

    def look(self, q, k, v):
        mask, *_ = self.estimate_and_select(q, k, v, None, Cache())
        return None, flat_csr_to_dense(mask, *q.shape[:2]), None


class WholeKL(SEAttention):
    KL_STEP = 1


class CellKeysAlone(SEAttention):
    def estimate(self, code, *rest):
        """Without the score that kernel attention and MLP make: of it a bias for each cell is left, alike for
        all queries. The gates still come from them."""
        return super().estimate(torch.zeros_like(code), *rest)


def become(kind):
    """A change for Variant: the module keeps its weights and takes the methods of a subclass."""
    return lambda attention: setattr(attention, "__class__", kind)


def scores_by(kind):
    """A change for Variant: the scores come from the CNN or do not, whatever the cell keys say."""
    return lambda attention: setattr(attention, "scores", kind(attention.config).to(attention.omega.device))


def open_gates_halfway(attention):
    nn.init.zeros_(attention.gates.bias)


# ------------------------------------------------------------------------------------------------------------
# The students

@dataclass
class Variant:
    attention: str = "sea"
    settings: dict = field(default_factory=dict)            # of SEA, in place of the base's
    width: float = 1                                        # of the map, times the base's
    change: Callable = lambda attention: None               # of each SEAttention
    without: str = ""                                       # the loss that is left out
    at_half: bool = False                                   # trained on twice the windows of half the context
    further: tuple = ()                                     # more rows for the same student, see further_rows


VARIANTS = {
    "teacher": Variant("dense", further=("half",)),         # not trained
    "dense": Variant("dense", further=("half",)),
    "sea": Variant(further=("keys", "half")),
    "sea, no cell keys": Variant(settings=dict(cell_keys=False)),
    "sea M 1": Variant(settings=dict(query_block=1), further=("keys",)),
    "sea M 1, no cell keys": Variant(settings=dict(query_block=1, cell_keys=False)),
    "performer": Variant("performer"),
    "window": Variant("window"),
    "budget per head": Variant(change=become(BudgetPerHead)),
    "own block only": Variant(change=become(OwnBlock)),
    "gates at 1/2": Variant(change=open_gates_halfway),
    "KL on all blocks": Variant(change=become(WholeKL)),
    "cell keys and the CNN": Variant(change=scores_by(Picture)),
    "no cell keys, no CNN": Variant(settings=dict(cell_keys=False), change=scores_by(row_scores)),
    "cell keys alone": Variant(change=become(CellKeysAlone)),
    "true mass": Variant(change=become(TrueMass)),
    "a quarter of W": Variant(width=1 / 4),
    "half of W": Variant(width=1 / 2),
    "twice W": Variant(width=2),
    **{f"no {loss} loss": Variant(without=loss) for loss in WEIGHTS},
    "dense, no hidden loss": Variant("dense", without="hidden"),
    "sea trained at half": Variant(at_half=True, further=("half",)),
}


def variant_name(text):
    """The type of --only, for argparse."""
    if text not in VARIANTS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {'; '.join(VARIANTS)}")
    return text


def parse_arguments():
    parser = Parser(__doc__)
    add, positive = parser.add_argument, number(int, 1)
    add("--teacher", default="out-dense/ckpt.pt", help="a checkpoint of train.py --attention dense")
    add("--data", default=argparse.SUPPRESS, help="folder in data/ (default: the teacher's)")
    add("--only", nargs="+", type=variant_name, default=argparse.SUPPRESS, metavar="NAME",
        help="variants to run (default: all)")
    add("--list", action="store_true", help="print the names of the variants, run none")
    for name in ("map-width", "keys-per-query", "query-block"):
        add(f"--{name}", type=positive, default=argparse.SUPPRESS, help="of sea (default: the teacher's)")
    add("--steps", type=positive, default=300, help="steps of the optimizer")
    add("--batch-size", type=positive, default=8, help="sequences in a batch")
    add("--lr", type=number(float, 0), default=3e-4, help="peak rate of the teacher's weights")
    add("--warmup", type=number(int, 0), default=argparse.SUPPRESS, help="steps (default: a tenth of them)")
    add("--eval-windows", type=positive, default=400, help="windows to evaluate on")
    add("--seed", type=number(int, 0), default=1337, help="of weights and batches")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto: a GPU if any")
    add("--csv", default="ablate.csv", help="table that rows are added to")
    add_compile(parser)
    args = complete(parser.parse_args(), dict(cuda={}, cpu={}))
    args.only = getattr(args, "only", list(VARIANTS))
    args.warmup = getattr(args, "warmup", args.steps // 10)
    args.settings = {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
    return args


def training_flags(args, variant):
    """What distill.distill reads, as distill.py has it by default."""
    weights = {f"weight_{name}": weight * (name != variant.without) for name, (weight, _) in WEIGHTS.items()}
    flags = vars(args) | dict(batch_size=args.batch_size * (1 + variant.at_half))        # as many tokens
    return argparse.Namespace(**flags, **weights, weight_decay=0.01, new_lr=10., clip=1., accumulate=1,
                              log_interval=max(1, args.steps // 3), save_interval=args.steps)


def make_student(teacher, variant, args):
    torch.compiler.reset()                                  # as if nothing had run before in this process
    torch.manual_seed(args.seed)
    width = args.settings.get("map_width", teacher.config.map_width) * variant.width
    settings = args.settings | dict(map_width=round(width)) | variant.settings
    student = with_attention(teacher, variant.attention, settings)
    for block in student.layers:
        variant.change(block.self_attn.attention)
    check_fit(student.config, args.batch_size, args.device)
    return student


@contextmanager
def at_context(model, context):
    """Let a model look at fewer tokens for a while; its table of positions stays whole."""
    whole, model.config = model.config.context, replace(model.config, context=context)
    yield
    model.config = replace(model.config, context=whole)


# ------------------------------------------------------------------------------------------------------------
# The rows of the table

def columns_of(model, tokens, args, precision):
    """A model on held-out text, at its context of now."""
    windows = args.eval_windows * args.context // model.config.context       # as many tokens at any context
    loss, keys, mass = measure(model, tokens, args.batch_size, windows, precision)
    config = {name: getattr(model.config, name) for name in ("context", *SETTINGS)}
    return dict(ppl=math.exp(loss), keys=keys, mass=mass, **config)


def train(student, teacher, tokens, variant, args, precision):
    """Distil -> seconds, steps and the attention KL at the end; Ctrl-C ends the program after a step."""
    def stop_early(step, stop):
        if stop:
            raise SystemExit(130)
    begin, half = time.time(), student.config.context // 2
    with at_context(student, half if variant.at_half else student.config.context):
        losses = distill(student, teacher, tokens, training_flags(args, variant), precision, save=stop_early)
    signal.signal(signal.SIGINT, signal.default_int_handler)          # no step is left to be ended
    kl = losses["attention"] if variant.attention == "sea" else None
    return dict(kl=kl, seconds=time.time() - begin, steps=args.steps)


def further_rows(name, variant, student, measured):
    """The same student on windows of half the context, and with half and twice the keys."""
    if "half" in variant.further:
        with at_context(student, student.config.context // 2):
            yield dict(variant=f"{name}, evaluated at half", **measured(student))
    if "keys" in variant.further:
        trained_with = student.config.keys_per_query
        for keys in (max(1, trained_with // 2), 2 * trained_with):
            student.set_keys_per_query(keys)
            yield dict(variant=f"{name}, {keys} keys at test", **measured(student))


def rows_of(name, teacher, tokens, evaluated, args, precision):
    """Make, train and measure a variant -> rows of the table, each when it is known."""
    measured = lambda model: columns_of(model, evaluated, args, precision)
    variant, student, trained = VARIANTS[name], teacher, {}
    if name != "teacher":
        student = make_student(teacher, variant, args)
        trained["ppl_before"] = measured(student)["ppl"]
        trained |= train(student, teacher, tokens, variant, args, precision)
    yield dict(variant=name, **trained, **measured(student))
    yield from further_rows(name, variant, student, measured)


def open_table(path):
    """A CSV to add rows to. Of several processes one makes it, long before any of them has a row."""
    with one_line(OSError, hint="give another file by --csv"):
        with suppress(FileExistsError), open(path, "x", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(COLUMNS)
        return csv.DictWriter(open(path, "a", newline="", buffering=1), COLUMNS, lineterminator="\n")


def show(row):
    cells = ("" if row.get(name) is None else f"{row[name]:.{n}f}" for name, n in DIGITS.items())
    print(f"{row['variant']:38}", *(f"{cell:>10}" for cell in cells), flush=True)


def finish(name, rows, table, args):
    """Show and write a variant's rows -> did it come to its end? If not, one line has said why."""
    try:
        with one_line(FloatingPointError, torch.OutOfMemoryError, hint=f"that was {name!r}"):
            for row in rows:
                show(row)
                table.writerow(dict(batch_size=args.batch_size, lr=args.lr, seed=args.seed) | row)
    except SystemExit as leaving:                           # 130 is Ctrl-C; the other variants may still run
        if leaving.code != 2:
            raise
        return False
    return True


@one_line(KeyboardInterrupt, hint="the CSV keeps the rows that were known")
def main():
    args = parse_arguments()
    if args.list:
        return print(*VARIANTS, sep="\n")
    teacher, tokenizer, data = load_teacher(args)
    splits = open_data(data, argparse.Namespace(split="val"), teacher, tokenizer)
    args.context = teacher.config.context
    (precision, why), table = pick_precision(args.device), open_table(args.csv)
    print(f"teacher {args.teacher}, data/{data}, {why}")
    print(f"{'variant':38}", *(f"{name:>10}" for name in DIGITS), flush=True)
    failed = [name for name in args.only
              if not finish(name, rows_of(name, teacher, *splits, args, precision), table, args)]
    if failed:
        fail(f"these did not come to their end: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
