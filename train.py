"""
Train a language model from scratch, with SEA attention or one of its rivals, on one GPU or on the CPU.

    python train.py                             the demo: prepares data/stdlib, trains, writes out/ckpt.pt
    python train.py --attention dense           the same model with dense attention, in out-dense/
    python train.py --data shakespeare          after python data/shakespeare.py
    python train.py --resume                    goes on from out/ckpt.pt; the other flags as before
    torchrun --nproc-per-node=2 train.py        on two GPUs: twice the micro-batches in a step

The defaults are a preset for the device that is found; every flag given replaces one value of it. Ctrl-C ends
the step, saves and leaves with exit status 130. A mistake is one line and exit status 2.
"""
import argparse
import csv
import math
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch

import sea
from data.common import FOLDER, Parser, fail, load, number, one_line, windows, write_whole
from data.engine import (RANK, RANKS, any_rank, backward_of, check_fit, ctrl_c, first_rank_first, join_ranks,
                         leave, make_folder, optimizer_step, parallel, peak_memory, pick_device,
                         pick_precision, resume, save_checkpoint, settings_of, step_batches, training_script)
from model import ATTENTIONS, OPT, OPTConfig

PRESETS = {
    "cuda": dict(n_layer=8, n_head=8, n_embd=512, context=2048, map_width=512, keys_per_query=64,
                 query_block=16, batch_size=8, steps=2000, warmup=100, eval_interval=500),
    "cpu": dict(n_layer=4, n_head=4, n_embd=256, context=128, map_width=32, keys_per_query=8,
                query_block=8, batch_size=24, steps=280, warmup=28, eval_interval=70),
}
COLUMNS = "step loss attention_kl val_loss lr ms tokens_per_s peak_gib".split()      # of log.csv


def add_preset(group, presets, name, what, least=1):
    """A whole-number flag whose default depends on the device."""
    shown = " / ".join(f"{presets[device][name]} {device}" for device in presets)
    group.add_argument("--" + name.replace("_", "-"), type=number(int, least), default=argparse.SUPPRESS,
                       help=f"{what} (preset: {shown})")


def parse_arguments():
    parser = Parser(__doc__)
    add = lambda *args: add_preset(group, PRESETS, *args)
    group = parser.add_argument_group("model")
    group.add_argument("--attention", default="sea", choices=ATTENTIONS, help="kind of attention")
    add("n_layer", "blocks")
    add("n_head", "heads of a block")
    add("n_embd", "width of the model")
    add("context", "T, tokens that the model looks at")
    group = parser.add_argument_group("SEA")
    add("map_width", "W, cells in a row of the map")
    add("keys_per_query", "selected past keys per query and head, on average")
    add("query_block", "M, neighbouring queries that share cell bounds")
    group.add_argument("--num-features", type=number(int, 1), default=OPTConfig.num_features,
                       help="F, width of phi")
    group.add_argument("--cell-keys", action=argparse.BooleanOptionalAction, default=OPTConfig.cell_keys,
                       help="q . mean(keys of the cell) in each score, in place of the paper's CNN")
    group.add_argument("--kl-weight", type=number(float, 0), default=0.1, help="of the attention KL")
    group = parser.add_argument_group("training")
    group.add_argument("--data", default="stdlib", help="folder in data/")
    add("steps", "steps of the optimizer")
    add("batch_size", "sequences in a micro-batch")
    group.add_argument("--lr", type=number(float, 0), default=1e-3, help="peak learning rate")
    add("warmup", "steps up to the peak, then a cosine to a tenth of it", 0)
    add_training(group, weight_decay=0.1)
    group = parser.add_argument_group("running")
    group.add_argument("--out", default=argparse.SUPPRESS,
                       help="folder for ckpt.pt and log.csv (default: out; out-ATTENTION if that is not sea)")
    add_compile(group)
    add("eval_interval", "steps between validations")
    add_running(group)
    args = complete(parser.parse_args(), PRESETS)
    args.out = Path(getattr(args, "out", "out" if args.attention == "sea" else f"out-{args.attention}"))
    return args


