"""
A fair chance for estimates that learn, the paper's and a gate that begins as SEA's score: each alone is
trained, for as long as is given, to match the attention of a frozen dense teacher; beside them stand SEA's
estimate, which nothing trains, the window and the true mass.

    python train.py --attention dense              the teacher, out/dense-stdlib/ckpt.pt
    python tests/chance.py --minutes 5             adds rows to chance.csv
    python tests/chance.py --only gate             trains the gate alone
    python tests/chance.py --teacher data/smollm2 --minutes 10

Each layer's estimator sees its teacher's own q, k and v: one forward of the teacher serves all, and no layer
waits for another. Its loss is the KL from the teacher's mass in each block. (Officially: 10,000 steps of 32
windows, 0.1 KL + 1 MSE of the estimate, 1 MSE of the attention's output, and the model's losses.)
All have equally many keys a query; kl, keys and mass are those of one held-out window in the teacher.
"""
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import ablate  # noqa: E402
import sea  # noqa: E402
import train  # noqa: E402
from data import engine  # noqa: E402
from data.common import Parser, any_output, number, one_line  # noqa: E402
from model import ATTENTIONS, Attention  # noqa: E402

COLUMNS = ("teacher estimate context block_size keys_per_query lr step windows seconds kl keys mass "
           "ppl").split()
SHOWN = "kl", "keys", "mass", "ppl"
LEARNED = "paper", "gate"
LOOKS = 20           # evaluations on the way
WARMUP = 20          # steps until the learning rate is at its peak


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    ablate.add_flags(parser)
    add("--setting", type=ablate.setting, metavar="S:K", help="block size, keys a query; else the teacher's")
    add("--minutes", type=number(float, 0), default=5., help="of training each, without evaluations")
    add("--only", nargs="+", choices=LEARNED, default=LEARNED, help="estimates to train")
    parser.set_defaults(lr=1e-3, eval_windows=12, csv="chance.csv")
    return ablate.completed(parser.parse_args())


# --------------------------------------------------------------------------------------------------
# A gate that learns

