"""The models: as in transformers (make_golden.py's files, or live), causal, and alike under every wrapper."""
import copy
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data import download, hub
from data.common import encoding
from model import ATTENTIONS, POSITION_OFFSET, Config, Transformer

GOLDEN = Path(__file__).parent / "golden"
# pre-norm; post-norm with projections; D = 80 and two shards; two heads of q on each of k; three, and tied
FOLDERS = "125m", "350m", "2.7b", "llama", "llama-tied"
SMALL = dict(n_layer=2, n_head=4, n_embd=32, context=128, block_size=4, keys_per_query=8, coarse=4,
             map_width=16, num_features=8)
KINDS = [(architecture, attention) for architecture in ("opt", "llama") for attention in ATTENTIONS]


def small_model(architecture="opt", attention="sea", **more):
    """A model whose every part matters: in a fresh one the logits are nearly equal."""
    torch.manual_seed(0)
    kv = dict(n_kv_head=2) if architecture == "llama" else {}
    settings = {**SMALL, **kv, **more}
    model = Transformer(Config(**settings, architecture=architecture, attention=attention))
    for p in model.parameters():
        p.data += (0.1 if p.dim() == 1 else 0.2) * torch.randn_like(p)
    return model


def loss_of(model, idx):
    """The text's loss and, of the paper's kind, that of its estimate."""
    out = model(idx[:, :-1], idx[:, 1:])
    return out.loss if out.kl is None else out.loss + out.kl


def text(T, B=2):
    return torch.randint(256, (B, T), generator=torch.Generator().manual_seed(T))


# ---- as transformers

def same_as_transformers(folder):
    """Logits and every hidden state of the model in a folder, within 1e-4 of its expected.pt."""
    expected = torch.load(folder / "expected.pt", weights_only=True)
    model = Transformer.from_pretrained(folder).eval()
    with torch.no_grad():
        out = model(expected["idx"], trace=True)
        first = model.embed(expected["idx"], torch.arange(12))[0]
    assert expected["hidden"].std() > 0.5 and expected["logits"].std() > 0.5    # not a comparison of zeros
    hidden = torch.stack([first, *[layer.hidden for layer in out.trace]])
    torch.testing.assert_close(hidden, expected["hidden"], atol=1e-4, rtol=0)
    torch.testing.assert_close(out.logits, expected["logits"], atol=1e-4, rtol=0)


@pytest.fixture(scope="session")
def live(tmp_path_factory):
    """A folder as tests/golden, made now and larger: by a process that does not see this repository, because
    transformers takes our kernels.py for a package that it knows."""
    if not (importlib.util.find_spec("transformers") and importlib.util.find_spec("tokenizers")):
        pytest.skip("transformers and tokenizers are not installed")
    folder = tmp_path_factory.mktemp("live")
    script = Path(__file__).with_name("make_golden.py")
    subprocess.run([sys.executable, script, folder, "--scale", "2"], check=True)
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_golden(name):
    same_as_transformers(GOLDEN / name)


@pytest.mark.parametrize("name", FOLDERS)
def test_live(live, name):
    same_as_transformers(live / name)


def test_defaults_are_a_pre_norm_decoder_without_projections():
    model = Transformer(Config(n_layer=1, n_head=2, n_embd=16, context=8))
    assert sum(p.numel() for p in model.parameters()) == 256 * 16 + 10 * 16 + 12 * 16 * 16 + 13 * 16 + 2 * 16
    assert not any("project" in name or "attention" in name for name in model.state_dict())


def test_llama_has_as_many_weights_as_opt():
    config = dict(n_layer=1, n_head=2, n_embd=96, context=8)
    model = Transformer(Config(**config, architecture="llama", tied=False))
    assert sum(p.numel() for p in model.parameters()) == 2 * 256 * 96 + 12 * 96 * 96 + 3 * 96
    assert not list(model.buffers()) and not any("bias" in name for name in model.state_dict())


# ---- positions and vocabulary

