"""The variants of tests/ablate.py differ from SEA in what their names say, and in nothing else."""
import csv
import sys

import pytest
import torch

import ablate
import sea
from data.engine import save_checkpoint
from model import Config, Transformer

T, S, K, H = 120, 4, 12, 3


def qkv():
    q, k, v = torch.randn(3, 1, H, T, 16, generator=torch.Generator().manual_seed(0)).unbind()
    return 2 * q, k, v


def chosen(name):
    """The blocks (1, H, T, W) that a variant chooses."""
    q, k, _ = qkv()
    with ablate.replaced(ablate.VARIANTS[name][1]):
        return sea.look_twice(q / 4, k, S, K, 4)


def mass_on(blocks):
    q, k, _ = qkv()
    return (sea.block_mass(q / 4, k, S) * blocks)[:, :, T // 2:].sum(-1).mean()


CHOOSING = [name for name, (kind, functions, _) in ablate.VARIANTS.items() if functions]


@pytest.mark.parametrize("name", CHOOSING)
def test_a_variant_chooses_other_blocks_as_many_of_them_and_is_gone_afterwards(name):
    wanted = chosen("sea")
    found = chosen(name)
    assert torch.equal(found.sum(-1)[:, :, T // 2:], wanted.sum(-1)[:, :, T // 2:])
    assert not torch.equal(found, wanted) or name == "one look"
    own = torch.arange(T)[:, None] // S
    assert not (found & (torch.arange(T // S) >= own)).any() and torch.equal(chosen("sea"), wanted)


def test_the_true_mass_keeps_the_most():
    best = mass_on(chosen("true mass"))
    for name in CHOOSING:
        assert mass_on(chosen(name)) < best or name in ("true mass", "neither forced")
    assert mass_on(chosen("sea")) > mass_on(chosen("mean alone"))


@pytest.mark.parametrize("name, block", [("first block not forced", 0), ("block before not forced", -1)])
def test_what_is_not_forced_is_sometimes_left_out(name, block):
    def share(blocks):
        rows = blocks[0, :, -1]                               # (H, W), of a query of the last block
        rows = rows[:, 0] if block == 0 else rows[:, (T - 1) // S - 1]
        return rows.float().mean()

    assert share(chosen("sea")) == 1 > share(chosen(name))


def test_forcing_what_sea_forces_is_sea():
    def fixed(block, own):
        return (block == 0) | (block == own - 1)

    scores = torch.randn(1, H, T, T // S, generator=torch.Generator().manual_seed(0))
    future = torch.arange(T // S) >= torch.arange(T)[:, None] // S
    scores = scores.masked_fill(future, -torch.inf)
    assert torch.equal(ablate.forcing(fixed, 0)(scores, S, 3), sea.select(scores, S, 3))


def test_a_table_of_students(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    config = Config(n_layer=1, n_head=2, n_embd=32, context=128, keys_per_query=40, block_size=4,
                    attention="dense")
    save_checkpoint(tmp_path / "ckpt.pt", Transformer(config), tokenizer="bytes", data="tiny")
    random = torch.randint(256, (3000,)).numpy()
    monkeypatch.setattr("data.common.load", lambda *_: (random, random, dict(tokenizer="bytes", vocab_size=256)))
    line = f"--teacher {tmp_path}/ckpt.pt --steps 1 --batch-size 1 --eval-windows 2 --device cpu --csv {tmp_path}/a"
    monkeypatch.setattr(sys, "argv", ["ablate.py", *line.split()])
    ablate.main()
    rows = {row["variant"]: row for row in csv.DictReader(open(tmp_path / "a"))}
    assert list(rows) == list(ablate.VARIANTS)
    assert all(200 < float(row["ppl"]) < 400 for row in rows.values())        # of random bytes: 256
    assert all(row["ppl"] != row["ppl_untrained"] for row in rows.values())
    keys = [float(row["keys"]) for row in rows.values() if row["keys"]]
    assert len(keys) > 8 and max(keys) < 1.25 * min(keys)                       # as many in each
    assert capsys.readouterr().out.count("\n") > len(rows)


def test_names(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--list"])
    ablate.main()
    assert capsys.readouterr().out.splitlines() == list(ablate.VARIANTS)
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--only", "see"])
    with pytest.raises(SystemExit, match="2"):
        ablate.main()
    assert "'see' is none of" in capsys.readouterr().err
