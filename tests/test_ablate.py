"""The variants of tests/ablate.py differ from SEA in what their names say, and in nothing else."""
import csv
import math
import sys

import pytest
import torch

import ablate
import distill
import sea
from data.engine import save_checkpoint
from model import Config, Transformer

T, S, K, H, HKV = 280, 4, 12, 6, 3


def qkv():
    """Keys with a common drift, so that some blocks are worth more than others to all queries."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, H, T, 16, generator=generator) / 2
    k, v = torch.randn(2, 1, HKV, T, 16, generator=generator).unbind()
    return q, k, v


def chosen(name):
    """The blocks (1, H, T, W) that a variant chooses; two coarse blocks of 16 keys are left out."""
    q, k, _ = qkv()
    with ablate.as_variant(name, kernels=False):
        return sea.look_twice(q, k, S, K, 4)


def mass_on(blocks):
    q, k, _ = qkv()
    return (sea.block_mass(q, k, S) * blocks)[:, :, T // 2:].sum(-1).mean()


CHOOSING = [name for name, (_, functions) in ablate.VARIANTS.items() if functions and "attend" not in functions]


@pytest.mark.parametrize("name", CHOOSING)
def test_a_variant_chooses_other_blocks_as_many_of_them_and_is_gone_afterwards(name):
    wanted = chosen("sea")
    found = chosen(name)
    over = (1, 3) if name == "budget shared by heads" else 3     # one budget for all heads
    assert torch.equal(found[:, :, T // 2:].sum(over), wanted[:, :, T // 2:].sum(over))
    assert not torch.equal(found, wanted)
    own = torch.arange(T)[:, None] // S
    assert not (found & (torch.arange(T // S) >= own)).any() and torch.equal(chosen("sea"), wanted)


def test_the_true_mass_keeps_the_most():
    best = mass_on(chosen("true mass"))
    for name in set(CHOOSING) - {"true mass", "neither forced", "budget shared by heads"}:
        assert mass_on(chosen(name)) < best
    assert mass_on(chosen("full covariance")) > mass_on(chosen("sea")) > mass_on(chosen("mean alone"))
    assert mass_on(chosen("one look")) > mass_on(chosen("sea")) > mass_on(chosen("look at 4"))


def test_full_covariance_is_what_it_says():
    q, k, _ = qkv()
    found = ablate.full_covariance(q, ablate.whole_blocks(k, S), S)
    blocks = k.unflatten(2, (-1, S)).repeat_interleave(H // HKV, 1)              # (1, H, W, S, D)
    apart = blocks - blocks.mean(3, keepdim=True)
    covariance = apart.mT @ apart / S                                            # (1, H, W, D, D)
    curved = torch.einsum("bhtd,bhwde,bhte->bhtw", q, covariance, q) / 2
    wanted = curved + q @ blocks.mean(3).mT
    past = found != -torch.inf
    assert torch.allclose(found[past], wanted[past], atol=1e-5) and past.sum() > T


def test_heads_of_a_key_group_choose_alike_and_shared_budgets_differ():
    together = chosen("choice of a key group").unflatten(1, (HKV, -1))
    assert torch.equal(together[:, :, 0], together[:, :, 1])
    assert not torch.equal(together[:, 0, 0], together[:, 1, 0])
    counts = chosen("budget shared by heads").sum(-1)[0, :, -1]                  # of the last query's heads
    assert counts.float().mean() == K // S + 2 and counts.unique().numel() > 1


@pytest.mark.parametrize("name, block", [("first block not forced", 0), ("block before not forced", -1)])
def test_what_is_not_forced_is_sometimes_left_out(name, block):
    def share(blocks):
        rows = blocks[0, :, -1]                               # (H, W), of a query of the last block
        rows = rows[:, 0] if block == 0 else rows[:, (T - 1) // S - 1]
        return rows.float().mean()

    assert share(chosen("sea")) == 1 > share(chosen(name))


def test_forcing_what_sea_forces_is_sea():
    scores = torch.randn(1, H, T, T // S, generator=torch.Generator().manual_seed(0))
    scores = ablate.before_own(scores, S, 0)
    assert torch.equal(ablate.forcing(True, 1)(scores, S, 3), sea.select(scores, S, 3))


@pytest.mark.parametrize("length", [T, T - 3])
def test_the_rest_by_its_means_is_dense_where_means_say_all(length):
    """Keys and values that are the same throughout a block."""
    q, k, v = qkv()
    q, k, v = q[:, :, -length:], k[:, :, ::S].repeat_interleave(S, 2), v[:, :, ::S].repeat_interleave(S, 2)
    with ablate.as_variant("the rest by its means"):
        found = sea.sea_attention(q, k, v, S, K)
    dense = torch.nn.functional.scaled_dot_product_attention
    mask = torch.ones(length, T, dtype=torch.bool).tril(T - length)
    assert torch.allclose(found, dense(q, k, v, attn_mask=mask, enable_gqa=True), atol=1e-5)
    with ablate.as_variant("a third of the rest"):
        assert not torch.allclose(found, sea.sea_attention(q, k, v, S, K), atol=1e-2)


@pytest.mark.parametrize("attention", ["sea", "window", "paper"])
def test_keys_and_mass_are_those_of_the_attention(attention):
    torch.manual_seed(0)
    config = Config(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, context=300, architecture="llama",
                    attention=attention, block_size=S, keys_per_query=K)
    model = Transformer(config).eval()
    idx = torch.randint(256, (1, 300))
    layers = model(idx, trace=True).trace
    before = torch.nn.functional.scaled_dot_product_attention
    keys, mass = ablate.keys_and_mass(model, layers).unbind(1)                  # (n_layer, H) each
    assert keys.shape == mass.shape == (2, 4) and (mass < 1).all()
    assert torch.nn.functional.scaled_dot_product_attention is before           # and not the watch
    if attention != "paper":
        wanted = distill.keys_and_mass(model, idx[0].numpy())
        assert (keys.mean().item(), mass.mean().item()) == pytest.approx(wanted, rel=1e-4)
        return

    layer = layers[1]
    estimator = model.layers[1].self_attn.attention.estimator
    k = layer.k.repeat_interleave(2, 1)
    picture, _ = estimator.draw(layer.q / 4, k, layer.v.repeat_interleave(2, 1))
    chosen = sea.select(estimator.read(picture, 0, S), S, K // S)
    mask = sea.chosen_keys(chosen, 300, S)
    dense = sea.estimated_attention(layer.q, layer.k, S, 300)[2]
    assert torch.allclose(mask.sum(-1).float().mean((0, 2)), keys[1])
    assert torch.allclose((mask * dense).sum(-1).mean((0, 2)), mass[1], atol=1e-5)


def test_an_attention_that_chooses_no_keys_has_no_mass():
    model = Transformer(Config(n_layer=1, n_head=2, n_embd=32, attention="performer"))
    assert ablate.keys_and_mass(model, model(torch.randint(256, (1, 20)), trace=True).trace) is None


def a_teacher(folder, monkeypatch, **settings):
    """A checkpoint of a small model, and flags that run ablate.py with it on random bytes."""
    torch.manual_seed(0)
    config = Config(n_layer=1, n_head=2, n_embd=32, context=128, attention="dense",
                    **dict(keys_per_query=40, block_size=4) | settings)
    save_checkpoint(folder / "ckpt.pt", Transformer(config), tokenizer="bytes", data="tiny")
    random = torch.randint(256, (3000,)).numpy()
    meta = dict(tokenizer="bytes", vocab_size=256)
    monkeypatch.setattr("data.common.load", lambda *_: (random, random, meta))
    return f"--teacher {folder}/ckpt.pt --batch-size 1 --eval-windows 2 --device cpu --csv {folder}/a".split()


def run(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ablate.py", *flags])
    ablate.main()


def table(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_a_table_of_students(tmp_path, monkeypatch, capsys):
    flags = a_teacher(tmp_path, monkeypatch)
    run([*flags, "--steps", "1"], monkeypatch)
    rows = {row["variant"]: row for row in table(tmp_path / "a")}
    assert list(rows) == list(ablate.VARIANTS)
    assert all(200 < float(row["ppl"]) < 400 for row in rows.values())        # of random bytes: 256
    assert all(row["ppl"] != row["ppl_untrained"] for row in rows.values())
    keys = [float(row["keys"]) for row in rows.values() if row["keys"]]
    assert len(keys) > 8 and max(keys) < 1.25 * min(keys)                       # as many in each
    assert capsys.readouterr().out.count("\n") > len(rows)


def test_settings_and_the_mass_of_each_head(tmp_path, monkeypatch, capsys):
    flags = a_teacher(tmp_path, monkeypatch, n_kv_head=1)
    some = ["--only", "dense", "sea", "--settings", "4:8", "8:48:2", "--mass", str(tmp_path / "m")]
    run([*flags, *some], monkeypatch)
    rows = table(tmp_path / "a")
    found = [(row["variant"], row["block_size"], row["keys_per_query"], row["coarse"]) for row in rows]
    assert found[1:] == [("sea", "4", "8", "8"), ("sea", "8", "48", "2")] and found[0][0] == "dense"
    assert rows[0]["mass"] == rows[0]["ppl_untrained"] == ""
    assert float(rows[1]["mass"]) < float(rows[2]["mass"])

    heads = table(tmp_path / "m")
    assert [(row["layer"], row["head"]) for row in heads] == [("0", "0"), ("0", "1")] * 2
    mean = sum(float(row["mass"]) for row in heads[:2]) / 2
    assert math.isclose(mean, float(rows[1]["mass"]), rel_tol=1e-5)

    run([*flags, "--only", "sea"], monkeypatch)                                 # the table goes on
    assert len(table(tmp_path / "a")) == 4
    (tmp_path / "a").write_text("of,another,table\n")
    with pytest.raises(SystemExit, match="2"):
        run([*flags, "--only", "sea"], monkeypatch)
    assert "has other columns" in capsys.readouterr().err


def test_one_student_is_read_in_other_ways(tmp_path, monkeypatch):
    flags = a_teacher(tmp_path, monkeypatch, keys_per_query=8)
    run([*flags, *"--only dense sea --steps 2 --lr 0.01 --read 16 128 dense".split()], monkeypatch)
    rows = table(tmp_path / "a")
    found = [(row["variant"], row["read_as"], row["keys_per_query"], row["trained_keys"]) for row in rows]
    assert found == [("dense", "dense", "8", "8"), ("sea", "sea", "8", "8"), ("sea", "sea", "16", "8"),
                     ("sea", "sea", "128", "8"), ("sea", "dense", "8", "8")]
    ppl = [float(row["ppl"]) for row in rows]
    assert ppl[3] == pytest.approx(ppl[4], rel=1e-5) and len(set(ppl[:4])) == 4   # all keys: dense


def test_names(monkeypatch, capsys):
    run(["--list"], monkeypatch)
    assert capsys.readouterr().out.splitlines() == list(ablate.VARIANTS)
    for flags, said in ("--only see", "'see' is none of"), ("--settings 8", "8 is not block_size:keys"):
        with pytest.raises(SystemExit, match="2"):
            run(flags.split(), monkeypatch)
        assert said in capsys.readouterr().err
