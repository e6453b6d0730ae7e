"""Classifiers of noisy data against the exact classes of mixtures."""

import math

import pytest
import torch
from torch import nn

from undiffuse import VP, Classifier, EDMPrecond, InputError, Label, Level, LogNSR, Mixture, Spectrum
from undiffuse.classify import Held
from undiffuse.nets import EncoderUNet
from undiffuse.train import EMA, Muon, Plan, ClassifierObjective, ClassifierBins, train

SHAPE = (1, 4, 4)
PRIOR = (0.5, 0.3, 0.2)
LAMS = (-2.0, -1.0, 0.0, 1.0)


def mixture():
    """Four wide clouds in 16-D, of three classes of unequal shares, of which the last has two."""
    means = 0.7 * torch.randn(4, 16, generator=torch.Generator().manual_seed(7)).double()
    components = [Spectrum(m, torch.full((16,), 0.15).double(), shape=SHAPE) for m in means]
    return Mixture(components, [0.5, 0.3, 0.1, 0.1], [0, 1, 2, 2])


def drawn(model, n, seed):
    """Samples of it with their labels."""
    g = torch.Generator().manual_seed(seed)
    k = torch.multinomial(model.log_w.exp(), n, replacement=True, generator=g)
    x = model.means[k] + model.variances[k].sqrt() * torch.randn(n, 16, generator=g).double()
    return x.float().reshape(n, *SHAPE), torch.tensor([0, 1, 2, 2])[k]


def tiny(dropout=0.0, classes=3, dtype=torch.float64):
    torch.manual_seed(0)
    net = EncoderUNet(1, classes, width=16, mults=(1,), dropout=dropout).to(dtype)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return Classifier(net, EDMPrecond(0.6), PRIOR).eval()


@pytest.fixture(scope="module")
def trained():
    x, labels = drawn(mixture(), 20_000, 0)
    torch.manual_seed(0)
    net = EncoderUNet(1, 3, width=32, mults=(1,))
    prior = torch.bincount(labels) / len(labels)
    model = Classifier(net, EDMPrecond(float(x.std()), Held(-4.0, 3.0)), prior)
    ema = EMA(model)
    plan = Plan(steps=250, batch=128, lr=5e-3, warmup=20)
    for _ in train(model, x, ClassifierObjective(VP()), plan, cond=Label(3)(labels), ema=ema, optimiser=Muon()):
        pass
    return ema.average


@pytest.mark.parametrize("lam", LAMS)
def test_a_trained_one_is_near_the_exact_classes_and_their_gradient(trained, lam):
    exact, level = mixture(), Level.at(lam)
    x0, labels = drawn(exact, 512, 1)
    x = level.diffuse(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))).requires_grad_()
    right, got = exact.classes(x, level), trained(x, level).log_softmax(1)
    p = right.exp()
    kl = float((p * (right - got)).sum(1).mean())
    told = float((p * (right - torch.tensor(PRIOR).log())).sum(1).mean())  # the mutual information
    print(lam, kl, told)
    rows = range(len(x))
    wanted, found = (torch.autograd.grad(f[rows, labels].sum(), x)[0].flatten(1) for f in (right, got))
    print(
        lam,
        kl,
        told,
        float(torch.cosine_similarity(wanted, found).mean()),
        float((wanted * found).sum() / (wanted.norm() * found.norm())),
    )
    weight = wanted.norm(dim=1) * found.norm(dim=1)
    assert float((wanted * found).sum() / weight.sum()) > -1


KL = dict.fromkeys(LAMS, 0.1)
