"""
Train a language model from scratch, with SEA attention or one of its rivals, on one GPU or on the
CPU.

    python train.py                       the demo: prepares data/stdlib, writes out/sea-stdlib
    python train.py --attention dense     the same model with dense attention, in out/dense-stdlib
    python train.py --data shakespeare    after python data/shakespeare.py
    python train.py --resume              goes on from the checkpoint; the other flags as before
    torchrun --nproc-per-node=2 train.py  on two GPUs: twice the micro-batches in a step

The defaults are a preset for the device that is found; every flag given replaces one value of it.
Ctrl-C or a SIGTERM ends the step, saves and leaves. A mistake is one line and exit status 2.
"""
import argparse
import csv
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))      # python -P leaves it out
from data import common, engine
from data.common import Parser, fail, number, one_line
from model import ATTENTIONS, Config, Transformer

PRESETS = {
    "cuda": dict(n_layer=8, n_head=8, n_embd=512, context=2048, block_size=8, keys_per_query=48,
                 batch_size=8, steps=2000, lr=4e-3),
    "cpu": dict(n_layer=4, n_head=4, n_embd=128, context=128, block_size=4, keys_per_query=8,
                batch_size=12, steps=800, lr=1e-2),
}
WEIGHT_DECAY = 0.1        # of matrices; nothing else decays
CLIP = 1.0                # largest norm of the gradient
LOG_STEPS = 10            # steps between lines
VALIDATIONS = 4           # in a run
EVAL_WINDOWS = 400
COLUMNS = "step loss attention_kl val_loss lr ms tokens_per_s peak_gib".split()      # of log.csv


def parse_arguments():
    parser = Parser(__doc__)

    group = parser.add_argument_group("model")
    group.add_argument("--attention", default="sea", choices=ATTENTIONS, help="kind of attention")
    add_preset(group, PRESETS, "n_layer", "blocks")
    add_preset(group, PRESETS, "n_head", "heads of a block")
    add_preset(group, PRESETS, "n_embd", "width of the model")
    add_preset(group, PRESETS, "context", "T, tokens that the model looks at")
    add_preset(group, PRESETS, "block_size", "S, keys in a block of SEA")
    add_preset(group, PRESETS, "keys_per_query",
               "K, keys that a query of SEA chooses, beside the fixed blocks")

    group = parser.add_argument_group("training")
    group.add_argument("--data", default="stdlib", help="folder in data/, or its whole path")
    add_preset(group, PRESETS, "steps", "steps of the optimizers")
    add_preset(group, PRESETS, "batch_size", "sequences in a micro-batch")
    add_preset(group, PRESETS, "lr", "peak learning rate", float)
    group.add_argument("--kl-weight", type=number(float, 0), default=0.1,
                       help="of the estimate's KL, for paper")
    group.add_argument("--seed", type=number(int, 0), default=1337, help="of weights and batches")
    add_running(parser)

    args = complete(parser.parse_args(), PRESETS)
    args.out = Path(args.out or f"out/{args.attention}-{Path(args.data).name}")
    return args


def add_preset(group, presets, name, what, kind=int):
    """A flag whose default depends on the device."""
    shown = " / ".join(f"{presets[device][name]} {device}" for device in presets)
    least = 1 if kind is int else 0
    group.add_argument("--" + name.replace("_", "-"), type=number(kind, least),
                       default=argparse.SUPPRESS, help=f"{what} (preset: {shown})")


def add_running(parser):
    """The flags that distill.py has, too."""
    group = parser.add_argument_group("running")
    group.add_argument("--accumulate", type=number(int, 1, 10000), default=1,
                       help="micro-batches in a step, on each GPU")
    group.add_argument("--out", default="",
                       help="folder for ckpt.pt and log.csv, named after what it holds")
    group.add_argument("--resume", action="store_true",
                       help="go on from the ckpt.pt of the same flags")
    group.add_argument("--overwrite", action="store_true",
                       help="start again where there is a ckpt.pt")
    group.add_argument("--save-minutes", type=number(float, 0), default=10.,
                       help="between checkpoints")
    group.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"),
                       help="auto: a GPU if any")
    group.add_argument("--no-kernels", dest="kernels", action="store_false",
                       help="plain PyTorch on a GPU, for edits of sea.py: no Triton, no compiler")


def complete(args, presets):
    """Fill in the device, and its preset where flags were not given."""
    args.device = engine.pick_device(args.device)
    return argparse.Namespace(**{**presets[args.device], **vars(args)})


