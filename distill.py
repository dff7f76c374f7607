"""
Turn a dense model into one with sparse attention: the student keeps the teacher's weights, its
attention is replaced, and it learns to match what the teacher computes.

    python train.py --attention dense               a small teacher, out/dense-stdlib/ckpt.pt
    python distill.py                               its SEA student, out/dense-stdlib-sea
    python distill.py --attention window            a rival, also paper, performer, dense
    python distill.py --eval-only                   the student that has seen nothing: no training
    python data/smollm2.py && python data/wikipedia.py && python distill.py --teacher data/smollm2
    python distill.py --teacher facebook/opt-125m   published weights, on data/wikitext2

--resume, torchrun, Ctrl-C and mistakes are as train.py says.
"""
import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))      # python -P leaves it out
import sea
from data import common, engine
from data.common import Parser, fail, number, one_line
from model import ATTENTIONS
from train import (CLIP, LOG_STEPS, add_preset, add_running, complete, evaluate, learning_rate,
                   perplexity)

PRESETS = {       # of teachers that train.py made, and of published ones
    "checkpoint": {"cuda": dict(steps=600, batch_size=8, lr=3e-4, context=0, eval_windows=400),
                   "cpu": dict(steps=150, batch_size=16, lr=3e-4, context=0, eval_windows=400)},
    "published": {"cuda": dict(steps=300, batch_size=4, lr=3e-5, context=2048, eval_windows=100),
                  "cpu": dict(steps=30, batch_size=1, lr=3e-5, context=512, eval_windows=12)}}
LOSSES = dict(logits="KL of the next token", hidden="distance of the hidden states",
              output="distance of the attentions' outputs", text="the text's own loss",
              estimate="KL of paper's estimate and the teacher's attention")
WEIGHTS = 1.0, 1.0, 1.0, 0.1, 0.1
WEIGHT_DECAY = 0.01
NEW_RATE = 10             # times --lr: of parameters that the teacher does not have
MOST_ROWS = 2048          # of a text, for what takes a T x T picture


def parse_arguments():
    parser = Parser(__doc__)
    own = PRESETS["checkpoint"]

    group = parser.add_argument_group("models")
    group.add_argument("--teacher", default="out/dense-stdlib/ckpt.pt",
                       help="a checkpoint, a folder in the hub's format, or a name there")
    group.add_argument("--attention", choices=ATTENTIONS, help="the student's; None: sea")
    group.add_argument("--context", type=number(int, 1), default=argparse.SUPPRESS,
                       help="T, tokens that both look at (preset: the checkpoint's; of published "
                            "weights 2048 cuda / 512 cpu)")
    group.add_argument("--block-size", type=number(int, 1),
                       help="S, keys in a block; None: the teacher's")
    group.add_argument("--keys-per-query", type=number(int, 1),
                       help="K, keys that a query chooses; None: the teacher's")

    group = parser.add_argument_group("training")
    group.add_argument("--weights", type=number(float, 0), nargs=len(LOSSES), default=WEIGHTS,
                       metavar=tuple(name.upper() for name in LOSSES),
                       help="; ".join(f"{name}: {what}" for name, what in LOSSES.items()))
    group.add_argument("--data",
                       help="folder in data/; None: the teacher's, wikitext2 or wikipedia")
    add_preset(group, own, "steps", "steps of the optimizer")
    add_preset(group, own, "batch_size", "sequences in a micro-batch")
    add_preset(group, own, "lr", "peak learning rate; 3e-5 for published weights", float)
    group.add_argument("--seed", type=number(int, 0), default=1337,
                       help="of new weights and of batches")

    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval-only", nargs="?", const="val", choices=("val", "test"),
                       help="train nothing: the teacher's weights under --attention, on that split")
    add_preset(group, own, "eval_windows", "windows to evaluate on")
    add_running(parser)

    args = parser.parse_args()
    args = complete(args, PRESETS["checkpoint" if args.teacher.endswith(".pt") else "published"])
    teacher = Path(args.teacher)
    name = teacher.absolute().parent.name if args.teacher.endswith(".pt") else teacher.name
    args.out = Path(args.out or f"out/{name}-{args.attention or 'sea'}")
    return args


# --------------------------------------------------------------------------------------------------
# How far apart two models are

def distillation_losses(student, teacher, idx, targets):
    """One forward of both on idx, targets (B, T) -> the losses of LOSSES, in that order."""
    with torch.no_grad():
        wanted = teacher(idx, trace=True)
    queries_keys = [(layer.q, layer.k) for layer in wanted.trace]
    made = student(idx, targets, teacher=queries_keys, trace=True)

    log_p = wanted.logits.flatten(0, 1).float().log_softmax(-1)                  # (B T, V)
    log_q = made.logits.flatten(0, 1).float().log_softmax(-1)
    logits = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    pairs = list(zip(made.trace, wanted.trace))
    hidden = sum(distance(ours.hidden, theirs.hidden) for ours, theirs in pairs) / len(pairs)
    output = sum(distance(ours.attended, theirs.attended) for ours, theirs in pairs) / len(pairs)
    estimate = made.loss.new_zeros(()) if made.kl is None else made.kl
    return torch.stack((logits, hidden, output, made.loss, estimate))


