"""
Draw the pictures of README.md, and make the tables of speed of README.md and RESULTS.md.

    python assets/figures.py --table assets/bench.csv             print the tables
    python assets/figures.py --table assets/bench.csv --write     put them into both files
    python assets/figures.py --bench assets/bench.csv             draw assets/speed.png
    python assets/figures.py --mass assets/mass.csv               draw assets/mass.png
    python assets/figures.py --chance assets/chance.csv           draw assets/chance.png
    python assets/figures.py --checkpoint data/smollm2            draw assets/sea.png

bench.csv is what tests/bench.py measured, mass.csv what tests/ablate.py --mass did, chance.csv what
tests/chance.py did. Pictures need one more package: pip install matplotlib.
"""
import argparse
import csv
import math
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SETTINGS = ("8", "48"), ("8", "240"), ("16", "64")               # S, K
STAGES = "moments", "first look", "second look", "attend"
# Perplexity of SmolLM2-135M under a setting, untrained, T = 2048: RESULTS.md, "Quality"
QUALITY = {("8", "48"): "20.08", ("8", "240"): "18.79", ("16", "64"): "19.68"}
DENSE_QUALITY = "18.49"
# x times dense that were hoped for: pass, S, K, then {T: x}
LENGTHS = [2 ** i for i in range(11, 18)]
GOALS = {("forward", "8", "48"): dict(zip(LENGTHS, (0.35, 0.7, 1.1, 2, 3.5, 6.5, 11))),
         ("both", "8", "48"): dict(zip(LENGTHS, (0.5, 1, 1.8, 3.3, 6, 11, 18))),
         ("forward", "8", "240"): dict(zip(LENGTHS[2:], (0.45, 0.8, 1.6, 3, 5))),
         ("forward", "16", "64"): dict(zip(LENGTHS[2:], (1.4, 2.6, 4.5, 8, 14)))}
PASSES = dict(forward="forward", both="forward + backward")
# What each stage must do at T = 32768, S 8, K 48, H 12, D 64: RESULTS.md, "Where the time goes".
# Millions of bytes from and to memory, of bytes from the cache, of multiplications and additions
MUST = {"moments": (50.3 + 14.2, 0, 0), "first look": (50.3 + 1.6, 0, 25_770),
        "second look": (50.3 + 12.6, 956, 15_300), "attend": (4 * 50.3, 1107, 17_720)}
COPY, PRODUCTS = 3.0e6, 798e6      # an H100's, measured: millions of bytes, of operations a second
# the page's shades: lightness only falls from the first to the last
STOPS = "#f6f5e6", "#cfe3b4", "#86c7a4", "#3f9fa6", "#2b6d9d", "#27397c", "#160f3f"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", metavar="CSV", help="print the tables of a bench.csv")
    parser.add_argument("--write", action="store_true", help="with --table: change the files")
    parser.add_argument("--bench", metavar="CSV", help="draw speed.png")
    parser.add_argument("--mass", metavar="CSV", help="draw mass.png")
    parser.add_argument("--chance", metavar="CSV", help="draw chance.png")
    parser.add_argument("--checkpoint", help="draw sea.png: a checkpoint or a hub's folder")
    parser.add_argument("--tokens", type=int, default=384, help="of held-out text (default: 384)")
    parser.add_argument("--layer", type=int, default=10, help="to draw, from 0 (default: 10)")
    parser.add_argument("--head", type=int, default=4, help="to draw, from 0 (default: 4)")
    args = parser.parse_args()
    if not (args.table or args.bench or args.mass or args.chance or args.checkpoint):
        parser.error("give one of --table, --bench, --mass, --chance, --checkpoint")
    return args


# --------------------------------------------------------------------------------------------------
# The tables

class Bench(dict):
    """A bench.csv: {(what, T, S, K, pass): row}, numbers as text, S and K of dense empty."""

    def __init__(self, path):
        for row in csv.DictReader(open(path, newline="")):
            self[row["what"], int(row["T"]), row["S"], row["K"], row["pass"]] = row
        self.lengths = sorted({key[1] for key in self})

    def number(self, field, what, T, S="", K="", kind="forward"):
        return float(self[what, T, S, K, kind][field])

    def dense_ms(self, T, kind):
        return min(self.number("ms", what, T, kind=kind) for what in ("flash", "cudnn"))

    def times(self, T, S, K, kind, what="sea"):
        return self.dense_ms(T, kind) / self.number("ms", what, T, S, K, kind)

    def crossing(self, S, K, kind, what="sea"):
        """The T from which on SEA is faster, on a line in logarithms."""
        gap = {T: math.log(self.times(T, S, K, kind, what)) for T in self.lengths}
        for low, high in zip(self.lengths, self.lengths[1:]):
            if gap[low] < 0 <= gap[high]:
                return low * (high / low) ** (gap[low] / (gap[low] - gap[high]))


