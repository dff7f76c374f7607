"""
Two decoders, from scratch, under one class: OPT (arXiv 2205.01068) and Llama (arXiv 2302.13971).

    opt     learned positions with OPT's offset of 2, LayerNorm, biases, ReLU
    llama   rotary positions, RMSNorm, SwiGLU, key heads that query heads share, no biases

Parameter names are those of the published weights, which Transformer.from_pretrained reads. The
attention is sea, the paper's own estimator, or what these are compared with: dense, performer,
window.
"""
import math
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import sea
from data import hub

POSITION_OFFSET = 2      # OPT keeps rows 0 and 1 of its position table for padding


@dataclass
class Config:
    vocab_size: int = 256
    context: int = 2048          # T, tokens that the model can look at
    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int = 0         # heads of k and v, each shared by n_head / n_kv_head of q; 0: n_head
    n_embd: int = 384
    n_ffn: int = 0               # width of the MLP; 0: 4 n_embd, for llama 8/3 of it
    architecture: str = "opt"    # opt or llama
    post_norm: bool = False      # opt-350m: LayerNorm after each residual sum, and none at the end
    token_embd: int = 0     # E, width of the token embedding where it is not n_embd (opt-350m: 512)
    rope_base: float = 10000.
    norm_eps: float = 1e-5
    tied: bool = True            # the output's matrix is the token embedding
    attention: str = "sea"       # sea, paper, dense, performer or window
    block_size: int = 8
    keys_per_query: int = 48    # beside the first block, the one before the query's own and its own
    coarse: int = 8
    map_width: int = 128         # of paper: columns of its picture of the attention
    num_features: int = 64       # of paper and performer: random features of their kernel attention

    def __post_init__(self):
        for field in fields(self):           # a checkpoint may be damaged, too
            value = getattr(self, field.name)
            if not isinstance(value, (int, float) if field.type is float else field.type):
                raise ValueError(f"{field.name} is {value!r}; it must be {field.type.__name__}")
            least = min(1, field.default) if field.type is int else value    # 0 may be a default
            if value < least:
                raise ValueError(f"{field.name} is {value}; it must be {least} or more")
            known = dict(attention=ATTENTIONS, architecture=BLOCKS).get(field.name)
            if known and value not in known:
                raise ValueError(f"{field.name} is {value!r}; choose one of {', '.join(known)}")

        self.n_kv_head = self.n_kv_head or self.n_head
        if not self.n_ffn:       # SwiGLU has three matrices: as many weights as two of 4 n_embd
            llama = self.architecture == "llama"
            self.n_ffn = -(-self.n_embd * 8 // 96) * 32 if llama else 4 * self.n_embd
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head "
                             f"({self.n_head}), and that of n_kv_head ({self.n_kv_head})")
        if self.architecture == "llama" and self.head_dim % 2:
            raise ValueError(f"a head is {self.head_dim} wide; rotary positions need an even width")
        if self.attention == "paper" and self.map_width % 4:
            raise ValueError(f"map_width is {self.map_width}; it must be a multiple of 4")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head


class Output(NamedTuple):
    logits: torch.Tensor         # (B, T, V)
    loss: torch.Tensor           # nats per token; None without targets
    kl: torch.Tensor             # the estimate's distance to its teacher, if any; mean over layers
    trace: list                  # a Layer for each layer, where asked for


class Layer(NamedTuple):
    hidden: torch.Tensor         # (B, T, C), the layer's output
    attended: torch.Tensor       # (B, T, C), its attention's
    q: torch.Tensor              # (B, H, T, D)
    k: torch.Tensor              # (B, Hkv, T, D), v too
    v: torch.Tensor


# --------------------------------------------------------------------------------------------------
# Kinds of attention: q (B, H, T, D), k and v (B, Hkv, T, D) -> (B, H, T, D), and the distance from
# a teacher's (q, k) that Paper learns by, or None. Some also go on from kept keys and values, by
# new_cache and decode: q (B, H, 1, D) of the token at position (1,) -> (B, H, 1, D)

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def new_cache(self, k, v, room):
        """What decode goes on from; nothing, where a kind has no decode."""


class SEA(Attention):
    def forward(self, q, k, v, teacher=None):
        c = self.config
        return sea.sea_attention(q, k, v, c.block_size, c.keys_per_query, c.coarse), None

    def new_cache(self, k, v, room):
        return sea.Cache(k, v, room, self.config.block_size, self.config.coarse)

    def decode(self, q, cache, position):
        return sea.decode(q, cache, position, self.config.keys_per_query)


