"""
Turn a dense model into one with linear attention: the student keeps the teacher's weights, its attention is
replaced, and it learns to match what the teacher computes.

    python train.py --attention dense                            a small teacher, out-dense/ckpt.pt
    python distill.py                                            its SEA student, out-sea-student/ckpt.pt
    python distill.py --attention window                         a rival, also performer; dense: the yardstick
    python distill.py --teacher facebook/opt-125m                published weights, on data/wikitext2
    python distill.py --eval-only --teacher out-sea-student/ckpt.pt --keys-per-query 32
"""
import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from data.common import Parser, fail, load
from model import ATTENTIONS, OPT
from train import (add_preset, complete, evaluate, learning_rate, load_checkpoint, peak_memory,
                   pick_precision, random_batch, save_checkpoint)

PRESETS = {"cuda": dict(steps=1000, batch_size=8, warmup=50),
           "cpu": dict(steps=150, batch_size=8, warmup=15)}
WEIGHTS = dict(hidden=(5.0, "squared distance of the hidden states"), logits=(0.2, "KL of the next token"),
               output=(1.0, "squared distance of the attentions' outputs"), text=(0.1, "the text's own loss"),
               attention=(0.1, "KL of the estimate and the teacher's attention"))       # the paper's weights
SETTINGS = "map_width", "keys_per_query", "query_block", "cell_keys"       # where not given, the teacher's


