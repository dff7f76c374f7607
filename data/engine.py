"""
What train.py and distill.py share: devices, batches, the recorded step, checkpoints, several GPUs.

A batch is a function of the seed, the step and the rank, and training draws no other random
numbers. So the weights, the optimizer's states and the number of the step are all that a run needs
to go on: to the bit on a CPU; on a GPU the kernels' float32 atomics vary in the last bits.
"""
import math
import os
import shutil
import signal
import sys
import time
import zipfile
import zlib
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

import sea
from data import hub
from data.common import (any_output, encoding, fail, first_line, one_line, random_batch,
                         signals_to, whole_file)
from model import Config, Transformer, captured

RANK = int(os.environ.get("RANK", 0))                     # as torchrun sets them
RANKS = int(os.environ.get("WORLD_SIZE", 1))
# Flags that do not touch a run's numbers: it may go on with others.
RUNNING = "out resume overwrite device kernels eval_windows".split()
SAVE_MINUTES = 10         # between checkpoints


# --------------------------------------------------------------------------------------------------
# The device

def pick_device(wanted):
    """cpu or cuda: the wanted one if it is there; for auto a GPU, if there is one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        fail("--device cuda, but torch finds no GPU; leave the flag out to run on the CPU")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def parse(parser, presets):
    """Flags and device; what is not given has the value of the device's preset."""
    parser.set_defaults(**presets[pick_device("auto")])           # --help shows them
    device = pick_device(parser.parse_args().device)
    parser.set_defaults(**presets[device])
    args = parser.parse_args()
    args.device = device
    return args


def pick_precision(device):
    """The autocast context of the matrix products, and what to tell about it."""
    if device == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        return torch.autocast("cuda", torch.bfloat16), "bfloat16"
    return nullcontext(), "float32"


def pick_backend(device, kernels):
    """Kernels or plain PyTorch, from now on: "triton" or "torch"."""
    if not kernels:
        sea.use_kernels(False)
    return sea.backend if device == "cuda" else "torch"


def peak_memory(device):
    """GiB: of the GPU's allocator, or of this process where the system tells."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved() / 2 ** 30
    if sys.platform == "win32":
        return math.nan
    import resource                        # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def check_fit(config, batch_size, device):
    """Stop before what the memory cannot take, by a lower bound: 16 bytes for each weight, its
    gradient and two means, 4 for each of 6 C numbers that a token leaves in a layer, and for the
    logits."""
    C = config.n_embd
    tokens = batch_size * config.context
    layer = 2 * C * C + 2 * C * config.n_kv_head * config.head_dim + 2 * C * config.n_ffn
    weights = config.n_layer * layer + (config.vocab_size + config.context) * C
    needed = 16 * weights + 4 * tokens * (6 * config.n_layer * C + config.vocab_size)
    there = math.inf                       # Windows does not tell
    if device == "cuda":
        there = torch.cuda.mem_get_info()[1]
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        fail(f"this takes more than {needed / 2 ** 30:,.0f} GiB, {device} has "
             f"{there / 2 ** 30:,.0f}; lower --batch-size (and raise --accumulate), or take a "
             "smaller model or --context")


def check_budget(config):
    """Tell where a query chooses all that there is: such a run says nothing of choosing."""
    S = config.block_size
    # The keys of the last query, whose own block is counted as in sea.py and in model.Window.
    own = dict(sea=S, paper=S, window=(S + 1) // 2).get(config.attention)
    n, _ = sea.budgets(S, config.keys_per_query)
    if own and RANK == 0 and config.context <= (n + 2) * S + own:
        print(f"note: {config.keys_per_query} keys a query in blocks of {S} cover the context of "
              f"{config.context}: this selects everything, as dense attention does",
              file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# The run

def start(args):
    """The ranks, the seed and the backend of a run -> the backend, the precision and its name."""
    join_ranks(args.device)
    torch.manual_seed(args.seed)
    return pick_backend(args.device, args.kernels), *pick_precision(args.device)


def training_script(main):
    """A main around which what its user or the machine may cause is told in one line."""
    smaller = one_line(MemoryError, torch.OutOfMemoryError,
                       hint="lower --batch-size, raise --accumulate")
    whole = one_line(OSError, hint="if there is a ckpt.pt, it is whole and --resume goes on")
    spoilt = one_line(FloatingPointError, hint="try a lower --lr")
    return any_output()(whole(smaller(spoilt(main))))


def say(*words):
    """Print what a run tells; it goes on where nobody reads: a closed terminal, a full disk."""
    with suppress(OSError):
        print(*words, flush=True)


def step_batches(tokens, context, args, step):
    """This rank's micro-batches of a step: inputs and targets (B, T)."""
    first = args.seed * 10 ** 9 + (step * RANKS + RANK) * args.accumulate
    seeds = range(first, first + args.accumulate)
    return [random_batch(tokens, context, args.batch_size, seed, args.device) for seed in seeds]