def test_positions_start_at_row_2():
    model = Transformer.from_pretrained(GOLDEN / "125m").eval()
    before = model(text(8)).logits
    model.embed_positions.weight.data[:POSITION_OFFSET] = torch.nan
    assert torch.equal(model(text(8)).logits, before)
    model.embed_positions.weight.data[POSITION_OFFSET] += 1
    assert not torch.allclose(model(text(8)).logits[:, 0], before[:, 0])


def test_neighbours_start_alike():
    table = Transformer(Config(n_layer=1, n_head=1, n_embd=64, context=256)).embed_positions.weight
    table = torch.nn.functional.normalize(table)
    alike = table @ table.T                            # cosines
    assert alike.diag(1).min() > 0.9 and alike.diag(64).max() < 0.8


def test_rotary_positions_are_relative():
    """The same keys and queries, anywhere in the text: a shift of all positions changes no logit."""
    model = small_model("llama", "dense").eval()
    real = model.embed
    before = model(text(20)).logits
    model.embed = lambda idx: real(idx, torch.arange(20) + 1000)
    torch.testing.assert_close(model(text(20)).logits, before, atol=1e-4, rtol=0)
    model.embed = lambda idx: real(idx, torch.arange(20) * 2)
    assert not torch.allclose(model(text(20)).logits, before, atol=1e-2)


def test_vocabulary_is_padded():
    enc = encoding("opt", GOLDEN / "125m")
    golden = json.loads((GOLDEN / "125m" / "texts.json").read_text())
    model = Transformer.from_pretrained(GOLDEN / "125m")
    idx = torch.load(GOLDEN / "125m" / "expected.pt")["idx"]
    ids = [enc.bos, *enc.encode_ordinary(golden["texts"][10])][:idx.shape[1]]
    assert idx[0].tolist() == ids                      # test_golden has the logits of this text
    assert max(ids) < enc.n_vocab < model.config.vocab_size == model(idx).logits.shape[-1]


def test_longer_context_interpolates_and_says_so(capsys):
    short = Transformer.from_pretrained(GOLDEN / "350m")
    assert capsys.readouterr().out == ""
    model = Transformer.from_pretrained(GOLDEN / "350m", context=63)
    said = capsys.readouterr().out
    assert "32" in said and "63" in said and "interpolated" in said
    old, new = short.embed_positions.weight, model.embed_positions.weight
    assert model.config.context == 63 and new.shape[0] == 63 + POSITION_OFFSET and new.requires_grad
    assert torch.equal(old[:POSITION_OFFSET], new[:POSITION_OFFSET])
    old, new = old[POSITION_OFFSET:], new[POSITION_OFFSET:]
    torch.testing.assert_close(new[::2], old)          # 63 = 2 * 32 - 1: every old row, and the means between
    torch.testing.assert_close(new[1::2], (old[1:] + old[:-1]) / 2)
    assert model(torch.zeros(1, 63, dtype=torch.long)).logits.isfinite().all()


def test_shorter_context_keeps_the_first_positions(capsys):
    idx = torch.arange(12)[None]
    model = Transformer.from_pretrained(GOLDEN / "125m", context=12)
    assert torch.equal(model(idx).logits, Transformer.from_pretrained(GOLDEN / "125m")(idx).logits)
    assert capsys.readouterr().out == "" and model.config.context == 12
    with pytest.raises(ValueError, match="context"):
        Transformer.from_pretrained(GOLDEN / "125m", context=0)


def test_llama_reads_any_length(capsys):
    idx = text(40) % 96
    model = Transformer.from_pretrained(GOLDEN / "llama", context=40)
    assert model(idx).logits.isfinite().all() and capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="33 tokens"):
        Transformer.from_pretrained(GOLDEN / "llama")(idx[:, :33])


# ---- other attentions than the file's

