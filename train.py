"""
Train a language model from scratch, with SEA attention or one of its rivals, on a GPU or a CPU.

    python train.py                       the demo: prepares data/stdlib, writes out/sea-stdlib
    python train.py --attention dense     the same model with dense attention, in out/dense-stdlib
    python train.py --data shakespeare    after python data/shakespeare.py
    python train.py --resume              goes on from the checkpoint; the other flags as before
    torchrun --nproc-per-node=2 train.py  on two GPUs: twice the micro-batches in a step

The defaults are a preset for the device that is found; every flag given replaces one value of it.
Ctrl-C or a SIGTERM ends the step, saves and leaves. A mistake is one line and exit status 2.
"""
import math
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
                 batch_size=8, steps=2000, lr=2e-3),
    "cpu": dict(n_layer=4, n_head=4, n_embd=128, context=128, block_size=4, keys_per_query=8,
                batch_size=12, steps=1400, lr=2.5e-3)}
LOSSES = dict(            # what is lowered, and how much each counts
    loss=1.0,             # of the next token
    kl=0.1)               # KL of paper's estimate and the model's own attention
WEIGHT_DECAY = 0.1        # of the blocks' matrices; nothing else decays
CLIP = 1.0                # largest norm of the gradient
LOG_STEPS = 10            # steps between lines
VALIDATIONS = 4           # in a run
EVAL_WINDOWS = 400


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument_group("size").add_argument
    add("--n-layer", type=number(int, 1), help="blocks")
    add("--n-head", type=number(int, 1), help="heads of a block")
    add("--n-embd", type=number(int, 1), help="width of the model")
    add_flags(parser)
    parser.set_defaults(attention="sea", data="stdlib")

    args = engine.parse(parser, PRESETS)
    args.out = Path(args.out or f"out/{args.attention}-{Path(args.data).name}")
    return args


def add_flags(parser):
    """The flags that distill.py has, too."""
    add = parser.add_argument_group("attention").add_argument
    add("--attention", choices=ATTENTIONS, help="kind of attention")
    add("--context", type=number(int, 1), help="T, tokens that the model looks at")
    add("--block-size", type=number(int, 1), help="S, keys in a block of SEA")
    add("--keys-per-query", type=number(int, 1), help="K, keys to choose, beside fixed blocks")

    add = parser.add_argument_group("training").add_argument
    add("--data", help="folder in data/, or its whole path")
    add("--steps", type=number(int, 1), help="steps of the optimizer")
    add("--batch-size", type=number(int, 1), help="sequences in a micro-batch")
    add("--accumulate", type=number(int, 1, 10000), default=1, help="micro-batches in a step")
    add("--lr", type=number(float, 0), help="peak learning rate")
    add("--seed", type=number(int, 0), default=1337, help="of new weights and of batches")

    add = parser.add_argument_group("running").add_argument
    add("--out", default="", help="folder for ckpt.pt, named after what it holds")
    add("--resume", action="store_true", help="go on from the ckpt.pt of the same flags")
    add("--overwrite", action="store_true", help="start again where there is a ckpt.pt")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto: a GPU if any")
    add("--no-kernels", dest="kernels", action="store_false",
        help="plain PyTorch on a GPU, unrecorded, for edits of sea.py")


