"""
The page of sample.py --page: assets/attention.html with a text and the attention of every head.

A share of attention is a byte in it, a step of a scale of cube roots, which keeps 1 % and 2 % well
apart. Few keys have a share worth a step: a page holds where those are, and their bytes.
"""
import base64
import codecs
import json
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import sea
from data.common import write_whole

TEMPLATE = Path(__file__).resolve().parent / "attention.html"
MOST_TOKENS = 1024      # in a page, which holds T x T numbers of each head
ROOM = 1_950_000        # bytes of pictures in a page, so that it can be mailed
SMALL = 32              # pixels of a thumbnail's side
STEPS = 127             # of a scale, the most that leave a bit of the byte
# Steps, the least share that is kept, and the layers, each or each second ..: the first that fits.
DETAILS = ((STEPS, 0.001, 1), (31, 0.01, 1), (15, 0.02, 1), (15, 0.03, 1), (15, 0.04, 1),
           (15, 0.05, 1), (15, 0.03, 2), (15, 0.05, 2), (15, 0.03, 4), (15, 0.05, 4),
           (15, 0.05, 8), (15, 0.05, 999))


@torch.no_grad()
def pictures(model, idx):
    """For each layer, of one sequence idx (1, T): the estimate, the mask, the attention used and
    the dense attention of the same q and k, (H, T, T) each; the first look."""
    c = model.config
    past = torch.ones(idx.shape[1], idx.shape[1], dtype=torch.bool, device=idx.device).tril()
    for q, k in [(layer.q, layer.k) for layer in model(idx, trace=True).trace]:
        shown = sea.estimated_attention(q, k, c.block_size, c.keys_per_query, c.coarse)
        dense = sea.attention_to(past, q * c.head_dim ** -0.5, k)
        look = first_look(q, k, c.block_size, c.keys_per_query, c.coarse)
        yield [picture[0].float().cpu() for picture in (*shown, dense, look)]


def first_look(q, k, block_size, keys_per_query, coarse):
    """The estimate of coarse blocks, 2 more where they are looked into, (1, H, T, T // wide); of a
    text so short that SEA skips this look, (1, H, T, 0)."""
    T = k.shape[2]
    wide = block_size * coarse
    n_wide = sea.budgets(block_size, keys_per_query, coarse)[1]
    if T // wide <= n_wide + 2:
        return q.new_zeros(*q.shape[:3], 0)
    scores = sea.block_scores(q * q.shape[3] ** -0.5, sea.moments(k, wide), wide)
    return scores.softmax(-1).nan_to_num(0) + 2 * sea.select(scores, wide, n_wide)


def on_scale(share, steps=STEPS, least=0):
    """Bytes 0 to steps; shares below least become 0."""
    return (steps * share.masked_fill(share < least, 0) ** (1 / 3)).round().byte()


def compress(*parts):
    """Each part with a code of its own, as text."""
    deflate = zlib.compressobj(strategy=zlib.Z_RLE)      # only runs repeat in these
    packed = [deflate.compress(part) + deflate.flush(zlib.Z_FULL_FLUSH) for part in parts]
    return base64.b64encode(b"".join(packed) + deflate.flush()).decode()


def sparse(picture):
    """Bytes (T, width) as a bit for each, whether it is above 0, then those bytes that are. A key
    that matters does so to many queries: by columns it takes less."""
    columns = picture.T.numpy()
    return np.packbits(columns > 0).tobytes(), columns[columns > 0].tobytes()


def shares(estimate, mask, used, dense, look, block_size):
    """What a page shows of a head: of T queries the attention that SEA missed, of T x W blocks the
    estimate, 2 more where they are chosen, of T x T keys the attention that is used or, outside the
    mask, was missed, and the first look."""
    first_keys = slice(0, len(mask) // block_size * block_size, block_size)
    missed = dense * (1 - mask)
    blocks = block_size * estimate[:, first_keys] + 2 * mask[:, first_keys]
    return missed.sum(-1), blocks, (used + missed).half(), look


def pack(missed, blocks, keys, look, steps, least):
    """A head's shares as text: bytes, 128 more where something is chosen."""
    parts = [on_scale(missed).numpy()]
    for picture in (blocks, keys.float(), look):
        parts += sparse(on_scale(picture % 2, steps, least) + 128 * (picture >= 2).byte())
    return compress(*parts)


def pack_what_fits(layers, room):
    """Layers {number: its heads' shares} -> {number: its heads, packed}, the steps, the least."""
    for steps, least, stride in DETAILS:
        packed = {i: [pack(*head, steps, least) for head in layers[i]]
                  for i in list(layers)[::stride]}
        if sum(len(head) for heads in packed.values() for head in heads) <= room:
            break
    return packed, steps, least


def thumbnails(mask, dense):
    """Heads (H, T, T) as small pictures of their peaks, 128 more where SEA missed the peak."""
    peaks = torch.stack((dense * mask, dense * (1 - mask)))
    used, missed = F.adaptive_max_pool2d(peaks, SMALL)               # (H, SMALL, SMALL)
    return on_scale(torch.maximum(used, missed)) + 128 * (missed > used).byte()


def texts_of(tokens):
    """The text of each token; of a character that several make, the last has it, others none."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="backslashreplace")
    texts = [decoder.decode(token) for token in tokens]
    texts[-1] += decoder.decode(b"", final=True)
    return texts


def write_page(model, enc, idx, path, layers):
    """Put the text and the attention of all heads into a copy of the template: one file for all."""
    c = model.config
    wanted, glance = {}, []
    for i, layer in enumerate(pictures(model, idx)):
        glance.append(thumbnails(layer[1], layer[3]))
        if i in (layers or range(c.n_layer)):
            wanted[i] = [shares(*head, c.block_size) for head in zip(*layer)]

    glance = compress(torch.stack(glance).numpy())
    packed, steps, least = pack_what_fits(wanted, ROOM - len(glance))
    tokens = texts_of([enc.decode_single_token_bytes(i) for i in idx[0].tolist()])
    n, _ = sea.budgets(c.block_size, c.keys_per_query)
    data = dict(tokens=tokens, block_size=c.block_size, n=n,
                coarse=c.coarse, n_coarse=layer[4].shape[-1], steps=steps, least=least,
                count=c.n_layer, heads=c.n_head, glance=glance, layers=packed)
    data = json.dumps(data).replace("<", "\\u003c")              # no text can end the page's script
    page = TEMPLATE.read_text(encoding="utf-8").replace("PAGE_DATA", data).encode()
    write_whole(path, page)
    others = f"of 0 to {c.n_layer - 1}; --layers chooses others" if len(packed) < c.n_layer else ""
    print(f"{path}: {len(tokens)} tokens, {len(page) / 1e6:.2f} MB, no shares below {least:.1%};",
          "layers", *packed, others)