@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", ["125m", "llama-tied"])
def test_other_attentions_keep_the_published_weights(name, attention):
    dense = Transformer.from_pretrained(GOLDEN / name)
    idx = torch.load(GOLDEN / name / "expected.pt")["idx"]
    model = Transformer.from_pretrained(GOLDEN / name, attention, block_size=2, keys_per_query=2)
    weights = model.state_dict()
    assert all(torch.equal(weights[name], p) for name, p in dense.state_dict().items())
    assert not any(p.is_meta for p in weights.values()) and all(p.requires_grad for p in model.parameters())
    loss_of(model, idx).backward()
    assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if "attention." not in name)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_another_attention_takes_over_all_weights_that_it_has(attention):
    paper = small_model("llama", "paper", tied=False)
    model = paper.with_attention(attention, keys_per_query=4)
    assert (model.config.attention, model.config.keys_per_query) == (attention, 4)
    weights, theirs = model.state_dict(), paper.state_dict()
    shared = {name for name in theirs if attention == "paper" or ".attention." not in name}
    assert shared <= weights.keys() and all(torch.equal(weights[name], theirs[name]) for name in shared)
    assert not any(weights[name].data_ptr() == theirs[name].data_ptr() for name in shared)


@pytest.mark.parametrize("name", FOLDERS)
def test_sea_that_covers_the_past_is_its_teacher(name):
    expected = torch.load(GOLDEN / name / "expected.pt")
    model = Transformer.from_pretrained(GOLDEN / name, "sea", block_size=2, keys_per_query=32).eval()
    assert not [name for name in model.state_dict() if ".attention." in name]
    torch.testing.assert_close(model(expected["idx"]).logits, expected["logits"], atol=1e-4, rtol=0)
    model.config.keys_per_query = 2
    assert not torch.allclose(model(expected["idx"]).logits, expected["logits"], atol=1e-2)


def test_paper_starts_as_its_teacher():
    expected = torch.load(GOLDEN / "125m" / "expected.pt")
    model = Transformer.from_pretrained(GOLDEN / "125m", "paper", block_size=2, keys_per_query=32).eval()
    for block in model.layers:
        gates = block.self_attn.attention.estimator.gates
        assert (gates.bias == 5).all() and (gates.weight == 0).all()
        gates.bias.data += 20                      # sigmoid(25) = 1: attention alone
    torch.testing.assert_close(model(expected["idx"]).logits, expected["logits"], atol=1e-3, rtol=0)


def test_unknown_name():
    with pytest.raises(ValueError, match="there is no folder facebook/opt-13b; .*facebook/opt-125m"):
        Transformer.from_pretrained("facebook/opt-13b")


@pytest.mark.parametrize("name, golden", [("facebook/opt-125m", "125m"), ("facebook/opt-6.7b", "2.7b"),
                                          ("HuggingFaceTB/SmolLM2-135M", "llama-tied")])
def test_download(tmp_path, monkeypatch, name, golden):
    """By name, from a mirror: file:// here. What was downloaded is used again; what failed leaves nothing."""
    monkeypatch.setattr(hub, "CACHE", tmp_path)
    monkeypatch.setattr(download, "WAITS", (0,))
    with pytest.raises(ValueError, match="could not download file:///nowhere/config.json"):
        Transformer.from_pretrained(name, url="file:///nowhere")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    first = Transformer.from_pretrained(name, url=(GOLDEN / golden).as_uri()).state_dict()
    again = Transformer.from_pretrained(name, url="file:///nowhere").state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("wrong, said", [
    (dict(attention="full"), "sea, paper, dense"), (dict(architecture="gpt"), "opt, llama"),
    (dict(n_head=3), "n_embd .* multiple of n_head"), (dict(n_kv_head=3), "n_kv_head"),
    (dict(n_layer=0), "n_layer is 0"), (dict(block_size=0), "block_size is 0"),
    (dict(token_embd=-4), "token_embd is -4; .* 0 or more"), (dict(tied=1), "tied is 1; it must be bool"),
    (dict(keys_per_query=-1), "keys_per_query is -1"),
    (dict(attention="paper", map_width=30), "multiple of 4"),
    (dict(architecture="llama", n_head=32, n_kv_head=32), "even")])
def test_wrong_settings(wrong, said):
    with pytest.raises(ValueError, match=said):
        Config(**{**SMALL, **wrong})


# ---- every kind