class Recorded:
    """f(*batch), forward and backward pass of a model over batches of one shape, on a GPU as one
    CUDA graph: a small model would wait most of the time for Python, which launches its kernels.

    Nothing in f may wait for the GPU (print, item, if). Gradients are added up in place, so
    zero_grad(set_to_none=False). The next call overwrites what this one returned.
    """

    def __init__(self, f, model):
        self.f = f
        self.model = model
        self.inputs = None
        self.out = None
        self.replay = None

    def __call__(self, *batch):
        if batch[0].device.type == "cpu" or sea.backend == "torch":     # which stays open to print
            return self.f(*batch)
        if self.replay is None:
            self.record(batch)
        for x, given in zip(self.inputs, batch):
            x.copy_(given)
        self.replay()
        return self.out

    def record(self, batch):
        self.inputs = [x.clone() for x in batch]
        # A first run compiles kernels and makes the gradients, on a stream beside, as PyTorch asks
        # for before a backward pass is captured. Then they are set to 0.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.f(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.model.zero_grad(set_to_none=False)

        def step():
            self.out = self.f(*self.inputs)

        self.replay = captured(step)


def check_finite(norm, step):
    """Stop before a step that would spoil the weights. It waits for the GPU."""
    if not norm.isfinite():
        fail(f"the gradient's norm is {norm:.4g}; this is step {step}: try a lower --lr")


