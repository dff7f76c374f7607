"""
Make tests/golden: what transformers says of tiny OPTs and Llamas and a small tokenizer, for test_model.py.

    pip install torch numpy transformers tokenizers
    python tests/make_golden.py         # test_model.py runs it too, where transformers is installed

Every folder is in the hub's format. 125m, 350m and 2.7b have the architectures of OPT's models, llama that of
TinyLlama and llama-tied that of SmolLM2 (key heads shared by two and three query heads), random values for all
weights, biases and norms, and expected.pt: ids, logits and hidden states in float32.
"""
import argparse
import json
import random
import sysconfig
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

COMMON = dict(max_position_embeddings=32, pad_token_id=1, bos_token_id=2, eos_token_id=2)
TEXTS = [
    "", "a", " ", "   ", "\n", "\n\n  \n", "\t\ttabs\tand  two spaces ", " leading", "trailing  ", "a\r\nb",
    "Hello, world! It's the student's; they'll see, we've seen, I'd say I'm DON'T.",
    "def f(self, x=None):\n    if x is not None:\n        return [i ** 2 for i in range(10)]\n\n\n# end ----",
    "3.14159 2024-05-07 1000000 0x1F x2y3", "naïve café Straße ½ ² Ångström", "Привет, мир", "日本語のテキスト、漢字",
    "שלום عالم", "emoji 😀👩‍👩‍👧🏽 🇨🇭!",
    "zero\u200bwidth\u00a0no-break\u3000wide\u2028line", "e\u0301 \u0000\u0007\x7f\x85", "=" * 70,
    " " * 200 + "x", "import os, sys", "<|endoftext|> @-@ <unk", "the of and to in is return self None",
]


def tiny(layers, heads, hidden, vocab_size, **rest):
    """A random OPT; its values are rounded to float16, as the hub's are."""
    config = OPTConfig(vocab_size=vocab_size, num_hidden_layers=layers, num_attention_heads=heads,
                       hidden_size=hidden, ffn_dim=4 * hidden, **COMMON, **rest)
    return randomised(OPTForCausalLM(config))


def tiny_llama(layers, heads, kv_heads, hidden, tied):
    config = LlamaConfig(vocab_size=96, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, hidden_size=hidden, intermediate_size=3 * hidden,
                         max_position_embeddings=32, rms_norm_eps=1e-5, tie_word_embeddings=tied,
                         rope_parameters=dict(rope_type="default", rope_theta=100.0 if tied else 10000.0))
    return randomised(LlamaForCausalLM(config))


def randomised(model):
    """Every weight, bias and norm drawn anew, so that each matters, and rounded as the hub's are."""
    for name, p in model.eval().named_parameters():
        start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        std = 0.3 if p.dim() == 1 else 1.5 * p.shape[-1] ** -0.5
        p.data = (start + std * torch.randn(p.shape)).half().float()
    return model


def save(folder, model, prefix="model.decoder.", shards=1, text_ids=()):
    """config.json, the weights in one file or several, and expected.pt."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    weights = {prefix + key.removeprefix("model.decoder."): w.half() for key, w in model.state_dict().items()
               if key != "lm_head.weight"}
    if prefix == "model.decoder.":                         # both kinds of file are on the hub
        weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"]
    file = lambda i: "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
    shard_of = {key: i * shards // len(weights) for i, key in enumerate(weights)}
    for i in range(shards):
        torch.save({key: w for key, w in weights.items() if shard_of[key] == i}, folder / file(i))
    if shards > 1:
        weight_map = {key: file(i) for key, i in shard_of.items()}
        index = json.dumps(dict(metadata={}, weight_map=weight_map))
        (folder / "pytorch_model.bin.index.json").write_text(index)
    save_expected(folder, model, text_ids)


def save_llama(folder, model):
    """config.json and model.safetensors as transformers writes them, and expected.pt."""
    save_expected(folder, model)
    model.half().save_pretrained(folder)
    (folder / "generation_config.json").unlink()


def save_expected(folder, model, text_ids=()):
    folder.mkdir(parents=True, exist_ok=True)
    idx = torch.randint(model.config.vocab_size, (2, 12))
    idx[0, :len(text_ids)] = torch.tensor(text_ids[:12], dtype=torch.long)
    torch.save(dict(idx=idx, **expected(model, idx)), folder / "expected.pt")


@torch.no_grad()
def expected(model, idx):
    """logits (B, T, V), and hidden (layers + 1, B, T, C): what the first layer gets and what each gives."""
    hidden = []
    decoder = getattr(model.model, "decoder", model.model)
    hooks = [decoder.layers[0].register_forward_pre_hook(lambda layer, args, kwargs: hidden.append(
        args[0] if args else kwargs["hidden_states"]), with_kwargs=True)]
    hooks += [layer.register_forward_hook(lambda layer, args, out: hidden.append(
        out if torch.is_tensor(out) else out[0])) for layer in decoder.layers]
    logits = model(idx, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return dict(logits=logits.clone(), hidden=torch.stack(hidden))


def make_tokenizer(folder, merges=300, made_up=3):
    """vocab.json and merges.txt as OPT's: merges of the library's sources and of TEXTS, ids in another order
    than that of the merges, four special tokens in front, and names without a merge at the end."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [(library / name).read_text() for name in ("argparse.py", "heapq.py", "statistics.py")]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(sources + 20 * TEXTS, vocab_size=256 + merges, show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save_model(str(folder))
    tokens = sorted(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    random.Random(0).shuffle(tokens)
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *tokens, *(f"madeupword{i:04}" for i in range(made_up))]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="GPT2Tokenizer", add_bos_token=True, add_prefix_space=False, errors="replace",
        bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>")))
    return len(tokens)


def reference_ids(folder):
    """TEXTS under transformers' tokenizers, fast and slow, which must agree; </s> comes first."""
    fast, slow = (AutoTokenizer.from_pretrained(folder, use_fast=use_fast) for use_fast in (True, False))
    ids = [slow(text)["input_ids"] for text in TEXTS]
    for text, i in zip(TEXTS, ids):
        assert [i[0], *fast(text, add_special_tokens=False)["input_ids"]] == i and i[0] == 2, text
    return ids


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).resolve().parent / "golden")
    parser.add_argument("--scale", type=int, default=1, help="times as many layers and heads (default: 1)")
    args = parser.parse_args()
    torch.manual_seed(args.scale)
    folder, n = args.folder, args.scale
    n_vocab = make_tokenizer(folder / "125m")
    ids = reference_ids(folder / "125m")
    (folder / "125m" / "texts.json").write_text(json.dumps(dict(n_vocab=n_vocab, texts=TEXTS, ids=ids)))
    padded = -(-n_vocab // 8) * 8                          # as 50265 tokens have 50272 rows
    save(folder / "125m", tiny(2 * n, 2 * n, 32 * n, padded), text_ids=ids[10])
    post_norm = dict(word_embed_proj_dim=16, do_layer_norm_before=False)
    save(folder / "350m", tiny(2 * n, 2 * n, 32 * n, 96, **post_norm), prefix="decoder.")
    save(folder / "2.7b", tiny(n, n, 80 * n, 96), shards=2)
    save_llama(folder / "llama", tiny_llama(2 * n, 4, 2, 32 * n, tied=False))
    save_llama(folder / "llama-tied", tiny_llama(2 * n, 3, 1, 36 * n, tied=True))


if __name__ == "__main__":
    main()