def distance(ours, theirs):
    """Squared distance, as a share of their square: some layers' numbers are thousands of times
    others'."""
    theirs = theirs.float()
    return F.mse_loss(ours.float(), theirs) / theirs.square().mean()


@torch.no_grad()
def keys_and_mass(model, idx):
    """Keys that a query attends to, and their share of the dense attention's mass: means over
    layers, heads and queries of idx (1, T). None, None of attentions that choose no keys by
    themselves."""
    config = model.config
    if config.attention not in ("sea", "window"):
        return None, None
    keys = mass = 0.
    for block, layer in zip(model.layers, model(idx, trace=True).trace):
        T = layer.q.shape[2]
        k = layer.k.repeat_interleave(config.n_head // config.n_kv_head, 1)      # (B, H, T, D)
        if config.attention == "sea":
            mask = sea.estimated_attention(layer.q, k, config.block_size, config.keys_per_query,
                                           config.coarse)[1]                     # (B, H, T, T)
        else:
            position = torch.arange(T, device=idx.device)
            mask = block.self_attn.attention.mask(position[:, None], position)
        future = torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1)
        scores = (layer.q @ k.mT).float() * config.head_dim ** -0.5
        dense = scores.masked_fill(future, -torch.inf).softmax(-1)
        keys += mask.sum(-1).float().mean().item() / config.n_layer
        mass += (dense * mask).sum(-1).mean().item() / config.n_layer
    return keys, mass


def describe(name, model, tokens, args, precision):
    """Print a model's loss on held-out text and, of the first window, its keys and their mass;
    return all."""
    with one_line(FloatingPointError, hint=f"the {name} is spoilt"):
        loss = evaluate(model, tokens, args.batch_size, args.eval_windows, precision)
    idx = torch.from_numpy(tokens[:min(model.config.context, MOST_ROWS)].astype("int64"))[None]
    with precision:
        keys, mass = keys_and_mass(model.eval(), idx.to(args.device))
    engine.say(f"{name}: loss {loss:.4f} ppl {perplexity(loss):.3f}"
               + (f" keys_per_query {keys:.1f} mass_kept {mass:.3f}" if keys else ""))
    return loss, keys, mass


# --------------------------------------------------------------------------------------------------
# Training

def make_optimizer(student):
    """AdamW. Matrices decay; what the teacher does not have learns at NEW_RATE times the rate."""
    groups = {}
    for name, p in student.named_parameters():
        groups.setdefault((p.dim() >= 2, ".attention." in name), []).append(p)
    groups = [dict(params=params, weight_decay=WEIGHT_DECAY * decays, times=NEW_RATE if new else 1)
              for (decays, new), params in groups.items()]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=next(student.parameters()).is_cuda)