def short(x):
    """Three digits."""
    return f"{x:.{max(0, 2 - math.floor(math.log10(x)))}f}"


def thousands(T):
    return f"{T // 1024}k"


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def tables(b):
    """{name: markdown}. README.md and RESULTS.md hold each between two comments with its name."""
    made = dict(summary=summary(b), forward=speed(b, "forward"), both=speed(b, "both"))
    made.update(crossover=crossover(b), called=called(b), memory=memory(b), stages=stages(b))
    made.update({"floor": floor(b), "goals": goals(b), "more goals": more_goals(b)})
    return made


def summary(b):
    S, K = SETTINGS[0]
    cases = {"forward": ("forward", "sea"),
             "forward, as called from Python": ("forward", "sea, as called"),
             "forward + backward": ("both", "sea")}
    rows = []
    for name, (kind, what) in cases.items():
        rows.append([name, *[short(b.times(T, S, K, kind, what)) for T in b.lengths]])
    return markdown(["T, tokens", *[thousands(T) for T in b.lengths]], rows)


def speed(b, kind):
    rows = []
    for T in b.lengths:
        row = [thousands(T), *[short(b.number("ms", x, T, kind=kind)) for x in ("flash", "cudnn")]]
        for S, K in SETTINGS:
            row += [short(b.number("ms", "sea", T, S, K, kind)), short(b.times(T, S, K, kind))]
        rows.append(row)
    head = [x for S, K in SETTINGS for x in (f"S {S}, K {K}", "x")]
    return markdown([f"T; {PASSES[kind]}", "flash", "cuDNN", *head], rows)


def crossover(b):
    cases = ("forward", "sea"), ("forward", "sea, as called"), ("both", "sea")
    rows = []
    for S, K in SETTINGS:
        points = [b.crossing(S, K, *case) for case in cases]
        rows.append([f"S {S}, K {K}", *[f"{round(T, -2):,.0f}" if T else "none" for T in points]])
    return markdown(["SEA is faster from T =", "forward", "forward, as called from Python",
                     "forward + backward"], rows)


def called(b):
    rows = []
    for T in b.lengths:
        row = [thousands(T)]
        for S, K in SETTINGS:
            ms = b.number("ms", "sea, as called", T, S, K)
            row += [short(ms), short(ms / b.number("ms", "sea", T, S, K))]
        rows.append(row)
    head = [x for S, K in SETTINGS for x in (f"S {S}, K {K}, ms", "of the graph's time")]
    return markdown(["T; as called from Python", *head], rows)


def memory(b):
    rows = []
    for T in b.lengths:
        row = [thousands(T)]
        for kind in PASSES:
            row.append(f"{b.number('MiB', 'cudnn', T, kind=kind):.0f}")
            row += [f"{b.number('MiB', 'sea', T, S, K, kind):.0f}" for S, K in SETTINGS]
        rows.append(row)
    head = [x for name in PASSES.values()
            for x in (f"{name}: cuDNN", *[f"S {S}, K {K}" for S, K in SETTINGS])]
    return markdown(["T; MiB", *head], rows)


def stages(b):
    rows = []
    for S, K in SETTINGS:
        for T in b.lengths:
            ms = [b.number("ms", stage, T, S, K) if (stage, T, S, K, "forward") in b else 0
                  for stage in STAGES]
            whole = b.number("ms", "sea", T, S, K)
            rows.append([f"S {S}, K {K}", thousands(T), *[short(x) if x else "none" for x in ms],
                         short(whole), f"{100 * ms[1] / whole:.0f} %"])
    return markdown(["", "T", *STAGES, "whole", "first look's share"], rows)


def floor(b):
    rows = []
    for stage, (memory, cache, products) in MUST.items():
        least = 1000 * max(memory / COPY, products / PRODUCTS)
        ms = b.number("ms", stage, 32768, *SETTINGS[0])
        rows.append([stage, f"{memory:.0f}", f"{cache:.0f}", f"{products / 1000:.1f}", short(least),
                     short(ms), short(ms / least)])
    return markdown(["32k, S 8, K 48", "memory, MB", "L2 cache, MB", "GFLOP", "floor, ms",
                     "measured, ms", "over floor"], rows)