@pytest.mark.parametrize("architecture, attention", KINDS)
def test_no_logit_depends_on_a_later_token(architecture, attention, T=70):
    model = small_model(architecture, attention).eval()
    idx = text(T, 1)
    logits = model(idx).logits
    for t in (1, 16, 37, T - 1):
        other = torch.cat((idx[:, :t], (idx[:, t:] + 1) % 256), 1)
        changed = model(other).logits
        # To the bit, but for the sums of kernel attention: they are subtracted from those with later rows.
        rounding = 1e-5 if attention in ("paper", "performer") else 0
        torch.testing.assert_close(changed[:, :t], logits[:, :t], atol=rounding, rtol=0)
        assert not torch.allclose(logits[:, t:], changed[:, t:], atol=1e-3)


@pytest.mark.parametrize("architecture, attention", KINDS)
@pytest.mark.parametrize("T", [1, 63])
def test_loss_gradients_and_text_for_any_length(architecture, attention, T):
    torch.manual_seed(0)
    model = Transformer(Config(**SMALL, architecture=architecture, attention=attention))
    out = model(text(T), text(T + 1)[:, 1:])
    assert out.logits.shape == (2, T, 256) and abs(out.loss.item() - math.log(256)) < 0.5
    assert (out.kl is not None) == (attention == "paper") and out.trace == []
    loss_of(model, text(T + 1)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.embed_tokens.weight.grad.any()
    written = model.eval().generate(text(T), 3, temperature=0.5, top_k=5)
    assert written.shape == (2, T + 3) and torch.equal(written[:, :T], text(T))


def test_a_copy_has_its_own_settings():
    model = small_model()
    before = model(text(40)).logits
    copied = copy.deepcopy(model)
    copied.config.keys_per_query = 40
    assert torch.equal(model(text(40)).logits, before) and not torch.equal(copied(text(40)).logits, before)


def test_the_papers_estimate_learns_from_the_teacher_that_it_is_given():
    model = small_model("llama", "paper")
    other = small_model("llama", "dense", n_embd=32)
    for p in other.parameters():
        p.data *= 1.5
    trace = other(text(40), trace=True).trace
    teacher = [(layer.q, layer.k) for layer in trace]
    own, given = model(text(40)).kl, model(text(40), teacher=teacher).kl
    assert own.item() != given.item()
    model.eval()
    assert model(text(40)).kl is None and model(text(40), teacher=teacher).kl.item() == given.item()
    given.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning and all(".estimator." in name and "gates" not in name for name in learning)


def test_a_trace_is_what_layers_compute():
    model = small_model("llama", "sea").eval()
    out = model(text(40), trace=True)
    assert len(out.trace) == 2 and torch.equal(model.unembed(out.trace[-1].hidden), out.logits)
    for block, layer in zip(model.layers, out.trace):
        assert layer.q.shape == (2, 4, 40, 8) and layer.k.shape == layer.v.shape == (2, 2, 40, 8)
        y, _ = block.self_attn.attention(layer.q, layer.k, layer.v)
        assert torch.equal(block.self_attn.o_proj(y.transpose(1, 2).flatten(2)), layer.attended)


def test_window_has_as_many_keys_as_sea(T=128):
    model = small_model("opt", "window", block_size=8, keys_per_query=24)
    q = k = torch.zeros(1, 1, T, 32)  # equal scores: the output is the share of each value
    share = model.layers[0].self_attn.attention(q, k, torch.eye(T)[None, None])[0][0, 0]
    last = 24 + 2 * 8 + 4 - 4         # chosen keys, the two fixed blocks, half the own block; the first four
    assert (share[-1] > 0).sum() == last + 4
    assert (share[-1, :4] > 0).all() and (share[-1, -last:] > 0).all()


@pytest.mark.parametrize("attention", ["sea", "window"])
def test_kinds_differ_from_dense_where_they_read_less(attention):
    few = small_model("opt", attention).eval()
    dense = Transformer(Config(**SMALL, attention="dense")).eval()
    dense.load_state_dict(few.state_dict())
    assert not torch.allclose(few(text(128)).logits, dense(text(128)).logits, atol=0.01)
    few.config.keys_per_query = 128
    if attention == "sea":
        torch.testing.assert_close(few(text(128)).logits, dense(text(128)).logits, atol=1e-4, rtol=0)
