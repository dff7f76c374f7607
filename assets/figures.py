"""
Draw the README's figure, assets/sea.png, from a trained model's real matrices. This is the only file that
needs a package to draw with: pip install matplotlib.

    python assets/figures.py --checkpoint out/ckpt.pt

The README's picture of the page, assets/page.png, is Chromium's, 1000 pixels wide, of the same text:

    python sample.py --attention page.html --prompt "$(python assets/figures.py --text)"
    chromium --headless --hide-scrollbars --virtual-time-budget=4000 --window-size=1000,990 \\
        --screenshot=assets/page.png "file://$PWD/page.html#layer=1&head=1&token=112"
"""
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
    parser.add_argument("--head", type=int, default=1, help="the head to draw")
    parser.add_argument("--text", action="store_true", help="print the text and draw nothing")
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


def main():
    args = parse_arguments()
    if args.text:
        return print(TEXT)
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