class Paper(Attention):
    """SEA by the estimate that the paper learns from teacher, the (q, k) of another attention."""

    def __init__(self, config):
        super().__init__(config)
        self.estimator = sea.PaperEstimator(config.n_head, config.head_dim, config.map_width,
                                            config.num_features)

    def forward(self, q, k, v, teacher=None):
        c = self.config
        scale = c.head_dim ** -0.5
        if teacher is not None:
            teacher = teacher[0] * scale, teacher[1]
        elif self.training:                 # from scratch, the model's own attention is its teacher
            teacher = q * scale, k
        return self.estimator(q * scale, k, v, c.block_size, c.keys_per_query, teacher)


class Dense(Attention):
    def forward(self, q, k, v, teacher=None):
        return self.attend(q, k, v, is_causal=True), None

    def attend(self, q, k, v, **mask):
        shared = q.shape[1] != k.shape[1]      # asked for in vain, it rules out some kernels
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=shared, **mask)

    def new_cache(self, k, v, room):
        return sea.KeysAndValues(k, v, room)

    def decode(self, q, cache, position):
        key = torch.arange(cache.k.shape[2], device=q.device)      # all that there is room for
        return self.attend(q, cache.k, cache.v, attn_mask=self.mask(position, key)[None])

    def mask(self, query, key):
        """Does this query attend to this key? Positions that broadcast -> bool."""
        return key <= query


class Performer(Attention):
    """The paper's kernel attention, the estimator's first part, used as the attention itself."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("omega", sea.orthogonal_features(config.head_dim, config.num_features))

    def forward(self, q, k, v, teacher=None):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        return sea.kernel_attention(q * q.shape[3] ** -0.5, k, v, self.omega).to(v.dtype), None


class Window(Dense):
    """The FIRST and the last tokens, as many as SEA's keys on average: for quality, not speed."""
    FIRST = 4

    def forward(self, q, k, v, teacher=None):
        position = torch.arange(q.shape[2], device=q.device)
        mask = self.mask(position[:, None], position)                       # (T, T)
        return self.attend(q, k, v, attn_mask=mask), None

    def mask(self, query, key):
        S = self.config.block_size
        n, _ = sea.budgets(S, self.config.keys_per_query)
        last = (n + 2) * S + (S + 1) // 2 - self.FIRST       # SEA's blocks, and half of its own one
        return (key <= query) & ((key > query - last) | (key < self.FIRST))


ATTENTIONS = dict(sea=SEA, paper=Paper, dense=Dense, performer=Performer, window=Window)
CHOOSING = "sea", "paper", "window"      # those for which block_size and keys_per_query count


# --------------------------------------------------------------------------------------------------
# Blocks

def rotate(x, rotary):
    """Turn each pair (x_i, x_{i + D/2}) of (B, H, T, D) by its angle, of which rotary (2, T, D)
    holds cos, and sin with the sign of the other's share."""
    cos, sin = rotary                                                # (T, D)
    other = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, other, sin).to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        opt = config.architecture == "opt"
        kv_width = config.n_kv_head * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=opt)
        self.k_proj = nn.Linear(config.n_embd, kv_width, bias=opt)
        self.v_proj = nn.Linear(config.n_embd, kv_width, bias=opt)
        self.out = "out_proj" if opt else "o_proj"                # as the published weights name it
        setattr(self, self.out, nn.Linear(config.n_embd, config.n_embd, bias=opt))
        self.attention = ATTENTIONS[config.attention](config)

    def forward(self, x, rotary=None, teacher=None, cache=None, position=None):
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)        # (B, H, T, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)       # (B, Hkv, T, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if rotary is not None:
            both = rotate(torch.cat((q, k), 1), rotary)              # (B, H + Hkv, T, D)
            q, k = both.split((q.shape[1], k.shape[1]), 1)

        kl = None
        if cache is None:
            y, kl = self.attention(q, k, v, teacher)                 # (B, H, T, D)
        else:                                                        # one token
            cache.append(k, v, position)
            y = self.attention.decode(q, cache, position)            # (B, H, 1, D)
        y = getattr(self, self.out)(y.transpose(1, 2).flatten(2))    # (B, T, C)
        return y, q, k, v, kl


class OPTBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.post_norm = config.post_norm
        self.self_attn_layer_norm = nn.LayerNorm(config.n_embd, config.norm_eps)
        self.self_attn = SelfAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.n_embd, config.norm_eps)
        self.fc1 = nn.Linear(config.n_embd, config.n_ffn)
        self.fc2 = nn.Linear(config.n_ffn, config.n_embd)

    def forward(self, x, *how):          # how: what SelfAttention.forward takes beside x
        if self.post_norm:
            y, *seen = self.self_attn(x, *how)
            x = self.self_attn_layer_norm(x + y)                     # (B, T, C)
            x = self.final_layer_norm(x + self.mlp(x))
        else:
            y, *seen = self.self_attn(self.self_attn_layer_norm(x), *how)
            x = x + y                                                # (B, T, C)
            x = x + self.mlp(self.final_layer_norm(x))
        return x, y, *seen

    def mlp(self, x):
        return self.fc2(F.relu(self.fc1(x)))


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_ffn, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_ffn, bias=False)
        self.down_proj = nn.Linear(config.n_ffn, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, *how):
        y, *seen = self.self_attn(self.input_layernorm(x), *how)
        x = x + y                                                    # (B, T, C)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, y, *seen


