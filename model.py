"""
The OPT decoder (Zhang et al., 2022), from scratch: learned positions with OPT's offset of 2, pre-norm blocks
with biases (opt-350m: post-norm), ReLU MLP, final LayerNorm, output tied to the token embedding. Module names
are those of the published weights, which OPT.from_pretrained reads.

OPTConfig.attention names the attention: sea, or what it is compared with: dense, performer, window.
"""
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from data import hub
from sea import (Cache, SEAConfig, SEAttention, attend_rows, kernel_attention, orthogonal_features,
                 sinusoids)

POSITION_OFFSET = 2      # OPT keeps rows 0 and 1 of its position table for padding


@dataclass
class OPTConfig:
    vocab_size: int = 256
    context: int = 2048          # T, tokens that the model can look at
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    attention: str = "sea"       # sea, dense, performer or window
    map_width: int = SEAConfig.map_width
    keys_per_query: int = SEAConfig.keys_per_query
    query_block: int = SEAConfig.query_block
    num_features: int = SEAConfig.num_features
    cell_keys: bool = SEAConfig.cell_keys
    post_norm: bool = False      # opt-350m: LayerNorm after each residual sum, and none at the end
    token_embd: int = 0          # E, width of the token embedding where it is not n_embd (opt-350m: 512)

    def __post_init__(self):
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention is {self.attention!r}; choose one of {', '.join(ATTENTIONS)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if min(self.vocab_size, self.context, self.n_layer) < 1:
            raise ValueError("vocab_size, context and n_layer must be 1 or more")
        self.sea()

    def sea(self):
        return SEAConfig(self.n_head, self.n_embd // self.n_head, self.map_width, self.keys_per_query,
                         self.query_block, self.num_features, self.cell_keys)


def attend_one(q, k, v):
    """Dense attention of one query, as in decoding; not by cuDNN, which would make a plan for each new T."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)


class DenseAttention(nn.Module):
    def __init__(self, config):
        super().__init__()

    def forward(self, q, k, v, teacher=None, cache=None):
        R, T = q.shape[2], k.shape[2]
        if R == 1:
            return attend_one(q, k, v)
        if R < T:
            return attend_rows(q, k, v, lambda rows: rows[:, None] >= torch.arange(T, device=q.device))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)


class PerformerAttention(nn.Module):
    """The kernel attention inside SEA's estimator, used as the attention itself."""

    def __init__(self, config):
        super().__init__()
        D = config.n_embd // config.n_head
        self.register_buffer("omega", orthogonal_features(D, config.num_features))

    def forward(self, q, k, v, teacher=None, cache=None):
        cache, R = cache or Cache(), q.shape[2]
        out, *cache.sums = kernel_attention(q, k[:, :, -R:], [v[:, :, -R:]], self.omega, *cache.sums)
        return out.to(v.dtype)


class WindowAttention(nn.Module):
    """The first FIRST tokens and the last ones: as many keys per query as SEA has, chosen by position alone.
    It is computed as masked dense attention: a yardstick for quality, not for speed."""
    FIRST = 4

    def __init__(self, config):
        super().__init__()
        own_block = (config.query_block + 1) // 2    # SEA's query also sees its own block: M/2 on average
        self.last = max(1, config.keys_per_query + own_block - self.FIRST)

    def allowed(self, rows, T):
        """The keys that `rows` (R,) attend to: (R, T) bool."""
        t, j = rows[:, None], torch.arange(T, device=rows.device)
        return (j <= t) & ((j > t - self.last) | (j < self.FIRST))

    def forward(self, q, k, v, teacher=None, cache=None):
        if q.shape[2] == 1:                           # in decoding the keys between are not even read
            ends = lambda x: torch.cat([x[:, :, :self.FIRST], x[:, :, self.FIRST:][:, :, -self.last:]], 2)
            return attend_one(q, ends(k), ends(v))
        return attend_rows(q, k, v, lambda rows: self.allowed(rows, k.shape[2]))


ATTENTIONS = {"sea": lambda config: SEAttention(config.sea()), "dense": DenseAttention,
              "performer": PerformerAttention, "window": WindowAttention}


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.scale = config.n_head, (config.n_embd // config.n_head) ** -0.5
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(config.n_embd, config.n_embd)
                                                                for _ in range(4))
        self.attention = ATTENTIONS[config.attention](config)

    def forward(self, x, teacher=None, cache=None):
        q, k, v = self.q_proj(x) * self.scale, self.k_proj(x), self.v_proj(x)                 # B T C
        q, k, v = (y.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for y in (q, k, v))     # B H T D
        if cache is not None:                         # q stays the last R of T rows
            k, v = cache.extend("k", k), cache.extend("v", v)                                 # B H T D
        elif teacher is None and self.training:       # from scratch, the model's own attention is its teacher
            teacher = q, k
        y = self.attention(q, k, v, teacher, cache=cache)                                     # B H R D
        return self.out_proj(y.transpose(1, 2).flatten(2))                                    # B T C


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.post_norm = config.post_norm
        self.self_attn_layer_norm = nn.LayerNorm(config.n_embd)
        self.self_attn = SelfAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.n_embd)
        self.fc1 = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.fc2 = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x, teacher=None, cache=None):
        mlp = lambda x: self.fc2(F.relu(self.fc1(x)))
        if self.post_norm:
            x = self.self_attn_layer_norm(x + self.self_attn(x, teacher, cache))
            return self.final_layer_norm(x + mlp(x))
        x = x + self.self_attn(self.self_attn_layer_norm(x), teacher, cache)
        return x + mlp(self.final_layer_norm(x))