def parse_arguments():
    parser = Parser(__doc__)
    group = parser.add_argument_group("models")
    group.add_argument("--teacher", default="out-dense/ckpt.pt",
                       help="a checkpoint, a folder of OPT weights, or a name such as facebook/opt-125m")
    group.add_argument("--attention", default="sea", choices=ATTENTIONS, help="the student's")
    group = parser.add_argument_group("SEA, where not as in the teacher's configuration")
    for name, what in (("map-width", "W, cells in a row of the map"),
                       ("keys-per-query", "selected past keys, the mean a query and head"),
                       ("query-block", "M, neighbouring queries that share cell bounds")):
        group.add_argument(f"--{name}", type=int, default=argparse.SUPPRESS, help=what)
    group.add_argument("--cell-keys", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                       help="add q . mean(keys of the cell) to each score; the paper does not")
    group = parser.add_argument_group("weights of the losses")
    for name, (weight, what) in WEIGHTS.items():
        group.add_argument(f"--weight-{name}", type=float, default=weight, help=what)
    group = parser.add_argument_group("training")
    group.add_argument("--data", default=argparse.SUPPRESS,
                       help="folder in data/ (default: the teacher's, wikitext2 for OPT)")
    for name, what in (("steps", "steps of the optimizer"), ("batch_size", "sequences in a step"),
                       ("warmup", "steps up to the peak, then a cosine to a tenth of it")):
        add_preset(group, PRESETS, name, what)
    group.add_argument("--lr", type=float, default=argparse.SUPPRESS,
                       help="peak rate of the teacher's weights (default: 3e-4, for OPT the paper's 1e-5)")
    group.add_argument("--new-lr", type=float, default=10., help="rate of new parameters, times --lr")
    group.add_argument("--weight-decay", type=float, default=0.01, help="of matrices; nothing else decays")
    group.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    group.add_argument("--seed", type=int, default=1337, help="of weights and batches")
    group = parser.add_argument_group("running")
    group.add_argument("--eval-only", action="store_true", help="evaluate --teacher, train nothing")
    group.add_argument("--split", default="val", choices=("val", "test"), help="what to evaluate on")
    group.add_argument("--eval-windows", type=int, default=200, help="windows of the split to evaluate on")
    group.add_argument("--log-interval", type=int, default=10, help="steps between lines")
    group.add_argument("--out", default=argparse.SUPPRESS,
                       help="folder for ckpt.pt (default: out-ATTENTION-student)")
    group.add_argument("--device", default="auto", choices=("auto", *PRESETS), help="auto: a GPU if any")
    args = complete(parser.parse_args(), PRESETS)
    args.out = Path(getattr(args, "out", f"out-{args.attention}-student"))
    args.settings = {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
    return args


# ------------------------------------------------------------------------------------------------------------
# What both models compute on the way, and how far apart it is

class Trace:
    """What a model computes while this is open: hidden states, attention outputs, q, k, v of each layer."""

    def __init__(self, model):
        self.model, self.hidden, self.outputs, self.attended = model, [], [], []

    def __enter__(self):
        keep = lambda where: lambda module, args, out: where.append(out)
        self.hooks = []
        for block in self.model.layers:
            self.hooks += [block.register_forward_hook(keep(self.hidden)),
                           block.self_attn.register_forward_hook(keep(self.outputs)),
                           block.self_attn.attention.register_forward_pre_hook(
                               lambda module, args: self.attended.append((module, *args[:3])))]
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def distillation_losses(student, teacher, idx, targets):
    """One forward of both on idx, targets (B, T) -> the five losses of WEIGHTS, by name."""
    with torch.no_grad(), Trace(teacher) as wanted:
        wanted_logits, _ = teacher(idx)                                                       # B T V
    with Trace(student) as made:
        logits, loss = student(idx, targets, teacher=[(q, k) for _, q, k, _ in wanted.attended])
    mse = lambda ours, theirs: sum(F.mse_loss(x.float(), y.float()) for x, y in zip(ours, theirs)) / len(ours)
    log_q, log_p = (x.flatten(0, 1).float().log_softmax(-1) for x in (logits, wanted_logits))      # BT V
    return dict(hidden=mse(made.hidden, wanted.hidden), output=mse(made.outputs, wanted.outputs), text=loss,
                logits=F.kl_div(log_q, log_p, log_target=True, reduction="batchmean"),
                attention=student.attention_kl())


@torch.no_grad()
def keys_and_mass(model, idx):
    """Keys that a query attends to, and their share of the dense attention's mass: means over layers, heads
    and queries of idx (1, T). It is T x T, so for one sequence; None, None where no keys are chosen."""
    if model.config.attention not in ("sea", "window"):
        return None, None
    with Trace(model) as trace:
        model(idx)
    keys, mass, rows = [], [], torch.arange(idx.shape[1], device=idx.device)
    for attention, q, k, v in trace.attended:
        sea = model.config.attention == "sea"
        mask = attention.look(q, k, v)[1] if sea else attention.allowed(rows, len(rows))      # B H T T
        dense = (q @ k.mT).masked_fill(rows > rows[:, None], -torch.inf).softmax(-1, torch.float32)
        keys.append(mask.sum(-1).float().mean().item())
        mass.append((dense * mask).sum(-1).mean().item())
    return sum(keys) / len(keys), sum(mass) / len(mass)


# ------------------------------------------------------------------------------------------------------------
# Setting up

def load_teacher(args):
    """The teacher, the name of its tokenizer, and the data set to take."""
    if args.teacher.endswith(".pt"):
        if args.teacher == "out-dense/ckpt.pt" and not Path(args.teacher).exists():
            fail("there is no teacher yet; make one: python train.py --attention dense")
        teacher, saved = load_checkpoint(args.teacher, args.device)
        tokenizer, data = saved["tokenizer"], saved["data"]
    else:
        try:
            teacher, tokenizer, data = OPT.from_pretrained(args.teacher).to(args.device), "opt", "wikitext2"
        except ValueError as error:
            fail(error)
    return teacher.eval(), tokenizer, getattr(args, "data", data)


def open_data(name, args, teacher, tokenizer):
    """Tokens to train on and tokens to evaluate on, which must be the teacher's."""
    train, evaluated, meta = load(name)
    if args.split == "test":
        evaluated, _ = load(name, "test")
    if meta["tokenizer"] != tokenizer or meta["vocab_size"] > teacher.config.vocab_size:
        fail(f"data/{name} is written in {meta['tokenizer']} tokens and the teacher reads {tokenizer}; "
             f"prepare it with --tokenizer {tokenizer}, or take another --data")
    if min(len(train), len(evaluated)) <= teacher.config.context:
        fail(f"data/{name} is shorter than the teacher's context of {teacher.config.context}; take more text")
    return train, evaluated


def with_attention(teacher, attention, settings):
    """The teacher's weights under another attention or other settings; what the attention adds is new."""
    try:
        student = OPT(replace(teacher.config, attention=attention, **settings))
    except ValueError as error:
        fail(error)
    same = attention == teacher.config.attention
    weights = {name: x for name, x in teacher.state_dict().items() if same or ".attention." not in name}
    student.load_state_dict(weights, strict=False)
    return student.to(next(teacher.parameters()).device)


def make_optimizer(student, args):
    """AdamW over four groups: the teacher's parameters or new ones, matrices that decay or not."""
    groups = []
    for new, decay in ((False, False), (False, True), (True, False), (True, True)):
        chosen = [p for name, p in student.named_parameters() if (".attention." in name) == new
                  and (p.dim() >= 2 and "score_weights" not in name) == decay]
        groups.append(dict(params=chosen, weight_decay=args.weight_decay * decay,
                           peak=args.lr * (args.new_lr if new else 1)))
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95))