def add_training(group, weight_decay):
    """The flags of the optimizer that distill.py has too."""
    group.add_argument("--accumulate", type=number(int, 1, 10000), default=1,
                       help="micro-batches in a step, on each GPU")
    group.add_argument("--weight-decay", type=number(float, 0), default=weight_decay,
                       help="of matrices; nothing else decays")
    group.add_argument("--clip", type=number(float, 0), default=1.0, help="largest gradient norm; 0: any")
    group.add_argument("--seed", type=number(int, 0), default=1337, help="of weights and batches")


def add_compile(group):
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                       help="torch.compile and, on one GPU, a CUDA graph of the step: half a minute at the "
                            "start, then faster (default: on a GPU)")


def add_running(group):
    group.add_argument("--resume", action="store_true", help="go on from the ckpt.pt of the same flags")
    group.add_argument("--device", default="auto", choices=("auto", *PRESETS), help="auto: a GPU if any")
    group.add_argument("--eval-windows", type=number(int, 1), default=400, help="windows to evaluate on")
    group.add_argument("--log-interval", type=number(int, 1), default=10, help="steps between lines")


def complete(args, presets):
    """Fill in the device, and its preset where flags were not given."""
    args.device = pick_device(args.device)
    compiles = sea.implementation(args.device) is not sea             # torch.compile needs Triton as well
    return argparse.Namespace(**{"compile": compiles, **presets[args.device], **vars(args)})


@torch.no_grad()
def evaluate(model, data, batch_size, at_most, precision):
    """Mean loss, nats per token, over contiguous windows of a split, `at_most` of them evenly spread: the
    same ones for every model of this context."""
    context, device = model.config.context, next(model.parameters()).device
    starts = torch.arange(0, len(data) - context, context)
    starts = starts[torch.linspace(0, len(starts) - 1, min(at_most, len(starts))).long()]
    training, total = model.training, 0.
    model.eval()
    for few in starts.split(batch_size):
        with precision:
            total += model(*windows(data, few, context, device))[1].item() * len(few)
    model.train(training)
    if not math.isfinite(total):
        raise FloatingPointError(f"the loss on held-out text is {total}")
    return total / len(starts)


def learning_rate(step, peak, warmup, steps):
    """Linear warm-up, then a cosine towards a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_rate(optimizer, step, args):
    """The rate of step 1, 2 .. args.steps, for each group from its own peak."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step - 1, group["peak"], args.warmup, args.steps)


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def make_optimizer(model, lr, weight_decay, new=1.):
    """AdamW. Matrices decay; biases, norms and the weights of scores do not. What the attention adds to OPT
    learns at `new` times lr."""
    groups = {}
    for name, p in model.named_parameters():
        decays, added = p.dim() >= 2 and ".score_" not in name, ".attention." in name
        groups.setdefault((decays, added), []).append(p)
    groups = [dict(params=params, weight_decay=weight_decay * decays, peak=lr * (new if added else 1.))
              for (decays, added), params in groups.items()]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=next(model.parameters()).is_cuda)


def open_data(args):
    """Train and validation tokens and their meta data; prepares the embedded data set where it is missing."""
    with first_rank_first(args.device):
        if args.data == "stdlib" and not (FOLDER / "stdlib" / "meta.json").exists():
            if subprocess.run([sys.executable, FOLDER / "stdlib.py"]).returncode:
                raise SystemExit(2)
    train, val, meta = load(args.data)
    if min(len(train), len(val)) <= args.context:
        fail(f"data/{args.data} has {len(train):,} tokens to train on and {len(val):,} to validate; "
             f"give a --context under {min(len(train), len(val))}")
    return train, val, meta


def make_model(args, vocab_size):
    names = [field.name for field in fields(OPTConfig) if hasattr(args, field.name)]
    with one_line(ValueError):
        config = OPTConfig(vocab_size=vocab_size, **{name: getattr(args, name) for name in names})
    check_fit(config, args.batch_size, args.device)
    return OPT(config).to(args.device)


def training_losses(run, model, kl_weight):
    """What a step makes of a batch: the loss, of which the text's is one part and the attention KL another.
    run: the model, as torch.compile and DistributedDataParallel wrap it."""
    def losses_of(idx, targets):
        _, loss = run(idx, targets)
        kl = model.attention_kl()
        return loss + kl_weight * kl, loss, kl
    return losses_of