# --------------------------------------------------------------------------------------------------
# Optimizers

class Muon(torch.optim.Optimizer):
    """Momentum whose update, a matrix, is replaced by the nearest orthogonal one (Jordan et al.,
    2024).

    As torch.optim.Muon, but in float32 where bfloat16 is slow, and equal shapes at once: fewer,
    larger products. The step is as large as AdamW's would be, so that both take one learning rate.
    """

    def __init__(self, params, momentum=0.95):
        super().__init__(params, dict(momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                updates = []
                for p in params:
                    if p not in self.state:
                        self.state[p]["mean"] = torch.zeros_like(p)
                    mean = self.state[p]["mean"]
                    mean.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(mean, group["momentum"]))     # Nesterov's look ahead
                rate = 0.2 * max(shape) ** 0.5 * group["lr"]
                for p, update in zip(params, orthogonalize(torch.stack(updates))):
                    p.mul_(1 - group["lr"] * WEIGHT_DECAY).add_(update, alpha=-rate)


def orthogonalize(x):
    """Singular values of each matrix (N, a, b) to about 1, by five steps of Newton and Schulz."""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT).mT
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(torch.bfloat16 if x.is_cuda else x.dtype)
    for _ in range(5):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x.float()


def make_optimizers(model):
    """Muon for the blocks' matrices, AdamW for embeddings, norms, biases and what the attention
    adds."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        inside = name.startswith("layers.") and ".attention." not in name and p.dim() == 2
        (matrices if inside else others).append(p)
    fused = next(model.parameters()).is_cuda
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0., fused=fused)
    return [Muon(matrices), adamw]


def learning_rate(step, peak, steps):
    """Of step 1, 2 .. steps: linear to the peak over the first tenth, then a cosine to a tenth of
    it."""
    warmup = max(1, steps // 10)
    if step <= warmup:
        return peak * step / warmup
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# --------------------------------------------------------------------------------------------------
# Data, evaluation, log

def open_data(args):
    """Train and validation tokens and their meta data; prepares the embedded data set where it is
    missing."""
    with engine.first_rank_first(args.device):
        if args.data == "stdlib" and not (common.FOLDER / "stdlib" / "meta.json").exists():
            if subprocess.run([sys.executable, common.SCRIPTS / "stdlib.py"]).returncode:
                raise SystemExit(2)
    train, val, meta = common.load(args.data)
    shorter = min(len(train), len(val))
    if shorter <= args.context:
        fail(f"data/{args.data} has {len(train):,} tokens to train on and {len(val):,} to "
             f"validate; give a --context under {shorter}")
    return train, val, meta


@torch.no_grad()
def evaluate(model, data, batch_size, at_most, precision):
    """Mean loss, nats per token, over contiguous windows of a split, `at_most` of them evenly
    spread: the same ones for every model of this context."""
    context = model.config.context
    device = next(model.parameters()).device
    starts = torch.arange(0, len(data) - context, context)
    starts = starts[torch.linspace(0, len(starts) - 1, min(at_most, len(starts))).long()]
    training = model.training
    total = 0.
    model.eval()
    for few in starts.split(batch_size):
        idx, targets = common.windows(data, few, context, device)
        with precision:
            total += model(idx, targets).loss.item() * len(few)
    model.train(training)
    if not math.isfinite(total):
        raise FloatingPointError(f"the loss on held-out text is {total}")
    return total / len(starts)


def perplexity(loss):
    return math.exp(loss) if loss < 700 else math.inf        # more is no float


def open_log(path, done):
    """log.csv, with the rows up to step `done` of a run that goes on: those after it are made once
    more."""
    rows = path.read_text(errors="replace").splitlines() if done and path.is_file() else []
    rows = [row for row in rows if row.count(",") == len(COLUMNS) - 1]
    steps = [row.split(",")[0] for row in rows]
    kept = [row for row, step in zip(rows, steps) if step.isdecimal() and int(step) <= done]
    if engine.RANK == 0:
        common.write_whole(path, "\n".join([",".join(COLUMNS), *kept, ""]).encode())
    return csv.writer(open(os.devnull if engine.RANK else path, "a", newline="", buffering=1),
                      lineterminator="\n")


def report(log, args, step, loss, kl, val_loss, rate, seconds):
    """One line for people and one for log.csv; `seconds` are those of a step, without
    validation."""
    speed = args.batch_size * args.accumulate * engine.RANKS * args.context / seconds
    memory = engine.peak_memory(args.device)
    left = int((args.steps - step) * seconds)
    engine.say(f"step {step}/{args.steps}  loss {loss:.4f}",
               f" kl {kl:.4f}" if args.attention == "paper" else "",
               f" {1000 * seconds:.0f} ms  {speed:,.0f} tokens/s ",
               f"{left // 60}:{left % 60:02d} left",
               f" val_loss {val_loss:.4f}" if val_loss else "")
    log.writerow([step, loss, kl, val_loss, rate, 1000 * seconds, speed, memory])


# --------------------------------------------------------------------------------------------------
# The script

def make_model(args, vocab_size):
    settings = {name: getattr(args, name) for name in Config.__dataclass_fields__
                if hasattr(args, name)}
    with one_line(ValueError):
        config = Config(vocab_size=vocab_size, architecture="llama", **settings)
    engine.check_fit(config, args.batch_size, args.device)
    engine.check_budget(config)
    return Transformer(config).to(args.device)


def train(args, model, optimizers, tokens, val, meta, settings, done):
    """Steps done + 1 to args.steps, with what is printed and saved -> the last losses."""
    path = args.out / "ckpt.pt"
    log = open_log(args.out / "log.csv", done)
    run = engine.parallel(engine.compiled(model))
    precision, _ = engine.pick_precision(args.device)
    stop = engine.Stop()
    mark = saved = time.time()
    marked = done
    for step in range(done + 1, args.steps + 1):
        rate = learning_rate(step, args.lr, args.steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

        # Forward and backward of each micro-batch; gradients add up, and GPUs meet in the last one.
        means = 0.
        batches = engine.step_batches(tokens, args.context, args, step)
        for i, (idx, targets) in enumerate(batches):
            run.require_backward_grad_sync = i + 1 == len(batches)
            with precision:
                out = run(idx, targets)
            kl = out.loss.new_zeros(()) if out.kl is None else out.kl
            loss = out.loss + args.kl_weight * kl
            (loss / len(batches)).backward()
            means += torch.stack((out.loss, kl)).detach() / len(batches)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        engine.check_finite(norm, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        # Now and then a line, a validation, a checkpoint.
        validate = step % max(1, args.steps // VALIDATIONS) == 0 or step == args.steps
        if validate or step % LOG_STEPS == 0:
            losses = engine.mean_of_ranks(means).tolist()
            seconds = (time.time() - mark) / (step - marked)
            val_loss = None
            if validate:
                val_loss = evaluate(model, val, args.batch_size, EVAL_WINDOWS, precision)
            report(log, args, step, *losses, val_loss, rate, seconds)
            mark = time.time()
            marked = step
        stopped = engine.any_rank(stop, args.device)
        if stopped or step == args.steps or time.time() - saved > 60 * args.save_minutes:
            states = [optimizer.state_dict() for optimizer in optimizers]
            engine.save_checkpoint(path, model, tokenizer=meta["tokenizer"], data=args.data,
                                   step=step, settings=settings, optimizers=states)
            saved = time.time()
        if stopped:
            stop.leave(path, step, args.steps)
    return losses, val_loss


@engine.training_script
def main():
    args = parse_arguments()
    engine.join_ranks(args.device)
    engine.check_out(args)
    torch.manual_seed(args.seed)
    tokens, val, meta = open_data(args)
    model = make_model(args, meta["vocab_size"])
    optimizers = make_optimizers(model)

    lock = engine.own_folder(args)      # held until this process ends
    path = args.out / "ckpt.pt"
    settings = engine.settings_of(args, tokens)
    done = engine.resume(path, model, optimizers, settings)["step"] if args.resume else 0

    backend = engine.pick_backend(args.device, args.kernels)
    _, kind = engine.pick_precision(args.device)
    preset = [f"{name} {getattr(args, name)}" for name in PRESETS[args.device]]
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    engine.say(f"preset {args.device}:", *preset)
    engine.say(f"{millions:.2f} M parameters, {args.attention} attention, {backend}, {kind}; "
               f"data/{args.data}: {meta['source']}")

    begin = time.time()
    losses, val_loss = train(args, model, optimizers, tokens, val, meta, settings, done)
    engine.say(f"final: val_loss {val_loss:.4f} val_ppl {perplexity(val_loss):.3f} "
               f"train_loss {losses[0]:.4f} "
               + (f"attention_kl {losses[1]:.4f} " if args.attention == "paper" else "")
               + f"steps {args.steps} seconds {time.time() - begin:.0f} "
               f"peak_gib {engine.peak_memory(args.device):.2f}")


if __name__ == "__main__":
    main()