def describe(name, model, tokens, args, precision):
    """Print what a model is worth on the split, and return it: loss, keys a query, their share of mass."""
    loss = evaluate(model, tokens, args.batch_size, args.eval_windows, precision)
    idx = torch.from_numpy(tokens[:model.config.context].astype("int64"))[None].to(args.device)
    with precision:
        keys, mass = keys_and_mass(model.eval(), idx)
    print(f"{name}: {args.split}_loss {loss:.4f} {args.split}_ppl {math.exp(loss):.3f}"
          + (f" keys_per_query {keys:.1f} mass_kept {mass:.3f}" if keys else ""), flush=True)
    return loss, keys, mass


def distill(student, teacher, tokens, args, precision):
    """Train the student for args.steps, with a line every args.log_interval -> the last losses by name."""
    optimizer, mark = make_optimizer(student, args), time.time()
    student.train()
    for step in range(1, args.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, group["peak"], args.warmup, args.steps)
        seed = args.seed * 10 ** 9 + step
        batch = random_batch(tokens, student.config.context, args.batch_size, seed, args.device)
        with precision:
            losses = distillation_losses(student, teacher, *batch)
        total = sum(getattr(args, f"weight_{name}") * loss for name, loss in losses.items())
        total.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % args.log_interval == 0 or step == args.steps:
            losses = {"total": total.item(), **{name: loss.item() for name, loss in losses.items()}}
            seconds = (time.time() - mark) / ((step - 1) % args.log_interval + 1)
            left = (args.steps - step) * seconds
            print(f"step {step}/{args.steps}", *(f" {name} {loss:.4f}" for name, loss in losses.items()),
                  f" {1000 * seconds:.0f} ms  {left // 60:.0f}:{left % 60:02.0f} left", flush=True)
            mark = time.time()
    return losses


def main():
    args = parse_arguments()
    torch.manual_seed(args.seed)
    teacher, tokenizer, name = load_teacher(args)
    tokens, evaluated = open_data(name, args, teacher, tokenizer)
    precision, why = pick_precision(args.device)
    args.lr = getattr(args, "lr", 1e-5 if tokenizer == "opt" else 3e-4)
    attention = teacher.config.attention if args.eval_only else args.attention
    student = with_attention(teacher, attention, args.settings)
    print(f"teacher {args.teacher} ({teacher.config.attention}), data/{name}, {why}")
    if args.eval_only:
        loss, *_ = describe("model", student, evaluated, args, precision)
        return print(f"final: {args.split}_loss {loss:.4f} {args.split}_ppl {math.exp(loss):.3f}")

    start, *_ = describe("teacher", teacher, evaluated, args, precision)
    before, *_ = describe(f"{args.attention} student before", student, evaluated, args, precision)
    args.out.mkdir(parents=True, exist_ok=True)
    begin = time.time()
    losses = distill(student, teacher, tokens, args, precision)
    seconds = time.time() - begin
    save_checkpoint(args.out / "ckpt.pt", student, tokenizer=tokenizer, data=name)
    loss, keys, mass = describe(f"{args.attention} student after", student, evaluated, args, precision)
    print(f"final: {args.split}_loss {loss:.4f} {args.split}_ppl {math.exp(loss):.3f} "
          f"ppl_before {math.exp(before):.3f} teacher_ppl {math.exp(start):.3f} "
          + (f"keys_per_query {keys:.1f} mass_kept {mass:.3f} " if keys else "")
          + f"attention_kl {losses['attention']:.4f} steps {args.steps} seconds {seconds:.0f} "
          f"peak_gib {peak_memory(args.device):.2f}")


if __name__ == "__main__":
    main()