def open_log(path, done):
    """log.csv, with the rows up to step `done` of a run that goes on: those after it are made once more."""
    rows = path.read_text(errors="replace").splitlines() if done and path.is_file() else []
    rows = [row for row in rows if row.count(",") == len(COLUMNS) - 1 and row.split(",")[0].isdecimal()]
    kept = [row for row in rows if int(row.split(",")[0]) <= done]
    if RANK == 0:
        write_whole(path, "\n".join([",".join(COLUMNS), *kept, ""]).encode())
    return csv.writer(open(os.devnull if RANK else path, "a", newline="", buffering=1), lineterminator="\n")


def report(log, args, step, losses, val_loss, seconds, rate):
    """One line for people and one for log.csv; `seconds` are those of a step, without validation."""
    speed = args.batch_size * args.accumulate * RANKS * args.context / seconds
    memory = peak_memory(args.device)
    print(f"step {step}/{args.steps}  loss {losses[0]:.4f}  kl {losses[1]:.4f}  {1000 * seconds:.0f} ms  "
          f"{speed:,.0f} tokens/s  {memory:.2f} GiB  {clock((args.steps - step) * seconds)} left"
          + (f"  val_loss {val_loss:.4f}" if val_loss else ""), flush=True)
    log.writerow([step, *losses, val_loss, rate, 1000 * seconds, speed, memory])


def introduce(args, model, source, why):
    print(f"preset {args.device}:", *(f"{name} {getattr(args, name)}" for name in PRESETS[args.device]))
    by = f" by {sea.implementation(args.device).__name__}.py" if args.attention == "sea" else ""
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {args.attention} attention"
          f"{by}, {why}; data/{args.data}: {source}")


@training_script
def main():
    args = parse_arguments()
    join_ranks(args.device)
    torch.manual_seed(args.seed)
    tokens, val, meta = open_data(args)
    path, settings = args.out / "ckpt.pt", settings_of(args, tokens)
    model = make_model(args, meta["vocab_size"])
    optimizer, done = make_optimizer(model, args.lr, args.weight_decay), 0
    if args.resume:
        done = resume(path, model, optimizer, settings)["step"]
    run = parallel(torch.compile(model) if args.compile else model)
    precision, why = pick_precision(args.device)
    backward = backward_of(training_losses(run, model, args.kl_weight), precision, args)
    introduce(args, model, meta["source"], why)

    make_folder(args.out)
    log, pressed, begin = open_log(args.out / "log.csv", done), ctrl_c(), time.time()
    mark, marked = begin, done
    for step in range(done + 1, args.steps + 1):
        set_rate(optimizer, step, args)
        batches = step_batches(tokens, args.context, args, step)
        validate, val_loss = step % args.eval_interval == 0 or step == args.steps, None
        with one_line(FloatingPointError, hint=f"this is step {step}: try a lower --lr or a longer --warmup"):
            _, *losses = optimizer_step(run, optimizer, batches, backward, args.clip).tolist()
            seconds = (time.time() - mark) / (step - marked)
            if validate:
                val_loss = evaluate(model, val, args.batch_size, args.eval_windows, precision)
        if validate or step % args.log_interval == 0:
            report(log, args, step, losses, val_loss, seconds, optimizer.param_groups[0]["lr"])
            mark, marked = time.time(), step
        stop = any_rank(pressed, args.device)
        if validate or stop:
            save_checkpoint(path, model, tokenizer=meta["tokenizer"], data=args.data, step=step,
                            settings=settings, optimizer=optimizer.state_dict())
        if stop:
            leave(path, step, args.steps)
    print(f"final: val_loss {val_loss:.4f} val_ppl {math.exp(val_loss):.3f} train_loss {losses[0]:.4f} "
          f"attention_kl {losses[1]:.4f} steps {args.steps} seconds {time.time() - begin:.0f} "
          f"peak_gib {peak_memory(args.device):.2f}")


if __name__ == "__main__":
    main()