class OPT(nn.Module):
    """OPT(config)(idx, targets=None) -> logits, loss: ids (B, T) int64 -> (B, T, V), nats per token.

    teacher: for each layer the (q, k) that a SEA layer's estimate should match, see SEAttention.
    cache: from new_cache, holds the tokens before idx, and idx afterwards; for use under torch.no_grad.
    """

    def __init__(self, config):
        super().__init__()
        C, E = config.n_embd, config.token_embd or config.n_embd
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, E)
        self.project_in = nn.Identity() if E == C else nn.Linear(E, C, bias=False)
        self.embed_positions = nn.Embedding(config.context + POSITION_OFFSET, C)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_layer_norm = nn.Identity() if config.post_norm else nn.LayerNorm(C)
        self.project_out = nn.Identity() if E == C else nn.Linear(C, E, bias=False)
        self.init_weights()

    def init_weights(self):
        """GPT-2's: normal(0.02), what ends on the residual stream over sqrt(2 n_layer). SEA keeps its own.

        Positions start as sinusoids and are learned from there: each of thousands of rows gets a gradient
        from one token per window, so from noise it takes long until attention knows which tokens are near.
        """
        for name, p in self.named_parameters():
            if ".attention." in name or "layer_norm" in name:
                continue
            if name == "embed_positions.weight":
                p.data.copy_(0.05 * sinusoids(0, p))         # std 0.035, somewhat above the tokens'
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            else:
                residual = name.endswith(("out_proj.weight", "fc2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)

    def forward(self, idx, targets=None, teacher=None, cache=None):
        past, room = (cache[0].T, cache[0].room) if cache else (0, self.config.context)
        T = past + idx.shape[1]
        if T > room:
            raise ValueError(f"{T} tokens do not fit in this model's context, which has room for {room}")
        position = torch.arange(past, T, device=idx.device) + POSITION_OFFSET
        x = self.project_in(self.embed_tokens(idx)) + self.embed_positions(position)          # B R C
        none = [None] * len(self.layers)
        for block, queries_keys, kept in zip(self.layers, teacher or none, cache or none):
            x = block(x, queries_keys, kept)
        for kept in cache or []:
            kept.T = T
        x = self.project_out(self.final_layer_norm(x))                                        # B T E
        logits = F.linear(x, self.embed_tokens.weight)                                        # B T V
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @classmethod
    def from_pretrained(cls, name_or_folder, attention="dense", context=None, url=None, **sea):
        """Published weights, in float32: those in a folder of the hub's format, or those of facebook/opt-125m
        (-350m, -1.3b, -2.7b, -6.7b), downloaded once, to ~/.cache/nanosea/NAME. A mistake is a ValueError.

        context: see set_context; None is the file's. url: address of the files, if not the hub's. sea: fields
        of OPTConfig from map_width to cell_keys; what `attention` adds to the file keeps its initial values.
        """
        find = lambda file: hub.model_file(name_or_folder, file, url)
        config = OPTConfig(attention=attention, **hub.read_shape(find("config.json")), **sea)
        with torch.device("meta"):                 # no memory, time or random numbers for what the file holds
            model = cls(config)
        for block in model.layers:
            block.self_attn.attention = ATTENTIONS[attention](config)
        shapes = {name: tuple(p.shape) for name, p in model.state_dict().items() if ".attention." not in name}
        sharded = name_or_folder == "facebook/opt-6.7b" or (Path(name_or_folder) / hub.INDEX).is_file()
        model.load_state_dict(hub.read_weights(find, sharded, shapes), strict=False, assign=True)
        if context is not None:
            model.set_context(context)
        return model

    def set_context(self, context):
        """Change T: a longer table of positions is the old one interpolated, a shorter one its first rows."""
        table, old = self.embed_positions.weight.data, self.config.context                    # 2+T C
        self.config = replace(self.config, context=context)
        if context > old:
            print(f"positions: the {old} learned ones are interpolated linearly to {context}")
            rows = F.interpolate(table[None, POSITION_OFFSET:].mT, context, mode="linear", align_corners=True)
            table = torch.cat([table[:POSITION_OFFSET], rows[0].T])
        table = table[:POSITION_OFFSET + context].clone()
        self.embed_positions = nn.Embedding.from_pretrained(table, freeze=False)

    def attention_kl(self):
        """Mean over layers of the distance from estimate to teacher in the last forward; 0 without SEA."""
        kls = [block.self_attn.attention.kl for block in self.layers if self.config.attention == "sea"]
        return sum(kls) / len(kls) if kls else self.embed_tokens.weight.new_zeros(())

    def set_keys_per_query(self, keys_per_query):
        """Let SEA select more or fewer keys from now on; no weight depends on how many."""
        if self.config.attention != "sea":
            raise ValueError(f"{self.config.attention} attention selects no keys")
        self.config = replace(self.config, keys_per_query=keys_per_query)
        for block in self.layers:
            block.self_attn.attention.config = self.config.sea()

    def new_cache(self, room=math.inf):
        """An empty cache for `room` tokens, or for the context if that is less: one sea.Cache a layer."""
        return [Cache(min(room, self.config.context)) for _ in self.layers]

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, ids=None):
        """Sample the tokens after idx (B, T), one (B, 1) at a time; temperature 0 takes the likeliest.

        When the context is full, the model starts again from the last half of it, read as a new prompt.
        ids: those to choose from; OPT has more rows in its vocabulary than its tokenizer has tokens.
        """
        context, text = self.config.context, [idx]
        cache, new = self.new_cache(idx.shape[1] + max_new_tokens), idx[:, -context:]
        for _ in range(max_new_tokens):
            if cache[0].T == context:
                new = torch.cat(text, 1)[:, -max(1, context // 2):]
                cache, text = self.new_cache(), [new]
            logits = self(new, cache=cache)[0][:, -1].float()                                 # B V
            if ids is not None:
                logits = torch.full_like(logits, -torch.inf).index_copy(1, ids, logits[:, ids])
            if top_k is not None:
                logits[logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]] = -torch.inf
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)                                         # B 1
            else:
                new = torch.multinomial((logits / temperature).softmax(-1), 1)                # B 1
            text.append(new)
            yield new

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Ids (B, T) -> (B, T + max_new_tokens), sampled by stream."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k)], 1)


class Trace:
    """What each layer of a model computes while this is open: its hidden states and its attention's output,
    (B, T, C), and what it attends with: the module, q, k and v (B, H, T, D)."""

    def __init__(self, model):
        self.model, self.hidden, self.outputs, self.attended = model, [], [], []

    def __enter__(self):
        keep = lambda where: lambda module, args, out: where.append(out)
        self.hooks = []
        for block in self.model.layers:
            self.hooks += [block.register_forward_hook(keep(self.hidden)),
                           block.self_attn.register_forward_hook(keep(self.outputs)),
                           block.self_attn.attention.register_forward_pre_hook(
                               lambda module, args: self.attended.append((module, *args[:3])))]
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
