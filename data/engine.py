"""
What train.py and distill.py share: the device, one step of the optimizer, checkpoints, several GPUs.

A batch is a function of the seed, the step and the rank, and training draws no other random numbers. So the
weights, the optimizer's state and the number of the step are all that a run needs to go on: to the bit on a
CPU; on a GPU the kernels' float32 atomics vary in the last bits.
"""
import math
import os
import pickle
import signal
import sys
import zipfile
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import sea
from data.common import fail, first_line, one_line, random_batch, whole_file
from model import OPT, OPTConfig

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))   # as torchrun sets them
RUNNING = "out device compile eval_interval log_interval save_interval resume".split()


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


def peak_memory(device):
    """GiB: of the GPU's allocator, or of this process where the system tells."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    if sys.platform == "win32":
        return math.nan
    import resource                        # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def check_fit(config, batch_size, device):
    """Stop before what the kernels or the memory cannot take. Memory is a lower bound: 16 bytes per weight,
    its gradient and two means, 24 C per token and layer, the logits, and the map of one layer."""
    ops, C, tokens = sea.implementation(device), config.n_embd, batch_size * config.context
    if config.attention == "sea" and ops is not sea:
        with one_line(ValueError):
            ops.check_sizes(C // config.n_head, config.query_block, config.map_width, config.n_head,
                            config.num_features)
    weights = 12 * config.n_layer * C * C + (config.vocab_size + config.context) * C
    cells = config.n_head * (config.map_width + config.num_features) * (config.attention == "sea")
    needed = 16 * weights + 4 * tokens * (6 * config.n_layer * C + config.vocab_size + cells)
    there = math.inf                       # Windows does not tell
    if device == "cuda":
        there = torch.cuda.mem_get_info()[1]
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        fail(f"this takes more than {needed / 2 ** 30:,.0f} GiB, {device} has {there / 2 ** 30:,.0f}; lower "
             "--batch-size (and raise --accumulate), or take a smaller model or --context")


def training_script(main):
    """The main of a script that trains: what its user or the machine may cause is told in one line."""
    smaller = one_line(MemoryError, torch.OutOfMemoryError, hint="lower --batch-size, raise --accumulate")
    whole = one_line(OSError, KeyboardInterrupt, hint="a checkpoint already there is whole, --resume goes on")
    return whole(smaller(main))


# ------------------------------------------------------------------------------------------------------------
# Steps

def step_batches(tokens, context, args, step):
    """This rank's micro-batches of a step: inputs and targets."""
    first = args.seed * 10 ** 9 + (step * RANKS + RANK) * args.accumulate
    seeds = range(first, first + args.accumulate)
    return [random_batch(tokens, context, args.batch_size, seed, args.device) for seed in seeds]


