"""
Turn a dense model into one with linear attention: the student keeps the teacher's weights, its attention is
replaced, and it learns to match what the teacher computes.

    python train.py --attention dense                            a small teacher, out-dense/ckpt.pt
    python distill.py                                            its SEA student, out-sea-student/ckpt.pt
    python distill.py --attention window                         a rival, also performer; dense: the yardstick
    python distill.py --teacher facebook/opt-125m                published weights, on data/wikitext2
    python distill.py --eval-only --teacher out-sea-student/ckpt.pt --keys-per-query 32

--resume, torchrun, Ctrl-C and mistakes are as train.py says.
"""
import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from data.common import Parser, fail, load, number, one_line
from data.engine import (any_rank, backward_of, check_fit, compile_estimators, ctrl_c, fingerprint,
                         first_rank_first, join_ranks, leave, load_checkpoint, make_folder, optimizer_step,
                         parallel, peak_memory, pick_precision, resume, save_checkpoint, settings_of,
                         step_batches, training_script)
from model import ATTENTIONS, OPT, Trace
from train import (add_compile, add_preset, add_running, add_training, clock, complete, evaluate,
                   make_optimizer, set_rate)

PRESETS = {"cuda": dict(steps=600, batch_size=8, warmup=60, save_interval=100),
           "cpu": dict(steps=150, batch_size=16, warmup=15, save_interval=25)}
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
                       ("keys-per-query", "selected past keys per query and head, on average"),
                       ("query-block", "M, neighbouring queries that share cell bounds")):
        group.add_argument(f"--{name}", type=number(int, 1), default=argparse.SUPPRESS, help=what)
    group.add_argument("--cell-keys", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                       help="q . mean(keys of the cell) in each score, in place of the paper's CNN")
    group = parser.add_argument_group("weights of the losses")
    for name, (weight, what) in WEIGHTS.items():
        group.add_argument(f"--weight-{name}", type=number(float, 0), default=weight, help=what)
    group = parser.add_argument_group("training")
    group.add_argument("--data", default=argparse.SUPPRESS,
                       help="folder in data/ (default: the teacher's, wikitext2 for OPT)")
    add_preset(group, PRESETS, "steps", "steps of the optimizer")
    add_preset(group, PRESETS, "batch_size", "sequences in a micro-batch")
    add_preset(group, PRESETS, "warmup", "steps up to the peak, then a cosine to a tenth of it", 0)
    group.add_argument("--lr", type=number(float, 0), default=argparse.SUPPRESS,
                       help="peak rate of the teacher's weights (default: 3e-4, for OPT the paper's 1e-5)")
    group.add_argument("--new-lr", type=number(float, 0), default=10.,
                       help="rate of new parameters, times --lr")
    add_training(group, weight_decay=0.01)
    group = parser.add_argument_group("running")
    group.add_argument("--eval-only", action="store_true", help="evaluate --teacher, train nothing")
    group.add_argument("--split", default="val", choices=("val", "test"), help="what to evaluate on")
    add_preset(group, PRESETS, "save_interval", "steps between checkpoints")
    add_compile(group)
    add_running(group)
    group.add_argument("--out", default=argparse.SUPPRESS,
                       help="folder for ckpt.pt (default: out-ATTENTION-student)")
    args = complete(parser.parse_args(), PRESETS)
    args.out = Path(getattr(args, "out", f"out-{args.attention}-student"))
    args.settings = {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
    return args


# ------------------------------------------------------------------------------------------------------------
# What both models compute on the way, and how far apart it is

def distillation_losses(student, teacher, idx, targets, run=None):
    """One forward of both on idx, targets (B, T) -> the five losses of WEIGHTS, by name. run: the student, as
    DistributedDataParallel wraps it."""
    with torch.no_grad(), Trace(teacher) as wanted:
        wanted_logits, _ = teacher(idx)                                                       # B T V
    with Trace(student) as made:
        queries_keys = [(q, k) for _, q, k, _ in wanted.attended]
        logits, loss = (run or student)(idx, targets, teacher=queries_keys)
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
    keys, mass, rows = [], [], torch.arange(idx.shape[1], device=idx.device)
    with Trace(model) as seen:
        model(idx)
    for attention, q, k, v in seen.attended:
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
        with first_rank_first(args.device), one_line(ValueError, TypeError):
            teacher, tokenizer, data = OPT.from_pretrained(args.teacher).to(args.device), "opt", "wikitext2"
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
    with one_line(ValueError):
        config = replace(teacher.config, attention=attention, **settings)
    check_fit(config, 1, next(teacher.parameters()).device.type)
    student = OPT(config)
    same = attention == teacher.config.attention
    weights = {name: x for name, x in teacher.state_dict().items() if same or ".attention." not in name}
    try:
        student.load_state_dict(weights, strict=same)
    except RuntimeError:                                         # of a SEA teacher
        fail(f"the teacher learnt its map with {teacher.config.map_width} cells a row and with cell_keys "
             f"{teacher.config.cell_keys}; leave --map-width and --cell-keys out")
    return student.to(next(teacher.parameters()).device)


def measure(model, tokens, batch_size, at_most, precision):
    """Loss on `at_most` windows of a split; of the first one, keys per query and their share of the mass."""
    loss = evaluate(model, tokens, batch_size, at_most, precision)
    idx = torch.from_numpy(tokens[:model.config.context].astype("int64"))[None]
    with precision:
        return loss, *keys_and_mass(model.eval(), idx.to(next(model.parameters()).device))


def describe(name, model, tokens, args, precision):
    """Print what `measure` finds, and return it."""
    with one_line(FloatingPointError, hint=f"the {name} is spoilt"):
        loss, keys, mass = measure(model, tokens, args.batch_size, args.eval_windows, precision)
    print(f"{name}: {args.split}_loss {loss:.4f} {args.split}_ppl {math.exp(loss):.3f}"
          + (f" keys_per_query {keys:.1f} mass_kept {mass:.3f}" if keys else ""), flush=True)
    return loss, keys, mass


def distill(student, teacher, tokens, args, precision, optimizer=None, done=0,
            save=lambda step, stop: None):
    """Train the student from step `done` to args.steps -> the last losses. save(step, stop) is called after
    some steps, after the last, and, with stop true, after Ctrl-C."""
    optimizer = optimizer or make_optimizer(student, args.lr, args.weight_decay, args.new_lr)
    run, mark, marked, pressed = parallel(student.train()), time.time(), done, ctrl_c()
    if args.compile:
        compile_estimators(student)

    def losses_of(*batch):
        losses = distillation_losses(student, teacher, *batch, run)
        total = sum(getattr(args, f"weight_{name}") * losses[name] for name in WEIGHTS)
        return [total, *(losses[name] for name in WEIGHTS)]
    backward = backward_of(losses_of, precision, args)

    for step in range(done + 1, args.steps + 1):
        set_rate(optimizer, step, args)
        batches = step_batches(tokens, student.config.context, args, step)
        with one_line(FloatingPointError, hint=f"this is step {step}: try a lower --lr or --new-lr"):
            means = optimizer_step(run, optimizer, batches, backward, args.clip).tolist()
        losses = dict(zip(("total", *WEIGHTS), means))
        if step % args.log_interval == 0 or step == args.steps:
            seconds = (time.time() - mark) / (step - marked)
            print(f"step {step}/{args.steps}", *(f" {name} {loss:.4f}" for name, loss in losses.items()),
                  f" {1000 * seconds:.0f} ms  {clock((args.steps - step) * seconds)} left", flush=True)
            mark, marked = time.time(), step
        stop = any_rank(pressed, args.device)
        if stop or step % args.save_interval == 0 or step == args.steps:
            save(step, stop)
    return losses


@training_script
def main():
    args = parse_arguments()
    join_ranks(args.device)
    torch.manual_seed(args.seed)
    teacher, tokenizer, args.data = load_teacher(args)
    tokens, evaluated = open_data(args.data, args, teacher, tokenizer)
    precision, why = pick_precision(args.device)
    args.lr = getattr(args, "lr", 1e-5 if tokenizer == "opt" else 3e-4)
    attention = teacher.config.attention if args.eval_only else args.attention
    student = with_attention(teacher, attention, args.settings)
    print(f"teacher {args.teacher} ({teacher.config.attention}), data/{args.data}, {why}")
    if args.eval_only:
        loss, *_ = describe("model", student, evaluated, args, precision)
        return print(f"final: {args.split}_loss {loss:.4f} {args.split}_ppl {math.exp(loss):.3f}")

    check_fit(student.config, args.batch_size, args.device)
    optimizer = make_optimizer(student, args.lr, args.weight_decay, args.new_lr)
    done, path = 0, args.out / "ckpt.pt"
    settings = settings_of(args, tokens)
    settings["teacher"] = fingerprint(args.teacher, teacher.embed_tokens.weight)
    if args.resume:
        saved = resume(path, student, optimizer, settings)
        done, (start, before) = saved["step"], saved["before"]
    else:
        start, *_ = describe("teacher", teacher, evaluated, args, precision)
        before, *_ = describe(f"{args.attention} student before", student, evaluated, args, precision)
    make_folder(args.out)

    def save(step, stop):
        save_checkpoint(path, student, tokenizer=tokenizer, data=args.data, step=step, settings=settings,
                        before=(start, before), optimizer=optimizer.state_dict())
        if stop:
            leave(path, step, args.steps)
    begin = time.time()
    losses = distill(student, teacher, tokens, args, precision, optimizer, done, save)
    seconds = time.time() - begin
    loss, keys, mass = describe(f"{args.attention} student after", student, evaluated, args, precision)
    print(f"final: {args.split}_loss {loss:.4f} {args.split}_ppl {math.exp(loss):.3f} "
          f"ppl_before {math.exp(before):.3f} teacher_ppl {math.exp(start):.3f} "
          + (f"keys_per_query {keys:.1f} mass_kept {mass:.3f} " if keys else "")
          + f"attention_kl {losses['attention']:.4f} steps {args.steps} seconds {seconds:.0f} "
          f"peak_gib {peak_memory(args.device):.2f}")


if __name__ == "__main__":
    main()