def goals(b):
    rows = []
    for (kind, S, K), wanted in GOALS.items():
        row = [f"{PASSES[kind]}, S {S}, K {K}"]
        for T in b.lengths:
            found = b.times(T, S, K, kind)
            missed = " (missed)" if T in wanted and found < wanted[T] else ""
            row.append(f"{wanted[T]:g}: {short(found)}{missed}" if T in wanted else "")
        rows.append(row)
    return markdown(["goal: measured, x", *[thousands(T) for T in b.lengths]], rows)


def more_goals(b):
    S, K = SETTINGS[0]
    ms = {T: b.number("ms", "sea", T, S, K) for T in b.lengths}
    dense = b.number("MiB", "cudnn", 32768, kind="both")
    cases = [("time at 128k over that at 64k", 2.2, ms[131072] / ms[65536]),
             ("time at 8k as called from Python, over that of a graph", 1.3,
              b.number("ms", "sea, as called", 8192, S, K) / ms[8192]),
             ("memory at 32k, forward, MiB", 120, b.number("MiB", "sea", 32768, S, K)),
             ("memory at 32k, forward + backward, over dense's", 2.5,
              b.number("MiB", "sea", 32768, S, K, "both") / dense)]
    rows = [[name, f"{limit}", short(x) + ("" if x <= limit else " (missed)")]
            for name, limit, x in cases]
    return markdown(["S 8, K 48", "at most", "measured"], rows)


def put(made, text):
    """A text with its tables replaced by those made."""
    for name, table in made.items():
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda found: found[1] + table + found[2], text, flags=re.S)
    return text


# --------------------------------------------------------------------------------------------------
# The pictures

def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 11, "axes.edgecolor": "#888888"})
    return plt


def draw_speed(b, path):
    """How many times faster than dense attention each setting is, over T."""
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for axis, (kind, name) in zip(axes, PASSES.items()):
        axis.axhline(1, color="#5c5c5c", lw=1.5)
        for (S, K), color in zip(SETTINGS, (STOPS[5], STOPS[3], "#c9a227")):
            x = [b.times(T, S, K, kind) for T in b.lengths]
            label = f"S {S}, K {K} (perplexity {QUALITY[S, K]})"
            axis.plot(b.lengths, x, "o-", ms=4, color=color, label=label)
            if (S, K) == SETTINGS[0]:
                for T, y in list(zip(b.lengths, x))[::2]:
                    axis.annotate(short(y), (T, y), (5, -13), textcoords="offset points",
                                  color=color)
        axis.set(xscale="log", yscale="log", xlabel="T, tokens", xlim=(1600, 230_000))
        axis.set_title(name, loc="left", fontweight="bold", fontsize=11)
        axis.set_xticks(b.lengths, [thousands(T) for T in b.lengths])
        axis.set_yticks([0.25, 0.5, 1, 2, 4, 8, 16], "1/4 1/2 1 2 4 8 16".split())
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("times faster than dense attention")
    axes[0].text(b.lengths[-1], 0.95, f"dense (perplexity {DENSE_QUALITY})", ha="right", va="top")
    axes[0].legend(frameon=False, title="SmolLM2-135M, no training, T = 2k", loc="upper left",
                   alignment="left")
    figure.savefig(path, dpi=160)


def draw_mass(path_csv, path):
    """How much of dense attention is on the keys that SEA reads, by layer and head."""
    kept = {}
    for row in csv.DictReader(open(path_csv, newline="")):
        kept[int(row["head"]), int(row["layer"])] = float(row["mass"])
    heads, layers = [1 + max(places) for places in zip(*kept)]
    picture = [[kept[head, layer] for layer in range(layers)] for head in range(heads)]
    figure, axis = pyplot().subplots(figsize=(11, 3.6), layout="constrained")
    image = axis.imshow(picture, vmin=0, vmax=1, cmap=shades())
    axis.set(xlabel="layer", ylabel="head", xticks=range(layers), yticks=range(heads))
    bar = figure.colorbar(image, ax=axis, ticks=[0, 0.25, 0.5, 0.75, 1], pad=0.015)
    bar.ax.set_yticklabels(["0", "25 %", "50 %", "75 %", "100 %"])
    figure.savefig(path, dpi=130)