class Backward:
    """Forward and backward of a micro-batch: (*batch) -> the values of losses_of(*batch), a vector that the
    next call may overwrite. The first of them, times `share`, adds to the gradients.

    record: batches have one shape, and after a few calls the rest are replays of a CUDA graph. SEA is many
    small kernels, which Python launches more slowly than a GPU runs them.
    """
    WARM_UP = 3                      # calls in which torch.compile, Triton and cuBLAS settle

    def __init__(self, losses_of, precision, share=1., record=False):
        self.losses_of, self.precision, self.share, self.calls = losses_of, precision, share, 0
        self.stream = torch.cuda.Stream() if record else None

    def __call__(self, *batch):
        self.calls += 1
        if self.stream is None:
            return self.run(*batch)
        if self.calls <= self.WARM_UP:
            return self.run_aside(*batch)
        if self.calls == self.WARM_UP + 1:
            self.inputs, self.graph = [*map(torch.clone, batch)], torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.losses = self.run(*self.inputs)
        for x, new in zip(self.inputs, batch):
            x.copy_(new)
        self.graph.replay()
        return self.losses

    def run(self, *batch):
        with self.precision:
            losses = self.losses_of(*batch)
        (self.share * losses[0]).backward()
        return torch.stack([loss.detach() for loss in losses])

    def run_aside(self, *batch):
        """On the stream that is recorded later: autograd adds to gradients on the stream they first met."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            losses = self.run(*batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return losses


def backward_of(losses_of, precision, args):
    """The Backward of a script's flags. It records on one GPU, as DistributedDataParallel has its own
    streams, and not with --no-compile, which is for debugging."""
    return Backward(losses_of, precision, 1 / args.accumulate,
                    record=args.compile and args.device == "cuda" and RANKS == 1)


def optimizer_step(model, optimizer, batches, backward, clip):
    """One step: `backward`, a Backward, of each micro-batch -> their losses' means, over ranks as well."""
    means = 0.
    for i, batch in enumerate(batches):
        alone = RANKS > 1 and i + 1 < len(batches)               # the last backward meets the other ranks
        with model.no_sync() if alone else nullcontext():
            means += backward(*batch) / len(batches)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    means = mean_of_ranks(means)
    if not (norm + means.sum()).isfinite():                      # waits for the GPU
        raise FloatingPointError(f"the loss is {means[0]:.4g}, its gradient's norm {norm:.4g}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)                       # a recorded backward adds to these tensors
    return means


def compile_estimators(model):
    """torch.compile the MLP, the scores, the sums and the mix of SEA layers, in place; nothing that
    distill.py's hooks read, and nothing whose code depends on T."""
    for attention in (module for module in model.modules() if isinstance(module, sea.SEAttention)):
        attention.encoder.compile()
        attention.scores.compile()                 # of a Sequential each part by itself
        attention.cumulative_sum = torch.compile(attention.cumulative_sum)
        attention.mix_rows = torch.compile(attention.mix_rows)


def ctrl_c():
    """A list that the first Ctrl-C fills, so that no step is cut in two; the second one stops at once."""
    pressed = []

    def press(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if RANK == 0:
            print("stopping after this step; Ctrl-C again: at once", file=sys.stderr)
    signal.signal(signal.SIGINT, press)
    return pressed


# ------------------------------------------------------------------------------------------------------------
# Checkpoints

def make_folder(path):
    with one_line(OSError, hint="give another folder by --out"):
        path.mkdir(parents=True, exist_ok=True)


def save_checkpoint(path, model, **rest):
    if RANK == 0:
        with whole_file(path) as file:
            torch.save(dict(model=model.state_dict(), config=asdict(model.config), **rest), file)


def load_checkpoint(path, device):
    """A file of save_checkpoint -> the model on the device, and the rest of the file."""
    if not os.path.isfile(path):
        fail(f"there is no checkpoint {path}; python train.py makes out/ckpt.pt")
    try:
        if not zipfile.is_zipfile(path):
            raise RuntimeError("cut off, or another kind of file")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = OPT(OPTConfig(**saved.pop("config")))
        model.load_state_dict(saved.pop("model"))
        saved["tokenizer"], saved["data"]
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, OSError,
            pickle.UnpicklingError) as error:
        fail(f"{path} is no checkpoint of this program ({first_line(error)}); train again")
    return model.to(device), saved


def fingerprint(name, content):
    """A name that changes with what it stands for: a tensor or an array."""
    return f"{name} {zlib.crc32(torch.as_tensor(content).detach().cpu().numpy()):08x}"


def settings_of(args, tokens):
    """What fixes the numbers of a run: its flags but RUNNING, its data, its micro-batches in a step."""
    fixed = {name: value for name, value in vars(args).items() if name not in RUNNING}
    return fixed | dict(data=fingerprint(args.data, tokens), accumulate=args.accumulate * RANKS)


def resume(path, model, optimizer, settings):
    """Bring both to where a run of these settings was saved, and return the rest of its checkpoint."""
    if not os.path.isfile(path):
        fail(f"there is no {path} to go on from; leave --resume out")
    found, saved = load_checkpoint(path, "cpu")
    if "optimizer" not in saved:
        fail(f"{path} holds no state of an optimizer; leave --resume out")
    for name in sorted({*settings, *saved["settings"]}):
        was, now = (x.get(name, "not given") for x in (saved["settings"], settings))
        if was != now:
            fail(f"{path} is of a run whose {name} was {was}, and now it is {now}; take the flags and "
                 "data of that run, or another --out without --resume")
    if saved["step"] == settings["steps"]:
        print(f"{path} holds all {saved['step']} steps; nothing is left to do")
        raise SystemExit(0)
    model.load_state_dict(found.state_dict())
    optimizer.load_state_dict(saved.pop("optimizer"))
    return saved


def leave(path, step, steps):
    """The end of a run after Ctrl-C."""
    print(f"{path} holds step {step} of {steps}; the same command with --resume goes on")
    raise SystemExit(130)


# ------------------------------------------------------------------------------------------------------------
# Several GPUs: torchrun starts a process for each, DistributedDataParallel takes the mean of their gradients

def join_ranks(device):
    """Meet the other processes; the first one alone prints and writes."""
    if RANKS > 1 and device == "cuda":
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            fail(f"this machine has {torch.cuda.device_count()} GPUs; give torchrun no more --nproc-per-node")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if RANKS > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if RANK:
        sys.stdout = open(os.devnull, "w")


def parallel(model):
    return DistributedDataParallel(model) if RANKS > 1 else model


def mean_of_ranks(x):
    if RANKS > 1:
        dist.all_reduce(x)
    return x / RANKS


@contextmanager
def first_rank_first(device):
    """What may write a file that all ranks read: the first one does it alone, then the others."""
    if RANK:
        any_rank(False, device)
    yield
    if RANK == 0:
        any_rank(False, device)


def any_rank(yes, device):
    """Is it so on any rank? They wait here for each other."""
    if RANKS == 1:
        return bool(yes)
    return mean_of_ranks(torch.tensor(float(bool(yes)), device=device)).item() > 0
