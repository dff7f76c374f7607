"""The page of sample.py --page: assets/attention.html with a text and the attention of all heads."""
import base64
import codecs
import json
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F

import sea
from data.common import write_whole

TEMPLATE = Path(__file__).resolve().parent / "attention.html"
ROOM = 1_800_000        # bytes of heads in a page, so that it can be mailed
LEAST = 0.001, 0.01     # shares that a page shows, from the first of these that lets all heads fit
MOST_TOKENS = 512       # in a page, which holds T x T numbers of each head
SMALL = 32              # pixels of a thumbnail's side


@torch.no_grad()
def pictures(model, idx):
    """For each layer, of one sequence idx (1, T): the estimate, the mask, the attention used and
    the dense attention of the same q and k, (H, T, T) each."""
    c = model.config
    for q, k in [(layer.q, layer.k) for layer in model(idx, trace=True).trace]:
        shown = sea.estimated_attention(q, k, c.block_size, c.keys_per_query, c.coarse)
        # With a budget of all keys it is dense.
        dense = sea.estimated_attention(q, k, c.block_size, idx.shape[1], c.coarse)[2]
        yield [picture[0].float() for picture in (*shown, dense)]


def shades(share, most=255, least=0):
    """Bytes of shares: the cube root keeps 1 % and 2 % well apart. Those below least become 0."""
    return (most * share.masked_fill(share < least, 0) ** (1 / 3)).round().byte()


def compress(content):
    return base64.b64encode(zlib.compress(content.cpu().numpy())).decode()


def pack(estimate, mask, used, dense, block_size, least):
    """What a page holds of a head: of T queries the attention that SEA missed, of T x W blocks the
    estimate, 128 more where they are chosen, of T x T keys the attention that is used or, outside
    the mask, was missed."""
    first_keys = slice(0, len(mask) // block_size * block_size, block_size)
    blocks = shades(block_size * estimate[:, first_keys], 127, least)
    blocks += 128 * mask[:, first_keys].byte()
    missed = dense * (1 - mask)
    keys = shades(used + missed, 255, least)
    return compress(torch.cat((shades(missed.sum(-1)), blocks.flatten(), keys.flatten())))


def thumbnails(mask, dense):
    """Heads (H, T, T) as small pictures of their peaks, 128 more where SEA missed the peak."""
    peaks = torch.stack((dense * mask, dense * (1 - mask)))
    used, missed = F.adaptive_max_pool2d(peaks, SMALL)               # (H, SMALL, SMALL)
    return shades(torch.maximum(used, missed), 127) + 128 * (missed > used).byte()


def layers_that_fit(sizes):
    """All layers or, evenly from first to last, as many as there is room for, one at least."""
    for count in range(len(sizes), 0, -1):
        layers = torch.linspace(0, len(sizes) - 1, count).round().long().tolist()
        if sum(sizes[i] for i in layers) <= ROOM:
            break
    return layers


def texts_of(tokens):
    """The text of each token; of a character that several make, the last has it, others none."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="backslashreplace")
    texts = [decoder.decode(token) for token in tokens]
    texts[-1] += decoder.decode(b"", final=True)
    return texts


def write_page(model, enc, idx, path, layers):
    """Put the text and the attention of all heads into a copy of the template: one file for all."""
    c = model.config
    for least in LEAST:
        heads, glance = [], []
        for layer in pictures(model, idx):
            heads.append([pack(*head, c.block_size, least) for head in zip(*layer)])
            glance.append(thumbnails(layer[1], layer[3]))
        sizes = [len("".join(heads[i])) for i in layers or range(c.n_layer)]
        if sum(sizes) <= ROOM:
            break
    layers = sorted(set(layers or layers_that_fit(sizes)))
    tokens = texts_of([enc.decode_single_token_bytes(i) for i in idx[0].tolist()])
    data = dict(tokens=tokens, block_size=c.block_size, n=max(1, c.keys_per_query // c.block_size),
                least=least, count=c.n_layer, heads=c.n_head, glance=compress(torch.stack(glance)),
                layers={i: heads[i] for i in layers})
    data = json.dumps(data).replace("<", "\\u003c")              # no text can end the page's script
    page = TEMPLATE.read_text(encoding="utf-8").replace("PAGE_DATA", data).encode()
    write_whole(path, page)
    size = f"{len(tokens)} tokens, {len(page) / 1e6:.2f} MB"
    others = f"of 0 to {c.n_layer - 1}; --layers chooses others" if len(layers) < c.n_layer else ""
    print(f"{path}: {size}, layers", *layers, others)
