"""muon32 takes timm's Muon's steps, in fp32, from state that a checkpoint holds."""

import copy
import functools

import pytest
import timm.optim.muon as timm_muon
import torch
from torch import nn

from zoo.tasks.optim import Optim, build_optimizer


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(576, 32), nn.GELU(), nn.Linear(32, 32), nn.Linear(32, 2)
        )


def step(net, optimizer, seed):
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    (net(x).square().mean() + net(x).mean()).backward()
    optimizer.step()


def make(name, options):
    torch.manual_seed(0)
    net = Net()
    return net, build_optimizer(net, Optim(name=name, lr=1e-2, lr_per=None, weight_decay=0.1, options=options), 1)


@pytest.mark.parametrize('options', [{}, {'nesterov': False, 'momentum': 0.95}, {'fallback_list': ['2.*']}], ids=str)
def test_steps_are_those_of_timm(options, monkeypatch):
    exact = functools.partial(timm_muon.zeropower_via_newtonschulz, dtype=torch.float32)
    monkeypatch.setattr(timm_muon, 'zeropower_via_newtonschulz', exact)
    ours, theirs = make('muon32', options), make('muon', options)
    start = [p.detach().clone() for p in ours[0].parameters()]
    for seed in range(3):
        step(*ours, seed)
        step(*theirs, seed)
    for a, b, s in zip(ours[0].parameters(), theirs[0].parameters(), start):
        assert (a - b).norm() < 1e-3 * (b - s).norm(), a.shape


def test_iterations_orthogonalise():
    net, optimizer = make('muon32', {'momentum': 0.0})
    before = net[4].weight.detach().clone()
    step(net, optimizer, 0)
    moved = (net[4].weight.detach() - before * (1 - 1e-2 * 0.1)) / 1e-2
    values = torch.linalg.svdvals(moved) / (0.2 * 32**0.5)  # steps have the size of AdamW's
    gradient = torch.linalg.svdvals(net[4].weight.grad)
    assert values[gradient > 0.1 * gradient[0]].sub(1).abs().max() < 0.3


def test_state_resumes():
    net, optimizer = make('muon32', {})
    step(net, optimizer, 0)
    twin, other = make('muon32', {})
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (1, 2):
        step(net, optimizer, seed)
        step(twin, other, seed)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters()))