BLOCKS = dict(opt=OPTBlock, llama=LlamaBlock)


# --------------------------------------------------------------------------------------------------
# The model

class Transformer(nn.Module):
    """Transformer(config)(idx, targets=None) -> Output, of ids (B, T) int64.

    teacher: for each layer the (q, k) whose attention the paper's estimate should match.
    """

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        E = config.token_embd or C
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, E)
        block = BLOCKS[config.architecture]
        self.layers = nn.ModuleList(block(config) for _ in range(config.n_layer))
        if config.architecture == "opt":
            self.embed_positions = nn.Embedding(config.context + POSITION_OFFSET, C)
            self.project_in = nn.Identity() if E == C else nn.Linear(E, C, bias=False)
            self.project_out = nn.Identity() if E == C else nn.Linear(C, E, bias=False)
            norm = nn.Identity() if config.post_norm else nn.LayerNorm(C, config.norm_eps)
            self.final_layer_norm = norm
        else:
            self.norm = nn.RMSNorm(C, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(E, config.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self):
        """GPT-2's: normal(0.02), what ends on the residual stream over sqrt(2 n_layer).

        OPT's positions start as sinusoids: as each row gets a gradient from one token per window,
        from noise it takes long until attention knows which tokens are near.
        """
        residual = "out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight"
        for name, p in self.named_parameters():
            if ".attention." in name or "norm" in name:
                continue
            if name == "embed_positions.weight":
                p.data.copy_(0.05 * sea.sinusoids(*p.shape, p.device))   # std 0.035
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            else:
                shrink = math.sqrt(2 * self.config.n_layer) if name.endswith(residual) else 1
                nn.init.normal_(p, std=0.02 / shrink)

    def forward(self, idx, targets=None, teacher=None, trace=False):
        x, rotary = self.embed(idx)                                              # (B, T, C)

        kls = []
        layers = []
        for block, queries_keys in zip(self.layers, teacher or [None] * len(self.layers)):
            x, *seen, kl = block(x, rotary, queries_keys)
            if kl is not None:
                kls.append(kl)
            if trace:
                layers.append(Layer(x, *seen))

        logits = self.unembed(x)                                                 # (B, T, V)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return Output(logits, loss, torch.stack(kls).mean() if kls else None, layers)

    def embed(self, idx, position=None):
        """What the first layer gets: (B, T, C), and cos and sin (2, T, D) of rotary positions or
        None. position: of these tokens (T,), 0 to T - 1 if it is not given."""
        T = idx.shape[1]
        if T > self.config.context:
            raise ValueError(f"{T} tokens do not fit in the context of {self.config.context}")
        if position is None:
            position = torch.arange(T, device=idx.device)
        x = self.embed_tokens(idx)                                               # (B, T, E)
        if self.config.architecture == "opt":
            return self.project_in(x) + self.embed_positions(position + POSITION_OFFSET), None
        D = self.config.head_dim
        rate = self.config.rope_base ** (-torch.arange(0, D, 2, device=x.device).float() / D)
        angle = position[:, None] * rate                                         # (T, D/2)
        cos = torch.cat((angle, angle), -1).cos()                                # (T, D)
        sin = torch.cat((-angle, angle), -1).sin()
        return x, torch.stack((cos, sin))

    def unembed(self, x):
        """Logits (B, T, V) of the last layer's output (B, T, C)."""
        if self.config.architecture == "opt":
            x = self.project_out(self.final_layer_norm(x))                       # (B, T, E)
        else:
            x = self.norm(x)
        return F.linear(x, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)

    @classmethod
    def from_pretrained(cls, name_or_folder, attention="dense", context=None, url=None, **settings):
        """Published weights, in float32, from a folder in the hub's format or by name: data/hub.py.

        A mistake is a ValueError. context: see set_context; None is the file's. url: address of the
        files, if not the hub's. settings: further fields of Config.
        """
        find = partial(hub.model_file, name_or_folder, url=url)
        config = Config(**hub.read_config(find("config.json")), attention=attention, **settings)
        with torch.device("meta"):       # no memory, time or random numbers for what the file holds
            model = cls(config)
        for block in model.layers:
            block.self_attn.attention = ATTENTIONS[attention](config)
        shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()
                  if ".attention." not in name}
        model.load_state_dict(hub.read_weights(find, shapes), strict=False, assign=True)
        if context is not None:
            model.set_context(context)
        return model

    def with_attention(self, attention, **settings):
        """A new model of the same weights; what only the new attention has is at its start."""
        config = replace(self.config, attention=attention, **settings)
        model = Transformer(config).to(self.embed_tokens.weight)     # its device and type
        model.load_state_dict(self.state_dict(), strict=False)
        return model

    def set_context(self, context):
        """Change T: fewer of OPT's learned positions are the first, more are interpolated."""
        old = self.config.context
        self.config = replace(self.config, context=context)
        for block in self.layers:
            block.self_attn.attention.config = self.config
        if self.config.architecture == "llama":
            return
        table = self.embed_positions.weight.data                                 # (2 + T, C)
        if context > old:
            print(f"positions: the {old} learned ones are interpolated linearly to {context}")
            rows = table[None, POSITION_OFFSET:].mT
            rows = F.interpolate(rows, context, mode="linear", align_corners=True)
            table = torch.cat((table[:POSITION_OFFSET], rows[0].T))
        table = table[:POSITION_OFFSET + context].clone()
        self.embed_positions = nn.Embedding.from_pretrained(table, freeze=False)

    # ----------------------------------------------------------------------------------------------
    # Generation

    @torch.no_grad()
    def prefill(self, idx, room):
        """Read a prompt (B, T) -> logits of its last token (B, V), caches for `room` tokens."""
        x, rotary = self.embed(idx)
        caches = []
        for block in self.layers:
            x, _, _, k, v, _ = block(x, rotary)
            caches.append(block.self_attn.attention.new_cache(k, v, room))
        return self.unembed(x[:, -1:])[:, 0], caches

    @torch.no_grad()
    def decode(self, idx, position, caches):
        """Read a token (B, 1) at position (1,) -> its logits (B, V). The caches keep it, too."""
        x, rotary = self.embed(idx, position)
        for block, cache in zip(self.layers, caches):
            x = block(x, rotary, None, cache, position)[0]
        return self.unembed(x)[:, 0]

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, ids=None, graph=False):
        """Sample tokens (B, 1) after idx (B, T), one by one; temperature 0 takes the likeliest.

        When the context is full, the model starts again from the last half of it, read as a new
        prompt. ids: those to choose from; OPT has more rows in its vocabulary than its tokenizer
        has tokens. graph: run a step as one CUDA graph; then call it without autocast, whose
        copies of weights do not last.
        """
        if idx.shape[1] == 0:
            raise ValueError("the prompt is empty; give one token at least")
        if not 0 <= temperature < math.inf or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature is {temperature}, top_k {top_k}; the least are 0, and 1")

        choose = partial(sample, temperature=temperature, top_k=top_k, ids=ids)
        context = self.config.context
        cached = hasattr(self.layers[0].self_attn.attention, "decode")
        text = idx[:, -context:]
        while max_new_tokens > 0:
            # Until the context is full; kinds without a cache read the text again for each token.
            count = min(max_new_tokens, context + 1 - text.shape[1]) if cached else 1
            for token in self.continued(text, count, choose, graph):
                if (token < 0).any():
                    raise FloatingPointError("the logits are no numbers: the weights are spoilt")
                text = torch.cat((text, token), 1)
                yield token
            max_new_tokens -= count
            if text.shape[1] > context:
                text = text[:, -max(1, context // 2):]

    def continued(self, text, count, choose, graph):
        """`count` tokens (B, 1) after text (B, T), which is read once."""
        logits, caches = self.prefill(text, text.shape[1] + count - 1)
        token = choose(logits)                                                   # (B, 1)
        position = torch.tensor([text.shape[1]], device=text.device)

        def step():                                 # of constant shapes, and waits for nothing
            token.copy_(choose(self.decode(token, position, caches)))
            position.add_(1)

        yield token.clone()
        for i in range(1, count):
            if i == 2 and graph:                    # the first step has made all kernels ready
                step = captured(step)
            step()
            yield token.clone()

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Ids (B, T) -> (B, T + max_new_tokens), sampled by stream."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k)], 1)


def sample(logits, temperature, top_k=None, ids=None):
    """Choose a token of each row: logits (B, V) -> (B, 1), -1 where the logits are no numbers.

    Nothing here waits for a GPU, so that it can be part of a CUDA graph.
    """
    finite = logits.isfinite().all(-1, keepdim=True)
    logits = logits.double()
    if ids is not None:
        logits = torch.full_like(logits, -torch.inf).index_copy(1, ids, logits[:, ids])
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if temperature > 0:
        # The largest of logits with Gumbel noise is a draw from their softmax. The largest logit
        # becomes 0, so that no temperature, however small, makes infinities of it.
        noise = -torch.empty_like(logits).exponential_().log()
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature + noise
    return logits.argmax(-1, keepdim=True).where(finite, -1)


def captured(step):
    """A function that does on the GPU what step() would do, in one launch. Nothing is run yet."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: NCCL's own thread may call CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay
