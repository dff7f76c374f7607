"""
Train a language model from scratch, with SEA attention or one of its rivals, on one GPU or on the CPU.

    python train.py                             the demo: prepares data/stdlib, trains, writes out/ckpt.pt
    python train.py --attention dense           the same model with dense attention, in out-dense/
    python train.py --data shakespeare          after python data/shakespeare.py

The defaults are a preset for the device that is found; every flag given replaces one value of it.
"""
import argparse
import csv
import math
import os
import pickle
import subprocess
import sys
import time
import zipfile
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

import torch

import sea
from data.common import FOLDER, Parser, fail, load
from model import ATTENTIONS, OPT, OPTConfig

PRESETS = {
    "cuda": dict(n_layer=6, n_head=6, n_embd=384, context=2048, map_width=256, keys_per_query=64,
                 query_block=16, batch_size=16, steps=1500, warmup=100, eval_interval=250),
    "cpu": dict(n_layer=4, n_head=4, n_embd=256, context=256, map_width=64, keys_per_query=16,
                query_block=8, batch_size=12, steps=300, warmup=30, eval_interval=50),
}


def add_preset(group, presets, name, what):
    """A whole-number flag whose default depends on the device."""
    shown = " / ".join(f"{presets[device][name]} {device}" for device in presets)
    group.add_argument("--" + name.replace("_", "-"), type=int, default=argparse.SUPPRESS,
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
    add("keys_per_query", "selected past keys, the mean a query and head")
    add("query_block", "M, neighbouring queries that share cell bounds")
    group.add_argument("--num-features", type=int, default=64, help="F, width of phi")
    group.add_argument("--cell-keys", action=argparse.BooleanOptionalAction, default=True,
                       help="add q . mean(keys of the cell) to each score; the paper does not")
    group.add_argument("--kl-weight", type=float, default=0.1, help="weight of the attention KL in the loss")
    group = parser.add_argument_group("training")
    group.add_argument("--data", default="stdlib", help="folder in data/")
    add("steps", "steps of the optimizer")
    add("batch_size", "sequences in a micro-batch")
    group.add_argument("--accumulate", type=int, default=1, help="micro-batches in a step")
    group.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    add("warmup", "steps up to the peak, then a cosine to a tenth of it")
    group.add_argument("--weight-decay", type=float, default=0.1, help="of matrices; nothing else decays")
    group.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    group.add_argument("--seed", type=int, default=1337, help="of weights and batches")
    group = parser.add_argument_group("running")
    group.add_argument("--out", default=argparse.SUPPRESS,
                       help="folder for ckpt.pt and log.csv (default: out; out-ATTENTION if that is not sea)")
    group.add_argument("--device", default="auto", choices=("auto", *PRESETS), help="auto: a GPU if any")
    group.add_argument("--compile", action="store_true", help="torch.compile: a slow start, then faster")
    add("eval_interval", "steps between validations")
    group.add_argument("--eval-windows", type=int, default=200, help="windows of the split to validate on")
    group.add_argument("--log-interval", type=int, default=10, help="steps between lines")
    args = complete(parser.parse_args(), PRESETS)
    args.out = getattr(args, "out", "out" if args.attention == "sea" else f"out-{args.attention}")
    return args


def complete(args, presets):
    """Fill in the device and its preset where flags were not given; counts must be positive."""
    args.device = pick_device(args.device)
    for name, value in presets[args.device].items():
        setattr(args, name, getattr(args, name, value))
    for name in ("steps", "batch_size", "accumulate", "eval_interval", "eval_windows", "log_interval"):
        if getattr(args, name, 1) < 1:
            fail(f"--{name.replace('_', '-')} must be 1 or more")
    return args


def pick_device(wanted):
    """cpu or cuda: the wanted one if it is there; for auto a GPU, if there is one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        fail("--device cuda, but torch finds no GPU; leave the flag out to run on the CPU")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def pick_precision(device):
    """The autocast context of the matrix products, and what to tell about it."""
    if device == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        return torch.autocast("cuda", torch.bfloat16), "bfloat16, which this GPU's tensor cores are made for"
    return nullcontext(), "float32, on a CPU" if device == "cpu" else "float32: this GPU has no fast bfloat16"


def windows(data, starts, context, device):
    """Inputs and targets (N, context) int64 from the given starts: the targets are one token on."""
    rows = torch.stack([torch.from_numpy(data[i:i + context + 1].astype("int64")) for i in starts.tolist()])
    return rows[:, :-1].to(device), rows[:, 1:].to(device)


def random_batch(data, context, batch_size, seed, device):
    """Windows from random starts; equal seeds give equal batches."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - context, (batch_size,), generator=generator)
    return windows(data, starts, context, device)


@torch.no_grad()
def evaluate(model, data, batch_size, at_most, precision):
    """Mean loss, nats a token, over contiguous windows of a split, `at_most` of them evenly spread: the same
    ones for every model of this context."""
    context, device = model.config.context, next(model.parameters()).device
    starts = torch.arange(0, len(data) - context, context)
    starts = starts[torch.linspace(0, len(starts) - 1, min(at_most, len(starts))).long()]
    training, total = model.training, 0.
    model.eval()
    for few in starts.split(batch_size):
        with precision:
            total += model(*windows(data, few, context, device))[1].item() * len(few)
    model.train(training)
    return total / len(starts)


def make_optimizer(model, lr, weight_decay):
    """AdamW; matrices decay, while biases, norms and the weights of scores do not."""
    decays = lambda name, p: p.dim() >= 2 and "score_weights" not in name
    groups = [dict(params=[p for name, p in model.named_parameters() if decays(name, p) == yes],
                   weight_decay=weight_decay * yes) for yes in (True, False)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=next(model.parameters()).is_cuda)


def learning_rate(step, peak, warmup, steps):
    """Linear warm-up, then a cosine down to a tenth of the peak at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def peak_memory(device):
    """GiB: of the GPU's allocator, or of this process where the system tells."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    if sys.platform == "win32":
        return math.nan
    import resource                        # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def save_checkpoint(path, model, **rest):
    """Write a checkpoint beside its place, then move it there, so that no half a file is ever seen."""
    part = path.with_name(path.name + ".part")
    torch.save(dict(model=model.state_dict(), config=asdict(model.config), **rest), part)
    os.replace(part, path)


def load_checkpoint(path, device):
    """A file of save_checkpoint -> the model on the device, and the rest of the file."""
    if not Path(path).is_file():
        fail(f"there is no checkpoint {path}; python train.py makes out/ckpt.pt")
    try:
        if not zipfile.is_zipfile(path):
            raise RuntimeError("cut off, or another kind of file")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = OPT(OPTConfig(**saved.pop("config")))
        model.load_state_dict(saved.pop("model"))
    except (RuntimeError, pickle.UnpicklingError, KeyError, TypeError, AttributeError, ValueError) as error:
        fail(f"{path} is no checkpoint of this program ({str(error).splitlines()[0]}); train again")
    return model.to(device), saved


def open_data(args):
    """Train and validation tokens and their meta data; prepares the embedded data set where it is missing."""
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
    given = {name: getattr(args, name) for name in names}
    try:
        return OPT(OPTConfig(vocab_size=vocab_size, **given)).to(args.device)
    except ValueError as error:
        fail(error)


def train_step(model, optimizer, batches, kl_weight, clip, precision):
    """One step on the mean of the batches' losses -> the text's loss and the attention KL, (2,)."""
    losses = []
    for idx, targets in batches:
        with precision:
            _, loss = model(idx, targets)
        kl = getattr(model, "_orig_mod", model).attention_kl()
        ((loss + kl_weight * kl) / len(batches)).backward()
        losses.append(torch.stack([loss.detach(), kl.detach().to(loss.device)]))
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses).mean(0)


