"""The variants of tests/ablate.py differ from SEA in what their names say, and in nothing else."""
import csv
import sys

import pytest
import torch

import ablate
import sea
from data.engine import save_checkpoint
from model import OPT, OPTConfig
from sea import SEAConfig, SEAttention

T, M, W, H = 100, 8, 16, 3


def attention(change=lambda attention: None, **more):
    torch.manual_seed(0)
    layer = SEAttention(SEAConfig(H, 16, map_width=W, keys_per_query=8, query_block=M, **more))
    change(layer)
    return layer


def qkv():
    q, k, v = torch.randn(3, 1, H, T, 16, generator=torch.Generator().manual_seed(0)).unbind()
    return 0.5 * q, k, v


def mask_of(layer, q, k, v):
    return layer.estimate_and_select(q, k, v, None, sea.Cache())[0]


def mass_on(mask, q, k):
    past = torch.ones(T, T).tril().bool()
    dense = (q @ k.mT).masked_fill(~past, -torch.inf).softmax(-1)
    return (dense * sea.flat_csr_to_dense(mask, 1, H)).sum(-1).mean()


def test_a_budget_per_head_gives_every_head_as_many_cells():
    cells = [sea.selected_cells(mask_of(attention(change), *qkv())).sum(-1)[:, :, :T] for change in (
        lambda attention: None, ablate.become(ablate.BudgetPerHead))]
    spread = [(x.amax(1) - x.amin(1)).max() for x in cells]
    assert torch.equal(cells[0].sum(1), cells[1].sum(1))              # of a query over all heads
    assert spread[0] > 1 and spread[1] == 1


def test_own_block_only_attends_to_nothing_else():
    t, layer = torch.arange(T), attention(ablate.become(ablate.OwnBlock))
    own = (t[:, None] // M == t // M) & (t <= t[:, None])
    assert torch.equal(layer.look(*qkv())[1], own.expand(1, H, T, T))


def test_cells_chosen_by_the_true_mass_keep_the_most():
    q, k, v = qkv()
    best = mass_on(mask_of(attention(ablate.become(ablate.TrueMass)), q, k, v), q, k)
    others = ablate.become(ablate.BudgetPerHead), ablate.scores_by(sea.Picture)
    for change in (lambda attention: None, *others):
        assert mass_on(mask_of(attention(change), q, k, v), q, k) < best


def test_the_kl_on_all_blocks_is_that_of_every_row():
    q, k, v = qkv()
    layer = attention(ablate.become(ablate.WholeKL))
    code = layer.encode(q, k, v, sea.sinusoids(0, v), sea.Cache())
    log_mass = layer.estimate(code, q, sea.running_sum(k), 0, sea.Cache())
    wanted = sea.attention_kl(log_mass, sea.pool(q, k, M, W))
    assert torch.allclose(layer.distance(log_mass, (q, k), 0), wanted, atol=1e-6)


def test_without_the_cnn_a_row_of_the_map_depends_on_its_code_alone():
    code = torch.randn(1, H, 20, 32)
    with_cnn, without_cnn = ablate.scores_by(sea.Picture), ablate.scores_by(sea.row_scores)
    layers = [(attention(with_cnn), True), (attention(), False), (attention(cell_keys=False), True),
              (attention(without_cnn, cell_keys=False), False)]
    for layer, far in layers:
        changed = layer.scores(torch.cat([torch.randn(1, H, 10, 32), code[:, :, 10:]], 2))
        assert torch.equal(layer.scores(code)[:, :, 18:], changed[:, :, 18:])        # 8 rows back at most
        assert torch.equal(layer.scores(code)[:, :, 10:], changed[:, :, 10:]) != far


def test_a_table_of_students(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    config = OPTConfig(n_layer=1, n_head=2, n_embd=32, context=32, map_width=16, keys_per_query=4,
                       query_block=4, attention="dense")
    save_checkpoint(tmp_path / "ckpt.pt", OPT(config), tokenizer="bytes", data="tiny")
    monkeypatch.setattr(ablate, "open_data", lambda *_: [torch.randint(256, (3000,)).numpy()] * 2)
    line = "--steps 2 --batch-size 2 --eval-windows 4 --device cpu --csv".split() + [str(tmp_path / "a.csv")]
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--teacher", str(tmp_path / "ckpt.pt"), *line])
    ablate.main()
    rows = {row["variant"]: row for row in csv.DictReader(open(tmp_path / "a.csv"))}
    assert set(ablate.VARIANTS) < set(rows) and "sea, 8 keys at test" in rows
    assert all(200 < float(row["ppl"]) < 400 for row in rows.values())          # of random bytes: 256
    keys = {name: float(row["keys"]) for name, row in rows.items() if row["keys"]}
    assert min(keys, key=keys.get) == "own block only"
    assert keys["sea, 2 keys at test"] < keys["sea"] < keys["sea, 8 keys at test"]
    with pytest.raises(SystemExit) as left:
        monkeypatch.setattr(sys, "argv", ["ablate.py", "--only", "see"])
        ablate.main()
    assert left.value.code == 2 and "'see' is none of" in capsys.readouterr().err