class Keeper:
    """Holds a run's folder and keeps its checkpoint; with --resume, brings all to where it was.

    content: what the checkpoint holds beside weights, states, the step and its settings.
    """

    def __init__(self, args, model, optimizer, tokens, tokenizer, teacher=None):
        self.lock = own_folder(args)             # held until this process ends
        self.path = args.out / "ckpt.pt"
        self.args = args
        self.model = model
        self.optimizer = optimizer
        self.settings = settings_of(args, model, tokens, teacher)
        self.content = {}
        self.step = 0
        self.stopped_by = 0                      # a signal's number
        self.stopped_at = 0.
        if args.resume:
            self.content, self.step = resume(self.path, model, optimizer, self.settings)
        self.content |= dict(tokenizer=tokenizer, data=args.data)

    def steps(self):
        """The numbers of the steps to do. Between steps it saves: by the clock, after the last
        one, and after a signal, which ends the run."""
        last = self.args.steps
        saved = time.time()
        with signals_to(self.stop, "SIGINT", "SIGTERM", "SIGHUP"):
            for step in range(self.step + 1, last + 1):
                yield step
                stopped = any_rank(self.stopped_by, self.args.device)
                if stopped or step == last or time.time() - saved >= 60 * SAVE_MINUTES:
                    self.save(step)
                    saved = time.time()
                if stopped and step < last:
                    any_rank(False, self.args.device)     # torchrun kills the others once one ends
                    say(f"{self.path} holds step {step} of {last}; "
                        "the same command with --resume goes on")
                    raise SystemExit(128 + (self.stopped_by or signal.SIGINT))

    def save(self, step):
        save_checkpoint(self.path, self.model, step=step, settings=self.settings,
                        optimizer=self.optimizer.state_dict()["state"], **self.content)

    def stop(self, number, frame):
        """A first signal lets the step end, so that none is cut in two; a second one does not.

        One within a second is the first again: torchrun passes on what the terminal sent to all.
        """
        if self.stopped_by:
            if time.time() - self.stopped_at > 1:
                raise KeyboardInterrupt
            return
        self.stopped_by = number
        self.stopped_at = time.time()
        if RANK == 0:
            with suppress(OSError):                       # after SIGHUP the terminal is closed
                print("stopping after this step; once more: at once", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# Checkpoints

def check_out(args):
    """Before any work: args.out must be a folder to write to, which holds a checkpoint to go on
    from, or none that would be lost."""
    there = next(path for path in (args.out, *args.out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        fail(f"cannot write to --out {args.out}: {there} is no folder, or not yours to write to")
    path = args.out / "ckpt.pt"
    if path.is_dir():
        fail(f"{path} is a folder; take another --out")
    if args.resume and not path.is_file():
        fail(f"there is no {path} to go on from; leave --resume out")
    if path.exists() and not args.resume and not args.overwrite:
        fail(f"{path} is there already; --resume goes on, --overwrite starts again, "
             "--out takes another folder")


def own_folder(args):
    """Make the folder and lock it against other runs -> the lock, which goes with this process."""
    with one_line(OSError, hint="give another folder by --out"):
        args.out.mkdir(parents=True, exist_ok=True)
        lock = open(args.out / "lock", "a")
    try:
        import fcntl                                      # not on Windows
        if RANK == 0:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError:
        fail(f"another run is writing to {args.out}; wait for its end, or give another --out")
    check_out(args)                        # another run may have come and gone since the first time
    return lock


def save_checkpoint(path, model, **rest):
    if RANK == 0:
        with whole_file(path) as file:
            torch.save(dict(model=model.state_dict(), config=asdict(model.config), **rest), file)


@contextmanager
def checkpoint_of_ours(path):
    """Around what reads a checkpoint: whatever may be in the file, it is told in one line."""
    try:
        yield
    except hub.DAMAGE as error:
        fail(f"{path} is no checkpoint of this program ({first_line(error)}); train again")


def load_checkpoint(path, device):
    """A file of save_checkpoint -> the model on the device, and the rest of the file."""
    if not os.path.isfile(path):
        fail(f"there is no checkpoint {path}; python train.py makes out/sea-stdlib/ckpt.pt, "
             "python train.py --attention dense makes out/dense-stdlib/ckpt.pt")
    with one_line(OSError):                               # of another user, say
        open(path, "rb").close()
    with checkpoint_of_ours(path):
        if not zipfile.is_zipfile(path):
            raise RuntimeError("cut off, or another kind of file")
        hub.check_zip(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict):
            raise TypeError(f"it holds a {type(saved).__name__}")
        if "query_block" in saved["config"]:
            raise ValueError("it is of the first design")
        model = model_of(Config(**saved.pop("config")), saved.pop("model"), os.path.getsize(path))
        if not isinstance(saved["tokenizer"], str) or not isinstance(saved["data"], str):
            raise TypeError("it does not name its tokenizer and its data")
    return model.to(device), saved


def model_of(config, weights, size):
    """The model of a file of that size; what it only claims to hold takes no memory."""
    if config.n_layer > len(weights) or config.num_features > size:
        raise ValueError("its config claims more than it holds")
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(weights, assign=True)
    if not all(x.isfinite().all() for x in weights.values()):
        raise ValueError("it holds weights that are no numbers")
    return model.float()


def load_model(name, device):
    """A checkpoint, a hub's folder or name -> the model, the names of its tokenizer and data."""
    if str(name).endswith(".pt"):
        model, saved = load_checkpoint(name, device)
        return model, saved["tokenizer"], saved["data"]
    with first_rank_first(device), one_line(ValueError, TypeError, OSError):
        model = Transformer.from_pretrained(name).to(device)
    if model.config.architecture == "opt":
        return model, "opt", "wikitext2"
    return model, "smollm2", "wikipedia"


def load_encoding(name, model):
    """The tokenizer that goes with a model of load_model: the files beside it come first."""
    folder = Path(model).parent if str(model).endswith(".pt") else model
    beside = not Path(folder).is_dir() or (Path(folder) / "vocab.json").is_file()
    return encoding(name, folder if beside else None)


def keep_tokenizer(name, teacher, out):
    """Copy the teacher's tokenizer beside its student, so that it is there without a network."""
    folder = Path(teacher).parent if str(teacher).endswith(".pt") else teacher
    if RANK or name not in ("opt", "smollm2"):
        return
    with one_line(ValueError):
        for file in ("vocab.json", "merges.txt"):
            if not str(teacher).endswith(".pt") or (folder / file).is_file():
                shutil.copyfile(hub.model_file(folder, file), out / file)


def fingerprint(content):
    """A name that changes with a tensor or an array."""
    return f"{zlib.crc32(torch.as_tensor(content).detach().cpu().numpy()):08x}"


def settings_of(args, model, tokens, teacher):
    """What fixes the numbers of a run: flags but RUNNING, its models, its data, its batches."""
    fixed = {name: value for name, value in vars(args).items() if name not in RUNNING}
    fixed |= vars(model.config)                    # also where the flags left it to the teacher
    fixed |= dict(data=fingerprint(tokens), accumulate=args.accumulate * RANKS)
    if teacher is not None:
        fixed["teacher"] = fingerprint(teacher.embed_tokens.weight)      # it may have moved
    return fixed


def resume(path, model, optimizer, settings):
    """Bring both to where a run of these settings was saved -> the checkpoint's rest, the step."""
    found, saved = load_checkpoint(path, "cpu")
    if "optimizer" not in saved:
        fail(f"{path} holds no state of an optimizer; leave --resume out")
    with checkpoint_of_ours(path):
        check_same_run(path, saved.pop("settings"), settings)
        step = int(saved.pop("step"))
        if not 0 < step <= settings["steps"]:
            raise ValueError(f"it is of step {step}")
        if step == settings["steps"]:
            say(f"{path} holds all {step} steps; "
                f"python distill.py --eval-only --teacher {path} evaluates it")
            raise SystemExit(0)
        model.load_state_dict(found.state_dict())
        optimizer.load_state_dict(dict(optimizer.state_dict(), state=saved.pop("optimizer")))
        for p, kept in optimizer.state.items():       # torch does not check whose states they are
            shapes = {name: x.shape for name, x in kept.items()}
            if shapes != dict(step=(), exp_avg=p.shape, exp_avg_sq=p.shape):
                raise ValueError("its optimizer is of other weights")
    return saved, step


def check_same_run(path, before, now):
    """All settings that differ, in one line; what to do where more steps are wanted."""
    changed = [f"{name} was {before.get(name, 'not given')}, now {now.get(name, 'not given')}"
               for name in sorted({*now, *before}) if before.get(name) != now.get(name)]
    if not changed:
        return
    more = ""
    if before.get("steps") != now["steps"]:
        more = "; --lr falls over all --steps, so with other --steps every step is another one"
    fail(f"{path} is of another run ({'; '.join(changed)}); take the flags and data of that run, "
         f"or another --out without --resume{more}")


# --------------------------------------------------------------------------------------------------
# Several GPUs: torchrun starts a process for each; before a step they average their gradients

def join_ranks(device):
    """Meet the other processes; the first one alone prints and writes."""
    if RANKS > 1 and device == "cuda":
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            fail(f"this machine has {torch.cuda.device_count()} GPUs; "
                 "give torchrun no more --nproc-per-node")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if RANKS > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if RANK:
        sys.stdout = open(os.devnull, "w")


def average_gradients(model):
    """Make each gradient the mean of all ranks; seed and files make their weights alike."""
    for p in model.parameters():
        if RANKS > 1 and p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= RANKS


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