def make_optimizer(model):
    """AdamW; the blocks' matrices decay. times: of the learning rate, as distill.py has others."""
    groups = [dict(params=[], weight_decay=decay, times=1) for decay in (WEIGHT_DECAY, 0.)]
    for name, p in model.named_parameters():
        matrix = name.startswith("layers.") and p.dim() == 2
        groups[0 if matrix else 1]["params"].append(p)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def learning_rate(step, peak, steps):
    """Linear to the peak over the first tenth of steps 1, 2 .., then a cosine to a tenth of it."""
    warmup = max(1, steps // 10)
    if step <= warmup:
        return peak * step / warmup
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def open_data(args, split="val"):
    """Tokens to train on, those to evaluate on, and meta data."""
    with engine.first_rank_first(args.device):
        if args.data == "stdlib":
            common.prepare_stdlib()
    tokens, held_out, meta = common.load(args.data, split)
    shorter = min(len(tokens), len(held_out))
    if shorter <= args.context:
        fail(f"data/{args.data} has {len(tokens):,} tokens to train on and {len(held_out):,} to "
             f"evaluate; give a --context under {shorter}")
    return tokens, held_out, meta


@torch.no_grad()
def evaluate(model, data, batch_size, at_most, precision):
    """Mean loss, nats per token, of `at_most` windows evenly spread: the same ones each time."""
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


def report(args, step, losses, seconds):
    """A line on the last step. seconds: of each step since the last. Losses of 0 are left out."""
    mean = sum(seconds) / len(seconds)
    left = int((args.steps - step) * mean)
    losses = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if loss)
    engine.say(f"step {step}/{args.steps}  {losses}  {1000 * mean:.0f} ms  "
               f"{left // 60}:{left % 60:02d} left")


def lm_losses(model, idx, targets):
    """A forward pass on idx, targets (B, T) -> the losses of LOSSES, in that order."""
    out = model(idx, targets)
    kl = out.loss.new_zeros(()) if out.kl is None else out.kl
    return torch.stack((out.loss, kl))


def train(model, optimizer, losses_of, shares, tokens, args, precision, steps, val=None):
    """The loop of train.py and distill.py -> the last losses by name.

    losses_of(model, idx, targets) gives losses (n,), shares their names and how much each counts.
    steps: numbers of the steps to do. val: tokens to evaluate on, VALIDATIONS times.
    """
    factors = torch.tensor(list(shares.values()), device=args.device)

    def forward_backward(idx, targets):
        with precision:
            losses = losses_of(model, idx, targets) / args.accumulate
        (losses @ factors).backward()                   # gradients add up
        return losses.detach()

    micro_step = engine.Recorded(forward_backward, model)
    seconds = []
    for step in steps:
        begin = time.time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.lr, args.steps) * group["times"]
        means = 0.
        for batch in engine.step_batches(tokens, model.config.context, args, step):
            means += micro_step(*batch)
        engine.average_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        engine.check_finite(norm, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)          # engine.Recorded adds to them in place
        seconds.append(time.time() - begin)

        validate = val is not None and step * VALIDATIONS % args.steps < VALIDATIONS
        if validate or step % LOG_STEPS == 0 or step == args.steps:
            losses = dict(zip(shares, engine.mean_of_ranks(means).tolist()))
            if validate:
                losses["val_loss"] = evaluate(model, val, args.batch_size, EVAL_WINDOWS, precision)
            report(args, step, losses, seconds)
            seconds.clear()
    return losses


@engine.training_script
def main():
    args = parse_arguments()
    engine.check_out(args)
    backend, precision, kind = engine.start(args)
    tokens, val, meta = open_data(args)

    settings = {name: value for name, value in vars(args).items()
                if name in Config.__dataclass_fields__}
    with one_line(ValueError):
        config = Config(vocab_size=meta["vocab_size"], architecture="llama", **settings)
    engine.check_fit(config, args.batch_size, args.device)
    engine.check_budget(config)
    model = Transformer(config).to(args.device)
    optimizer = make_optimizer(model)
    keeper = engine.Keeper(args, model, optimizer, tokens, meta["tokenizer"])

    preset = [f"{name} {getattr(args, name)}" for name in PRESETS[args.device]]
    engine.say(f"preset {args.device}:", *preset)
    engine.say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
               f"{args.attention} attention, {backend} backend, {kind}; "
               f"data/{args.data}: {meta['source']}")

    begin = time.time()
    last = train(model, optimizer, lm_losses, LOSSES, tokens, args, precision, keeper.steps(), val)
    kl = f"attention_kl {last['kl']:.4f} " if last["kl"] else ""
    engine.say(f"final: val_loss {last['val_loss']:.4f} val_ppl "
               f"{perplexity(last['val_loss']):.3f} train_loss {last['loss']:.4f} {kl}"
               f"steps {args.steps} seconds {time.time() - begin:.0f} "
               f"peak_gib {engine.peak_memory(args.device):.2f}")


if __name__ == "__main__":
    main()