class Gate(Attention):
    """SEA in one look, whose score is learned as SeerAttention's gate is (arXiv 2410.13276).

    Each query head has a map of a query's features and one of a block's summaries; the score is their product
    (there queries are pooled, too). It begins as SEA's own, in which smallest and largest keys do not count.
    """

    def __init__(self, config):
        super().__init__(config)
        same = torch.eye(2 * config.head_dim).repeat(config.n_head, 1, 1)        # (H, 2D, 2D)
        self.of_query = nn.Parameter(same)
        self.of_block = nn.Parameter(torch.cat((same, torch.zeros_like(same)), 1))      # (H, 4D, 2D)

    def moments(self, k):
        """What stands in place of sea.moments: k (B, Hkv, T, D) -> (B, H, W, 2D)."""
        S = self.config.block_size
        summaries = torch.cat((sea.moments(k, S), ablate.smallest_and_largest(k, S)), -1)
        summaries = summaries.repeat_interleave(self.config.n_head // k.shape[1], 1)    # (B, H, W, 4D)
        with torch.autocast(k.device.type, enabled=False):          # small differences decide
            # The map of queries, too: (q A) . m = q . (m A'), and there are fewer blocks than queries.
            return summaries @ self.of_block @ self.of_query.mT

    def forward(self, q, k, v, teacher=None):
        S = self.config.block_size
        n, _ = sea.budgets(S, self.config.keys_per_query)
        q = q * q.shape[3] ** -0.5
        moments = self.moments(k)
        out = []
        for start in range(0, q.shape[2], sea.ROWS):
            rows = q[:, :, start:start + sea.ROWS]                               # (B, H, r, D)
            end = start + rows.shape[2]
            scores = sea.block_scores(rows, moments[:, :, :end // S], S, start)  # (B, H, r, W)
            chosen = sea.select(scores, S, n, start)
            out.append(sea.attend(rows, k[:, :, :end], v[:, :, :end], chosen, S))
        return torch.cat(out, 2), None


# --------------------------------------------------------------------------------------------------
# Distances from the teacher's attention

def in_float32(layers):
    """A trace with all digits from here on; the teacher's products were the device's."""
    return [layer._replace(q=layer.q.float(), k=layer.k.float(), v=layer.v.float()) for layer in layers]


def block_scores(name, attention, layer):
    """The estimate of sea, gate or paper for a traced layer: (B, H, T, W)."""
    S = attention.config.block_size
    q = layer.q * layer.q.shape[3] ** -0.5                                       # (B, H, T, D)
    if name != "paper":
        moments = attention.moments(layer.k) if name == "gate" else sea.moments(layer.k, S)
        return sea.block_scores(q, moments, S)
    group = q.shape[1] // layer.k.shape[1]
    k = layer.k.repeat_interleave(group, 1)
    v = layer.v.repeat_interleave(group, 1)
    picture, _ = attention.estimator.draw(q, k, v)
    return attention.estimator.read(picture, 0, S)


def distance(name, attention, layer, precision):
    """KL of the estimate from the layer's attention, a mean over heads and queries."""
    with precision:
        scores = block_scores(name, attention, layer)
    with torch.no_grad():
        q = layer.q * layer.q.shape[3] ** -0.5
        target = sea.block_mass(q, layer.k, attention.config.block_size)         # T x T, of one layer
    return sea.block_kl(target, scores).mean()


@torch.no_grad()
def look(name, model, layers):
    """How far an estimate is from the attention of a trace, and what share of it the keys chosen hold."""
    row = dict(estimate=name)
    with ablate.as_variant(name):
        if name in ("sea", *LEARNED):
            pairs = zip(attentions_of(model), layers)
            row["kl"] = sum(distance(name, *pair, nullcontext()).item() for pair in pairs) / len(layers)
        row["keys"], row["mass"] = ablate.keys_and_mass(model.eval(), layers).mean((0, 2)).tolist()
    return row


def attentions_of(model):
    return [block.self_attn.attention for block in model.layers]


# --------------------------------------------------------------------------------------------------
# Training

def learn(name, student, teacher, tokens, args, precision):
    """Train an estimate for args.minutes; now and then, and at the end, the step and its seconds."""
    attentions = attentions_of(student.train())
    parameters = [p for attention in attentions for p in attention.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.)

    def forward_backward(idx):
        with torch.no_grad(), precision:
            layers = teacher(idx, trace=True).trace
        # One layer at a time, so that no more than one T x T picture is held.
        for attention, layer in zip(attentions, in_float32(layers)):
            distance(name, attention, layer, precision).backward()

    micro_step = engine.Recorded(forward_backward, student)
    limit = 60 * args.minutes
    seconds = looks = step = 0
    while seconds < limit:
        begin = time.time()
        step += 1
        # The rate falls with the time, as nobody knows how many steps fit into it.
        fall = 0.55 + 0.45 * math.cos(math.pi * seconds / limit)
        optimizer.param_groups[0]["lr"] = args.lr * min(1, step / WARMUP) * fall

        [(idx, _)] = engine.step_batches(tokens, args.context, args, step)
        micro_step(idx)
        norm = torch.nn.utils.clip_grad_norm_(parameters, train.CLIP)
        engine.check_finite(norm, step)                      # it waits for the GPU: the time is true
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)               # engine.Recorded adds to them in place
        seconds += time.time() - begin
        if seconds > limit * looks / LOOKS:
            looks = int(LOOKS * seconds / limit) + 1
            yield step, seconds


def make_student(kind, teacher, args):
    """The teacher under an attention whose output is that attention alone."""
    config = teacher.config
    S, K, coarse = args.setting or (config.block_size, config.keys_per_query, config.coarse)
    model = teacher.with_attention(kind, block_size=S, keys_per_query=K, coarse=coarse)
    if kind == "paper":
        for attention in attentions_of(model):
            torch.nn.init.constant_(attention.estimator.gates.bias, 50.)         # 1, not 0.993
    return model


@any_output()
@one_line(KeyboardInterrupt, OSError, FloatingPointError, torch.OutOfMemoryError,
          hint="the CSV keeps the rows that were known")
def main():
    args = parse_arguments()
    precision, _ = engine.pick_precision(args.device)
    teacher, tokens, held_out = ablate.load_dense(args)
    rows = ablate.table(args.csv, COLUMNS)
    idx = torch.from_numpy(held_out[:args.context].astype("int64"))[None].to(args.device)
    with torch.no_grad(), precision:
        layers = in_float32(teacher.eval()(idx, trace=True).trace)

    def tell(name, model, step=0, seconds=0., last=True):
        row = look(name, model, layers)
        if last:                                             # with the estimate in place of attention
            with ablate.as_variant(name, kernels=True):
                loss = train.evaluate(model, held_out, args.batch_size, args.eval_windows, precision)
            row["ppl"] = train.perplexity(loss)
        row |= dict(teacher=args.teacher, context=args.context, lr=args.lr, step=step)
        row |= dict(windows=step * args.batch_size, seconds=round(seconds, 2))
        row |= dict(block_size=model.config.block_size, keys_per_query=model.config.keys_per_query)
        rows.writerow(row)
        shown = [f"{column} {row[column]:.4g}" for column in SHOWN if column in row]
        print(f"{name:10} step {step:5} {seconds:6.1f} s ", *shown, flush=True)

    torch.manual_seed(args.seed)
    ATTENTIONS["gate"] = Gate
    ablate.VARIANTS["gate"] = "gate", {}
    for name in ("sea", "window", "true mass", *args.only):
        student = make_student(ablate.VARIANTS[name][0], teacher, args)
        tell(name, student)
        if name in LEARNED:
            for step, seconds in learn(name, student, teacher, tokens, args, precision):
                tell(name, student, step, seconds, seconds >= 60 * args.minutes)


if __name__ == "__main__":
    main()