def draw_chance(path_csv, path):
    """What learned estimates keep, and how far they are from attention, over steps of training."""
    rows = list(csv.DictReader(open(path_csv, newline="")))
    teachers = list(dict.fromkeys(row["teacher"] for row in rows))
    names = "mass kept by the chosen keys", "KL from attention, nats"
    colors = {"sea": STOPS[5], "window": "#c9a227", "true mass": "#5c5c5c", "paper": "#b0413e",
              "gate": "#7a4fa3"}
    figure, axes = pyplot().subplots(2, len(teachers), figsize=(11, 6.4), sharex="col",
                                     squeeze=False, layout="constrained")
    for column, teacher in zip(axes.T, teachers):
        column[0].set_title(teacher, loc="left", fontweight="bold", fontsize=11)
        column[1].set_xlabel("steps of 4 windows")
        for axis, what, name in zip(column, ("mass", "kl"), names):
            for estimate, color in colors.items():
                points = [(int(row["step"]), float(row[what])) for row in rows
                          if (row["teacher"], row["estimate"]) == (teacher, estimate) and row[what]]
                trained = [point for point in points if point[0]]
                if trained:
                    axis.plot(*zip(*trained), "o-", ms=3, color=color, label=f"{estimate}, trained")
                elif points:
                    axis.axhline(points[0][1], color=color, label=estimate)
            axis.set(xscale="log", ylabel=name)
            axis.grid(alpha=0.3)
    lines = {line.get_label(): line for axis in axes[0] for line in axis.lines}
    axes[0, 0].legend(lines.values(), lines, frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)


def shades():
    from matplotlib.colors import LinearSegmentedColormap
    return LinearSegmentedColormap.from_list("sea", STOPS)


def panels_of(args):
    """The four pictures of a head, (T, T) each, of held-out text; its block size."""
    import torch
    sys.path.insert(0, str(HERE.parent))
    from assets.page import pictures
    from data import common, engine
    model, _, data = engine.load_model(args.checkpoint, "cpu")
    if model.config.attention != "sea":
        model = model.with_attention("sea")
    T = min(args.tokens, model.config.context)
    idx = torch.from_numpy(common.load(data)[1][:T].astype("int64"))[None]
    layers = list(pictures(model.eval(), idx))
    return [picture[args.head] for picture in layers[args.layer][:4]], model.config.block_size


def draw_attention(panels, S, path):
    """Four panels side by side; white is what a query cannot see or does not estimate."""
    import torch
    from matplotlib.colors import PowerNorm
    estimate, mask, used, dense = panels
    T = len(mask)
    query, key = torch.arange(T)[:, None], torch.arange(T)
    past, seen = key < query // S * S, key <= query
    keys, kept = mask.sum(-1).mean(), (dense * mask).sum(-1).mean()
    titles = [("1  estimate", f"by blocks of {S} keys", estimate, past),
              ("2  select", f"{keys:.0f} of {(T + 1) / 2:.0f} keys a query", mask, seen),
              ("3  attend", "softmax over those keys", used, seen),
              ("dense, to compare", f"{100 * kept:.0f} % of it is on those keys", dense, seen)]
    figure, axes = pyplot().subplots(1, 4, figsize=(11, 3.5), sharey=True, layout="constrained")
    for axis, (title, note, picture, shown) in zip(axes, titles):
        picture = picture.masked_fill(~shown, torch.nan)
        image = axis.imshow(picture, norm=PowerNorm(1 / 3, 0, 0.25, clip=True), cmap=shades(),
                            interpolation="nearest")
        axis.set_title(title, fontsize=14, fontweight="bold", loc="left", pad=23)
        axis.text(0, 1.03, note, transform=axis.transAxes)
        axis.set(xlabel="key", xticks=range(0, T, 100), yticks=range(0, T, 100))
    axes[0].set_ylabel("query")
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.001, 0.01, 0.1], shrink=0.7, pad=0.015)
    bar.ax.set_yticklabels(["0", "0.1 %", "1 %", "10 %"])
    figure.savefig(path, dpi=160)


def main():
    args = parse_arguments()
    if args.table:
        made = tables(Bench(args.table))
        for name, table in made.items():
            print(f"<!-- table {name} -->\n{table}<!-- end -->\n")
        for path in (HERE.parent / "README.md", HERE.parent / "RESULTS.md"):
            if args.write:
                path.write_text(put(made, path.read_text(encoding="utf-8")), encoding="utf-8")
    if args.bench:
        draw_speed(Bench(args.bench), HERE / "speed.png")
    if args.mass:
        draw_mass(args.mass, HERE / "mass.png")
    if args.chance:
        draw_chance(args.chance, HERE / "chance.png")
    if args.checkpoint:
        draw_attention(*panels_of(args), HERE / "sea.png")


if __name__ == "__main__":
    main()
