"""
The OPT decoder (Zhang et al., 2022), from scratch: learned positions with OPT's offset of 2, pre-norm blocks with
biases, ReLU MLP, final LayerNorm, output tied to the token embedding. Module names are those of the published weights.

OPTConfig.attention names the attention: sea, or what it is compared with: dense, performer, window.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from sea import SEAConfig, SEAttention, attend_rows, kernel_attention, orthogonal_features

POSITION_OFFSET = 2      # OPT keeps rows 0 and 1 of its position table for padding


@dataclass
class OPTConfig:
    vocab_size: int = 256
    context: int = 2048          # T, tokens that the model can look at
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    attention: str = "sea"       # sea, dense, performer or window
    map_width: int = 256         # the rest as in SEAConfig
    keys_per_query: int = 64
    query_block: int = 16
    num_features: int = 64
    cell_keys: bool = True

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


class DenseAttention(nn.Module):
    def __init__(self, config):
        super().__init__()

    def forward(self, q, k, v, teacher=None):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)


class PerformerAttention(nn.Module):
    """The kernel attention inside SEA's estimator, used as the attention itself."""

    def __init__(self, config):
        super().__init__()
        self.register_buffer("omega", orthogonal_features(config.n_embd // config.n_head, config.num_features))

    def forward(self, q, k, v, teacher=None):
        return kernel_attention(q, k, v, self.omega)


class WindowAttention(nn.Module):
    """The first FIRST tokens and the last ones: as many keys a query as SEA has, chosen by position alone."""
    FIRST = 4

    def __init__(self, config):
        super().__init__()
        own_block = (config.query_block + 1) // 2          # SEA's query also attends to its own block: M/2 on average
        self.last = max(1, config.keys_per_query + own_block - self.FIRST)

    def forward(self, q, k, v, teacher=None):
        j = torch.arange(k.shape[2], device=k.device)
        near = lambda t: (j <= t) & ((j > t - self.last) | (j < self.FIRST))
        return attend_rows(q, k, v, lambda rows: near(rows[:, None]))


ATTENTIONS = {"sea": lambda config: SEAttention(config.sea()), "dense": DenseAttention,
              "performer": PerformerAttention, "window": WindowAttention}


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.scale = config.n_head, (config.n_embd // config.n_head) ** -0.5
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(config.n_embd, config.n_embd)
                                                                for _ in range(4))
        self.attention = ATTENTIONS[config.attention](config)

    def forward(self, x, teacher=None):
        q, k, v = self.q_proj(x) * self.scale, self.k_proj(x), self.v_proj(x)                 # B T C
        q, k, v = (y.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for y in (q, k, v))     # B H T D
        if teacher is None and self.training:              # from scratch, the model's own attention is its teacher
            teacher = q.detach(), k.detach()
        y = self.attention(q, k, v, teacher)                                                  # B H T D
        return self.out_proj(y.transpose(1, 2).flatten(2))                                    # B T C


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.n_embd)
        self.self_attn = SelfAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.n_embd)
        self.fc1 = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.fc2 = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x, teacher=None):
        x = x + self.self_attn(self.self_attn_layer_norm(x), teacher)
        return x + self.fc2(F.relu(self.fc1(self.final_layer_norm(x))))


class OPT(nn.Module):
    """OPT(config)(idx, targets=None) -> (logits, loss): token ids (B, T) int64 -> (B, T, vocab_size), nats a token."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.embed_positions = nn.Embedding(config.context + POSITION_OFFSET, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_layer_norm = nn.LayerNorm(config.n_embd)
        self.init_weights()

    def init_weights(self):
        """GPT-2's: normal(0.02), and what ends on the residual stream smaller by sqrt(2 n_layer). SEA keeps its own."""
        for name, p in self.named_parameters():
            if ".attention." in name or "layer_norm" in name:
                continue
            if name.endswith("bias"):
                nn.init.zeros_(p)
            else:
                residual = name.endswith(("out_proj.weight", "fc2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)

    def forward(self, idx, targets=None):
        B, T = idx.shape
        if T > self.config.context:
            raise ValueError(f"{T} tokens do not fit in this model's context of {self.config.context}")
        position = torch.arange(T, device=idx.device) + POSITION_OFFSET
        x = self.embed_tokens(idx) + self.embed_positions(position)                           # B T C
        for block in self.layers:
            x = block(x)
        logits = F.linear(self.final_layer_norm(x), self.embed_tokens.weight)                 # B T V
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def attention_kl(self):
        """Mean over the layers of the distance between estimate and teacher in the last forward; 0 without SEA."""
        kls = [block.self_attn.attention.kl for block in self.layers if self.config.attention == "sea"]
        return sum(kls) / len(kls) if kls else torch.zeros(())
