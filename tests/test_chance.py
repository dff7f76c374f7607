"""tests/chance.py measures the distance that training lowers, and training it alone lowers it."""
import csv
import sys
from contextlib import nullcontext

import pytest
import torch

import ablate
import chance
import sea
from test_ablate import a_teacher
from model import ATTENTIONS, SEA, Config, Layer, Transformer


def test_the_distance_is_the_one_that_distilling_lowers():
    torch.manual_seed(0)
    config = Config(n_layer=1, n_head=4, n_kv_head=2, n_embd=64, context=300, architecture="llama",
                    attention="paper", block_size=4, keys_per_query=12)
    model = Transformer(config).eval()
    idx = torch.randint(256, (1, 300))
    [layer] = model(idx, trace=True).trace
    wanted = model(idx, teacher=[(layer.q, layer.k)]).kl
    [attention] = chance.attentions_of(model)
    found = chance.distance("paper", attention, layer, nullcontext())
    assert torch.allclose(found, wanted, rtol=1e-4)
    found.backward()
    assert attention.estimator.conv1.weight.grad.abs().max() > 0

    # A uniform estimate is as far as the attention's own entropy falls short of a uniform one's.
    untaught = sea.block_kl(sea.block_mass(layer.q / 4, layer.k, 4), torch.zeros(75)).mean()
    assert chance.distance("sea", attention, layer, nullcontext()) < untaught


def test_a_gate_begins_as_sea_and_learns():
    torch.manual_seed(0)
    config = Config(n_head=4, n_kv_head=2, n_embd=64, block_size=4, keys_per_query=12)
    q = torch.randn(1, 4, 300, 16)
    k, v = torch.randn(2, 1, 2, 300, 16).exp()                      # skewed: there is more to learn
    gate = chance.Gate(config)
    with ablate.as_variant("one look"):
        wanted, _ = SEA(config)(q, k, v)
    torch.testing.assert_close(gate(q, k, v)[0], wanted)

    optimizer = torch.optim.Adam(gate.parameters(), 1e-3)
    distances = []
    for _ in range(10):
        optimizer.zero_grad()
        distances.append(chance.distance("gate", gate, Layer(None, None, q, k, v), nullcontext()))
        distances[-1].backward()
        optimizer.step()
    assert distances[-1] < 0.9 * distances[0]

    # It chooses other blocks now, and still sees no later key.
    found, _ = gate(q, k, v)
    assert not torch.allclose(found, wanted)
    before, _ = gate(q[:, :, :270], k[:, :, :270], v[:, :, :270])
    torch.testing.assert_close(found[:, :, :270], before)


def test_a_run(tmp_path, monkeypatch, capsys):
    for known in ATTENTIONS, ablate.VARIANTS:                       # main adds to them: it is undone
        monkeypatch.setitem(known, "gate", None)
    flags = a_teacher(tmp_path, monkeypatch, keys_per_query=8)
    flags += "--only gate paper --minutes 0.01 --lr 0.01".split()
    monkeypatch.setattr(sys, "argv", ["chance.py", *flags])
    chance.main()
    with open(tmp_path / "a") as file:
        rows = list(csv.DictReader(file))
    assert [row["estimate"] for row in rows[:4]] == ["sea", "window", "true mass", "gate"]
    assert [row["estimate"] for row in rows[3:] if row["ppl"]] == ["gate", "gate", "paper", "paper"]   # first and last
    kl = [float(row["kl"]) for row in rows if row["estimate"] == "paper"]      # the gate's is 0 but for rounding
    assert kl[-1] < kl[0]
    mass = [float(row["mass"]) for row in rows]
    assert mass[2] > max(mass) - 1e-5 and mass[2] > mass[1]
    assert mass[3] == pytest.approx(mass[0], rel=1e-4)
    assert sea.look_twice.__module__ == "sea"                                   # put back
    assert capsys.readouterr().out.count("\n") == len(rows)