def report(log, args, step, losses, val_loss, seconds, rate):
    """One line for people and one for log.csv; `seconds` are those of a step, without validation."""
    speed, left = args.batch_size * args.accumulate * args.context / seconds, (args.steps - step) * seconds
    memory = peak_memory(args.device)
    print(f"step {step}/{args.steps}  loss {losses[0]:.4f}  kl {losses[1]:.4f}  {1000 * seconds:.0f} ms  "
          f"{speed:,.0f} tokens/s  {memory:.2f} GiB  {left // 60:.0f}:{left % 60:02.0f} left"
          + (f"  val_loss {val_loss:.4f}" if val_loss else ""), flush=True)
    log.writerow([step, *losses, val_loss, rate, 1000 * seconds, speed, memory])


def main():
    args = parse_arguments()
    torch.manual_seed(args.seed)
    tokens, val, meta = open_data(args)
    model = make_model(args, meta["vocab_size"])
    run = torch.compile(model) if args.compile else model
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    precision, why = pick_precision(args.device)
    print(f"preset {args.device}:", *(f"{name} {getattr(args, name)}" for name in PRESETS[args.device]))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {args.attention} attention "
          f"({sea.implementation(args.device).__name__}.py), {why}; data/{args.data}: {meta['source']}")

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    log = csv.writer(open(out / "log.csv", "w", newline="", buffering=1))
    log.writerow("step loss attention_kl val_loss lr ms tokens_per_s peak_gib".split())
    begin, mark, marked = time.time(), time.time(), 0
    for step in range(1, args.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, args.lr, args.warmup, args.steps)
        seeds = [args.seed * 10 ** 9 + step * args.accumulate + i for i in range(args.accumulate)]
        batches = [random_batch(tokens, args.context, args.batch_size, seed, args.device) for seed in seeds]
        losses = train_step(run, optimizer, batches, args.kl_weight, args.clip, precision)
        validate = step % args.eval_interval == 0 or step == args.steps
        if validate or step % args.log_interval == 0:
            losses, val_loss = losses.tolist(), None               # waits for the GPU
            seconds = (time.time() - mark) / (step - marked)
            if validate:
                val_loss = evaluate(model, val, args.batch_size, args.eval_windows, precision)
                save_checkpoint(out / "ckpt.pt", model, tokenizer=meta["tokenizer"], data=args.data)
            report(log, args, step, losses, val_loss, seconds, optimizer.param_groups[0]["lr"])
            mark, marked = time.time(), step
    print(f"final: val_loss {val_loss:.4f} val_ppl {math.exp(val_loss):.3f} train_loss {losses[0]:.4f} "
          f"attention_kl {losses[1]:.4f} steps {args.steps} seconds {time.time() - begin:.0f} "
          f"peak_gib {peak_memory(args.device):.2f}")


if __name__ == "__main__":
    main()
