"""
Draw the README's figures: assets/sea.png from a trained model's real matrices, assets/speed.png from what
tests/bench.py measured. This is the only file that needs a package to draw with: pip install matplotlib.

    python assets/figures.py --checkpoint out/ckpt.pt
    python assets/figures.py --bench bench.csv

The README's picture of the page, assets/page.png, is Chromium's, 1000 pixels wide, of the same text:

    python sample.py --attention page.html --prompt "$(python assets/figures.py --text)"
    chromium --headless --hide-scrollbars --virtual-time-budget=4000 --window-size=1000,990 \\
        --screenshot=assets/page.png "file://$PWD/page.html#layer=1&head=2&token=96"
"""
import csv
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.common import Parser, encoding, fail
from data.engine import load_checkpoint
from sample import pictures

TEXT = """\
class Table:
    def __init__(self, rows):
        self.rows = rows

    def line(self, i):
        return self.rows[i]"""
# the page's shades: lightness only falls from the first to the last
STOPS = "#f6f5e6", "#cfe3b4", "#86c7a4", "#3f9fa6", "#2b6d9d", "#27397c", "#160f3f"


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", default="out/ckpt.pt", help="of a model with SEA attention")
    parser.add_argument("--layer", type=int, default=1, help="the layer to draw")
    parser.add_argument("--head", type=int, default=2, help="the head to draw")
    parser.add_argument("--text", action="store_true", help="print the text and draw nothing")
    parser.add_argument("--bench", help="a CSV of tests/bench.py: draw speed.png and nothing else")
    parser.add_argument("--query-block", type=int, default=16, help="M of SEA in speed.png")
    return parser.parse_args()


def draw(estimate, mask, used, dense, block, path):
    """Four panels (T, T) side by side; white is what a query cannot see or, at first, does not estimate."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    query, key = torch.arange(len(mask))[:, None], torch.arange(len(mask))
    used_keys, kept = mask.sum(-1).mean(), (dense * mask).sum(-1).mean()
    past, seen = key < query // block * block, key <= query
    panels = [("1  estimate", "a cheap guess, by cells", estimate, past),
              ("2  select", f"{used_keys:.0f} of {(len(mask) + 1) / 2:.0f} keys per query", mask, seen),
              ("3  attend", "softmax over those keys", used, seen),
              ("dense, to compare", f"{100 * kept:.0f} % of it is on those keys", dense, seen)]
    plt.rcParams.update({"font.size": 11, "axes.edgecolor": "#888888"})
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.5), sharey=True, layout="constrained")
    for axis, (title, note, picture, shown) in zip(axes, panels):
        image = axis.imshow(picture.masked_fill(~shown, torch.nan), norm=PowerNorm(1 / 3, 0, 1),
                            cmap=LinearSegmentedColormap.from_list("sea", STOPS), interpolation="nearest")
        axis.set_title(title, fontsize=14, fontweight="bold", loc="left", pad=23)
        axis.text(0, 1.03, note, transform=axis.transAxes)
        axis.set(xlabel="key", xticks=range(0, len(mask), 50), yticks=range(0, len(mask), 50))
    axes[0].set_ylabel("query")
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.01, 0.1, 1], shrink=0.7, pad=0.015)
    bar.ax.set_yticklabels(["0", "1 %", "10 %", "100 %"])
    figure.savefig(path, dpi=160)


def curves(path, query_block, kind):
    """One kind of pass in a CSV of tests/bench.py: {name: {T: (ms, MiB or None)}}, dense attention first."""
    found, number = {}, lambda text: float(text) if text[:1].isdigit() else None
    for row in csv.DictReader(open(path, newline="")):
        dense, sea = row["what"].startswith(("SDPA", "materialised")), row["what"] == "operator"
        if row["pass"] != kind or not (dense or sea and row["M"] == str(query_block)):
            continue
        name = row["what"] if dense else f"SEA, {row['keys_per_query']} keys, W {row['map_width']}"
        if number(row["ms"]) is not None:
            found.setdefault(name, {})[int(row["T"])] = number(row["ms"]), number(row["MiB"])
    return dict(sorted(found.items(), key=lambda item: item[0].startswith("SEA")))


def crossing(ours, theirs):
    """Where the first falls below the second, {T: ms} both: (T, ms) on a line in logarithms."""
    gap = {T: math.log(ours[T] / theirs[T]) for T in sorted(ours) if T in theirs}
    for low, high in zip(gap, list(gap)[1:]):
        if gap[low] > 0 >= gap[high]:
            part = gap[low] / (gap[low] - gap[high])
            return low * (high / low) ** part, theirs[low] * (theirs[high] / theirs[low]) ** part


def draw_curves(axis, lines, colors):
    """{name: {T: value}} on logarithmic axes."""
    for name, values in lines.items():
        axis.plot(*zip(*sorted(values.items())), "o-", ms=4, color=colors[name], label=name)
    ticks = sorted({T for values in lines.values() for T in values})
    axis.set_xscale("log", base=2)
    axis.set(yscale="log", xlabel="T, tokens")
    axis.set_xticks(ticks, [f"{T // 1024}k" if T >= 1024 else T for T in ticks])
    axis.grid(alpha=0.3)


def draw_speed(forward, with_backward, path):
    """Time and memory over T, with a ring where SEA becomes quicker than the quickest dense attention."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 11, "axes.edgecolor": "#888888"})
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    shades = {True: iter(2 * [STOPS[3], STOPS[5], STOPS[2]]), False: iter(["#9a9a9a", "#5c5c5c", "#c9a227"])}
    colors = {name: next(shades[name.startswith("SEA")]) for name in forward}
    for axis, found in zip(axes, (forward, with_backward)):
        times = {name: {T: ms for T, (ms, _) in line.items()} for name, line in found.items()}
        dense = [line for name, line in times.items() if name.startswith("SDPA")]
        best = {T: min(line[T] for line in dense if T in line) for T in set().union(*dense)}
        draw_curves(axis, times, colors)
        for name, line in times.items():
            if name.startswith("SEA") and (point := crossing(line, best)):
                axis.plot(*point, "o", ms=13, mfc="none", mec=colors[name])
                axis.annotate(f"{point[0] / 1024:.0f}k", point, (8, -14), textcoords="offset points",
                              color=colors[name])
    memory = {name: {T: mib for T, (_, mib) in line.items() if mib} for name, line in forward.items()}
    draw_curves(axes[2], memory, colors)
    titles = "forward, ms", "forward + backward, ms", "forward: memory above the inputs, MiB"
    for axis, title in zip(axes, titles):
        axis.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=160)


def main():
    args = parse_arguments()
    if args.text:
        return print(TEXT)
    if args.bench:
        path = Path(__file__).resolve().parent / "speed.png"
        draw_speed(*(curves(args.bench, args.query_block, kind) for kind in ("forward", "fwd + bwd")), path)
        return print(path)
    model, rest = load_checkpoint(args.checkpoint, "cpu")
    config = model.eval().config
    if config.attention != "sea" or args.layer >= config.n_layer or args.head >= config.n_head:
        fail(f"{args.checkpoint} has {config.n_layer} layers and {config.n_head} heads of {config.attention} "
             "attention; give a --layer and a --head of a model with SEA")
    idx = torch.tensor([encoding(rest["tokenizer"]).encode_ordinary(TEXT)[:config.context]])
    panels = [picture[args.head] for picture in list(pictures(model, idx))[args.layer]]
    path = Path(__file__).resolve().parent / "sea.png"
    draw(*panels, config.query_block, path)
    print(f"{path}: layer {args.layer}, head {args.head}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