def distill(student, teacher, tokens, args, precision, optimizer, done=0, save=None):
    """Train the student from step `done` to args.steps -> the last losses.

    save(step, None) is called after the last step and every args.save_minutes, save(step, stop)
    after Ctrl-C.
    """
    run = engine.parallel(engine.compiled(student.train()))
    teach = engine.compiled(teacher.eval())
    weights = torch.tensor(args.weights, device=args.device)
    stop = engine.Stop()
    mark = saved = time.time()
    marked = done
    for step in range(done + 1, args.steps + 1):
        rate = learning_rate(step, args.lr, args.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["times"]

        # Forward and backward of each micro-batch; gradients add up, and GPUs meet in the last one.
        means = 0.
        batches = engine.step_batches(tokens, student.config.context, args, step)
        for i, batch in enumerate(batches):
            run.require_backward_grad_sync = i + 1 == len(batches)
            with precision:
                losses = distillation_losses(run, teach, *batch)
            (losses @ weights / len(batches)).backward()
            means += losses.detach() / len(batches)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        engine.check_finite(norm, step)
        optimizer.step()
        optimizer.zero_grad()

        if step % LOG_STEPS == 0 or step == args.steps:
            means = dict(zip(LOSSES, engine.mean_of_ranks(means).tolist()))
            seconds = (time.time() - mark) / (step - marked)
            left = int((args.steps - step) * seconds)
            losses = [f" {name} {means[name]:.4f}" for name in shown(student)]
            engine.say(f"step {step}/{args.steps}", *losses,
                       f" {1000 * seconds:.0f} ms  {left // 60}:{left % 60:02d} left")
            mark = time.time()
            marked = step
        stopped = engine.any_rank(stop, args.device)
        if save and (stopped or step == args.steps or time.time() - saved > 60 * args.save_minutes):
            save(step, stop if stopped else None)
            saved = time.time()
    return means


def shown(student):
    """The losses that are worth a word: only paper has an estimate to learn."""
    return [name for name in LOSSES if name != "estimate" or student.config.attention == "paper"]


# --------------------------------------------------------------------------------------------------
# The script

def load_teacher(args):
    """The teacher, the name of its tokenizer; tokens to train on and to evaluate on, which must be
    its."""
    if args.teacher == "out/dense-stdlib/ckpt.pt" and not Path(args.teacher).exists():
        fail("there is no teacher yet; make one: python train.py --attention dense")
    teacher, tokenizer, data = engine.load_model(args.teacher, args.device)
    args.context = args.context or teacher.config.context
    args.data = args.data or data
    train, held_out, meta = common.load(args.data)
    if args.eval_only == "test":
        held_out, _ = common.load(args.data, "test")
    if meta["tokenizer"] != tokenizer or meta["vocab_size"] > teacher.config.vocab_size:
        fail(f"data/{args.data} is written in {meta['tokenizer']} tokens and the teacher reads "
             f"{tokenizer}; prepare it with --tokenizer {tokenizer}, or take another --data")
    if min(len(train), len(held_out)) <= args.context:
        fail(f"data/{args.data} is shorter than the context of {args.context}; take more text")
    if args.context != teacher.config.context:
        teacher.set_context(args.context)
    return teacher, tokenizer, train, held_out


def make_student(teacher, args):
    """The teacher's weights under the attention and the settings of the flags."""
    if teacher.config.attention != "dense" and not args.eval_only:
        fail(f"{args.teacher} has {teacher.config.attention} attention; a teacher must be dense")
    # What is only evaluated keeps its attention, if it is none that a student would replace.
    dense = teacher.config.attention == "dense"
    args.attention = args.attention or ("sea" if dense else teacher.config.attention)
    settings = {name: getattr(args, name) for name in ("block_size", "keys_per_query")
                if getattr(args, name)}
    with one_line(ValueError):
        student = teacher.with_attention(args.attention, **settings)
    engine.check_fit(student.config, args.batch_size, args.device)
    engine.check_budget(student.config)
    args.block_size = student.config.block_size         # given or not, they are the run's settings
    args.keys_per_query = student.config.keys_per_query
    return student


def train_student(student, teacher, tokenizer, tokens, held_out, args, precision):
    """Measure, train, save and measure again, in args.out."""
    lock = engine.own_folder(args)      # held until this process ends
    path = args.out / "ckpt.pt"
    optimizer = make_optimizer(student)
    settings = engine.settings_of(args, tokens)
    settings["teacher"] = engine.fingerprint(teacher.embed_tokens.weight)
    done = 0
    if args.resume:
        saved = engine.resume(path, student, [optimizer], settings)
        done = saved["step"]
        start, before = saved["before"]
    else:
        engine.keep_tokenizer(tokenizer, args.teacher, args.out)
        start, *_ = describe("teacher", teacher, held_out, args, precision)
        name = f"{args.attention} student before"
        before, *_ = describe(name, student, held_out, args, precision)

    def save(step, stop):
        engine.save_checkpoint(path, student, tokenizer=tokenizer, data=args.data, step=step,
                               settings=settings, before=(start, before),
                               optimizers=[optimizer.state_dict()])
        if stop is not None:
            stop.leave(path, step, args.steps)

    begin = time.time()
    losses = distill(student, teacher, tokens, args, precision, optimizer, done, save)
    seconds = time.time() - begin
    name = f"{args.attention} student after"
    loss, keys, mass = describe(name, student, held_out, args, precision)
    engine.say(f"final: val_loss {loss:.4f} val_ppl {perplexity(loss):.3f} "
               f"ppl_before {perplexity(before):.3f} teacher_ppl {perplexity(start):.3f} "
               + (f"keys_per_query {keys:.1f} mass_kept {mass:.3f} " if keys else "")
               + (f"attention_kl {losses['estimate']:.4f} " if args.attention == "paper" else "")
               + f"steps {args.steps} seconds {seconds:.0f} "
               f"peak_gib {engine.peak_memory(args.device):.2f}")


@engine.training_script
def main():
    args = parse_arguments()
    engine.join_ranks(args.device)
    if not args.eval_only:
        engine.check_out(args)
    torch.manual_seed(args.seed)
    backend = engine.pick_backend(args.device, args.kernels)
    precision, kind = engine.pick_precision(args.device)
    teacher, tokenizer, tokens, held_out = load_teacher(args)
    student = make_student(teacher, args)
    engine.say(f"teacher {args.teacher} ({teacher.config.attention}), data/{args.data}, "
               f"T {args.context}, {backend}, {kind}")
    if args.eval_only:
        loss, *_ = describe(args.attention, student, held_out, args, precision)
        engine.say(f"final: {args.eval_only}_loss {loss:.4f} "
                   f"{args.eval_only}_ppl {perplexity(loss):.3f}")
        return
    train_student(student, teacher, tokenizer, tokens, held_out, args, precision)


if __name__ == "__main__":
    main()
