"""tests/chance.py measures the distance that training lowers, and training it alone lowers it."""
import csv
import sys
from contextlib import nullcontext

import torch

import chance
import sea
from test_ablate import a_teacher
from model import Config, Transformer


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


def test_a_run(tmp_path, monkeypatch, capsys):
    flags = a_teacher(tmp_path, monkeypatch, keys_per_query=8)
    monkeypatch.setattr(sys, "argv", ["chance.py", *flags, *"--minutes 0.01 --lr 0.01".split()])
    chance.main()
    with open(tmp_path / "a") as file:
        rows = list(csv.DictReader(file))
    assert [row["estimate"] for row in rows[:5]] == ["sea", "window", "true mass", "paper", "paper"]
    assert float(rows[-1]["kl"]) < float(rows[3]["kl"]) and rows[2]["kl"] == ""
    assert rows[-1]["ppl"] and not any(row["ppl"] for row in rows[4:-1])
    mass = [float(row["mass"]) for row in rows]
    assert mass[2] > max(mass) - 1e-5 and mass[2] > mass[1]
    assert sea.look_twice.__module__ == "sea"                                   # put back
    assert capsys.readouterr().out.count("\n") == len(rows)
