"""Classifiers of noisy data against the exact classes of mixtures."""

import pytest
import torch
from torch import nn

from undiffuse import VP, Classifier, Cond, Denoiser, EDMPrecond, Flow, InputError, Label, Level, Mixture, Spectrum, V
from undiffuse.classify import Held
from undiffuse.evals import calibration
from undiffuse.nets import EncoderUNet, UNet
from undiffuse.train import EMA, ClassifierObjective, Muon, Plan, train
from undiffuse.train.objective import LogNormal, UniformInLam

SHAPE = (1, 4, 4)
PRIOR = (0.5, 0.3, 0.2)
FORMS = ("vp", "flow", "ve")


def mixture():
    """Four clouds in 16-D, of three classes of unequal shares, of which the last has two."""
    means = 0.7 * torch.randn(4, 16, generator=torch.Generator().manual_seed(7)).double()
    components = [Spectrum(m, torch.full((16,), 0.15).double(), shape=SHAPE) for m in means]
    return Mixture(components, [0.5, 0.3, 0.1, 0.1], [0, 1, 2, 2])


def drawn(model, n, seed):
    """Samples of it with their labels."""
    g = torch.Generator().manual_seed(seed)
    k = torch.multinomial(model.log_w.exp(), n, replacement=True, generator=g)
    x = model.means[k] + model.variances[k].sqrt() * torch.randn(n, 16, generator=g).double()
    return x.float().reshape(n, *SHAPE), torch.tensor([0, 1, 2, 2])[k]


@pytest.fixture(scope="module")
def trained():
    x, labels = drawn(mixture(), 50_000, 0)
    torch.manual_seed(0)
    net = EncoderUNet(1, 3, width=16, mults=(1,), patch=2)
    model = Classifier(net, EDMPrecond(float(x.std()), Held(-4.0, 3.0)), torch.bincount(labels) / len(labels))
    ema = EMA(model)
    plan = Plan(steps=500, batch=256, lr=1e-2, warmup=20)
    for _ in train(model, x, ClassifierObjective(VP()), plan, cond=Label(3)(labels), ema=ema, optimiser=Muon()):
        pass
    return ema.average


@pytest.mark.parametrize("lam", [-2.0, -1.0, 0.0])
def test_a_trained_one_is_near_the_exact_classes_and_their_gradient(trained, lam):
    """Its divergence is under 15 % of the prior's, which is all that x tells of the class at this level."""
    exact, level = mixture(), Level.at(lam)
    x0, labels = drawn(exact, 512, 1)
    x = level.diffuse(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))).requires_grad_()
    right, got = exact.classes(x, level), trained(x, level).log_softmax(1)
    with torch.no_grad():
        p, prior = right.exp(), torch.tensor(PRIOR).log()
        kl, told = ((p * (right - other)).sum(1).mean() for other in (got, prior))
    wanted, found = (torch.autograd.grad(f.gather(1, labels[:, None]).sum(), x)[0].flatten(1) for f in (right, got))
    assert kl < 0.15 * told
    assert torch.cosine_similarity(wanted, found).mean() > 0.9


def rough(dropout=0.0, classes=3):
    """A network in float64 whose parameters are all of consequence."""
    torch.manual_seed(0)
    net = EncoderUNet(1, classes, width=16, mults=(1, 2), dropout=dropout).double()
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return Classifier(net, EDMPrecond(0.6), PRIOR).eval()


def test_it_says_the_prior_at_pure_noise_and_something_finite_at_clean_data():
    model, x = rough(), torch.randn(5, *SHAPE).double().requires_grad_()
    assert torch.allclose(model(x, Level(0, 1)).softmax(1), torch.tensor(PRIOR).double().expand(5, 3), atol=1e-7)
    assert torch.allclose(model(x, Level(1e-9, 1)).softmax(1), torch.tensor(PRIOR).double().expand(5, 3), atol=1e-6)
    for level in (Level(1, 0), Level(0, 1), Level(0, 80.0)):
        logits = model(x, level)
        (slope,) = torch.autograd.grad(logits[:, 0].sum(), x)
        assert torch.isfinite(logits).all()
        assert torch.isfinite(slope).all()
        assert bool((slope != 0).any()) == (level.alpha > 0)  # at pure noise there is nothing to read
    assert (model(x, Level(1, 0)) - model(-x, Level(1, 0))).abs().min() > 1e-3


@pytest.mark.parametrize("lam", [-6.0, -0.5, 2.0])
def test_it_is_one_function_in_all_forms(lam):
    """x and its level times a number are the same to it: p(c | x) depends on x / alpha and lam."""
    model, y = rough(), torch.randn(4, *SHAPE).double() / Level.at(lam).alpha
    logits = [model(y * level.alpha, level) for level in (Level.at(lam, form) for form in FORMS)]
    assert torch.allclose(logits[0], logits[1], atol=1e-10)
    assert torch.allclose(logits[0], logits[2], atol=1e-10)
    assert (logits[0] - logits[0][0]).abs().max() > 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_the_scale_of_the_logits_is_that_of_the_whole_samples_signal_to_noise_ratio(form):
    """The root of D / (1 + D), D = d (alpha sigma_data / sigma)^2, for one level and for a level a sample."""
    model = Classifier(lambda x, time, cond: torch.ones(len(x), 2).double(), EDMPrecond(0.6), [0.5, 0.5])
    x, lams = torch.randn(3, 2, 5, 5).double(), torch.tensor([-5.0, -1.0, 2.0]).double()
    ratio = 50 * (0.6 * lams.exp()) ** 2
    out = model(x, Level.at(lams, form).reshape(-1, 1, 1, 1)) - model.prior
    assert torch.allclose(out, (ratio / (1 + ratio)).sqrt()[:, None].expand(3, 2), atol=1e-7)
    for i, lam in enumerate(lams):
        assert torch.allclose(model(x[:1], Level.at(lam, form)) - model.prior, out[i : i + 1], atol=1e-12)


def test_a_level_for_every_sample_equals_a_loop():
    model, x, lams = rough(), torch.randn(3, *SHAPE).double(), torch.tensor([-7.0, 0.3, 1.0])
    together = model(x, Level.at(lams).reshape(-1, 1, 1, 1))
    alone = [model(x[i : i + 1], Level.at(float(lam))) for i, lam in enumerate(lams)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)


def test_probabilities_of_labels_of_sets_of_them_and_of_none():
    model, x, level = rough(), torch.randn(4, *SHAPE).double(), Level.at(0.0)
    p = model(x, level).softmax(1)
    labels = torch.tensor([2, 0, 1, 2])
    assert torch.allclose(model.log_p(x, level, labels).exp(), p[range(4), labels])
    assert torch.allclose(model.log_p(x, level, Label(3)(labels).vector), model.log_p(x, level, labels))
    several = torch.tensor([[1.0, 1, 0], [0, 0, 0], [1, 1, 1], [0, 0.5, 0]])
    expected = torch.stack([p[0, 0] + p[0, 1], torch.tensor(1.0), torch.tensor(1.0), 0.5 * p[3, 1]])
    y = x.clone().requires_grad_()
    got = model.log_p(y, level, several)
    assert torch.allclose(got.exp(), expected)
    (slope,) = torch.autograd.grad(got.sum(), y)
    assert torch.isfinite(slope).all()
    assert torch.allclose(slope[1:3], torch.zeros(2, *SHAPE).double(), atol=1e-12)  # none, and all of the classes
    z = x.clone().requires_grad_()
    (alone,) = torch.autograd.grad(model.log_p(z, level, torch.tensor([0, 0, 0, 1]))[3], z)
    assert torch.allclose(slope[3], alone[3])
    assert slope[1].abs().max() < 1e-12 < slope[0].abs().max()


@pytest.mark.parametrize("labels", [torch.tensor([0.0]), torch.tensor([0, 1]), torch.ones(1, 2), torch.tensor([True])])
def test_labels_of_other_shapes_are_refused(labels):
    with pytest.raises(InputError, match=r"whole numbers \(1,\), or weights \(1, 3\)"):
        rough().log_p(torch.zeros(1, *SHAPE).double(), Level(0.8, 0.6), labels)


def test_mistakes_are_refused():
    with pytest.raises(InputError, match=r"from 0 to 2, got \[3\]"):
        rough().log_p(torch.zeros(1, *SHAPE).double(), Level(0.8, 0.6), torch.tensor([3]))
    for prior in ([1.0], [0.5, 0.0], [[0.5, 0.5]], [1.0, float("inf")]):
        with pytest.raises(InputError, match="prior of 2 or more numbers > 0"):
            Classifier(nn.Identity(), EDMPrecond(), prior)
    with pytest.raises(InputError, match=r"answers \(2, 4\); expected \(2, 3\)"):
        Classifier(lambda x, time, cond: torch.zeros(2, 4), EDMPrecond(), PRIOR)(torch.zeros(2, 1), Level(0.8, 0.6))
    with pytest.raises(InputError, match="classes >= 2, got 1"):
        EncoderUNet(1, 1)
    with pytest.raises(InputError, match="width >= 8"):
        EncoderUNet(1, 3, width=4)
    with pytest.raises(InputError, match=r"\(batch, 1, side, side\)"):
        EncoderUNet(1, 3, width=16)(torch.zeros(2, 2, 8, 8), torch.zeros(2))


def test_the_clock_is_held_within_the_levels_that_were_trained():
    clock = Held(-4.0, 3.0)
    lams = torch.tensor([-torch.inf, -4.0, 0.5, 3.0, torch.inf])
    assert clock(Level.at(lams)).tolist() == pytest.approx([1.0, 1.0, -0.125, -0.75, -0.75])


@pytest.mark.parametrize("size", [(7,), (6, 9), (4, 5, 3)])
def test_the_network_reads_any_data_with_no_more_than_the_down_path(size):
    torch.manual_seed(0)
    settings = {"dims": len(size), "width": 16, "mults": (1, 2), "patch": 2, "augment": 2}
    net, whole = EncoderUNet(3, 5, transformer=1, **settings), UNet(3, transformer=1, **settings)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x, time = torch.randn(4, 3, *size), torch.randn(4)
    net(x, time, Cond(augment=torch.ones(4, 2))).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert sum(p.numel() for p in net.parameters()) < sum(p.numel() for p in whole.parameters())
    plain = net(x, time)
    assert plain.shape == (4, 5)
    for other in (net(x + 0.1, time), net(x, time + 0.1), net(x, time, Cond(augment=torch.ones(4, 2)))):
        assert (other - plain).abs().min() > 1e-6
    assert torch.equal(net(x, time, Cond(augment=torch.zeros(4, 2))), plain)


def told(labels, classes=3):
    return Label(classes)(labels)


def test_the_objective_is_the_cross_entropy_and_the_share_of_wrong_classes():
    model, x0, eps = rough(), *torch.randn(2, 4, *SHAPE).double()
    level = Level.at(torch.tensor([-1.0, 0.0, 1.0, 2.0]).double())
    wide = level.reshape(-1, 1, 1, 1)
    p = model(wide.alpha * x0 + wide.sigma * eps, wide).softmax(1)
    labels = p.argmax(1)
    labels[2:] = (labels[2:] + 1) % 3
    got = ClassifierObjective(VP())(model, x0, eps, level, told(labels))
    assert torch.allclose(got.loss, -p[range(4), labels].log())
    assert got.error.tolist() == [0, 0, 1, 1]
    assert torch.equal(got.lam, level.lam)
    several = ClassifierObjective(VP())(model, x0, eps, level, told([[0, 2], [], [1], [0, 1, 2]]))
    log_p = p.log()
    expected = torch.stack([-(log_p[0, 0] + log_p[0, 2]) / 2, torch.tensor(0.0), -log_p[2, 1], -log_p[3].mean()])
    assert torch.allclose(several.loss, expected)
    assert several.error[3] == 0


def test_the_true_classes_have_the_least_loss():
    """Gibbs' inequality for the exact classes of a mixture against sharper and flatter ones."""
    exact, level = mixture(), Level.at(-0.5)
    x0, labels = drawn(exact, 20_000, 3)
    model = Classifier(nn.Linear(1, 1), EDMPrecond(0.6), PRIOR)
    losses = {}
    for power in (0.8, 1.0, 1.25):
        model.forward = lambda x, lv, cond, power=power: power * exact.classes(x, lv)
        per_sample = Level(level.alpha.expand(len(x0)), level.sigma.expand(len(x0)))
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(4))
        losses[power] = float(ClassifierObjective(VP())(model, x0, eps, per_sample, told(labels)).loss.detach().mean())
    assert losses[1.0] < min(losses[0.8], losses[1.25]) - 1e-3


def test_labels_are_never_dropped():
    x, labels = drawn(mixture(), 32, 0)
    found = []
    for share in (0.0, 1.0):
        torch.manual_seed(0)
        model = Classifier(EncoderUNet(1, 3, width=16, mults=(1,)), EDMPrecond(0.6), PRIOR)
        plan = Plan(steps=3, batch=8, cond_dropout=share)
        found.append([s.loss for s in train(model, x, ClassifierObjective(VP()), plan, cond=told(labels))])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


@pytest.mark.parametrize(
    "cond", [None, told([0, 1], 4), Cond(tokens=torch.ones(2, 1, 1))], ids=["none", "four", "tokens"]
)
def test_a_batch_without_labels_of_its_classes_is_refused(cond):
    x = torch.zeros(2, *SHAPE).double()
    with pytest.raises(
        InputError, match=r"labels of its 3 classes, got (none|those of 4): .*cond=Label\(3\)\(labels\)"
    ):
        ClassifierObjective(VP())(rough(), x, x, Level.at(torch.zeros(2)), cond)


def test_what_cannot_be_trained_is_refused_before_it_begins():
    x = torch.zeros(4, *SHAPE)
    with pytest.raises(InputError, match="trains a Classifier, got Denoiser: Objective trains denoisers"):
        next(train(Denoiser(UNet(1, width=16), V()), x, ClassifierObjective(VP()), Plan(steps=1, batch=2)))
    objective = ClassifierObjective(VP(), UniformInLam(-20.0, -10.0))
    with pytest.raises(InputError, match="has no level of the schedule"):
        next(train(rough(), x, objective, Plan(steps=1, batch=2), cond=told([0, 1, 2, 0])))


def test_levels_are_drawn_as_those_of_denoisers():
    from undiffuse.train import Objective

    for schedule, levels in ((VP(), UniformInLam(-4.0, 3.0)), (Flow(), LogNormal())):
        ours = ClassifierObjective(schedule, levels).draw(6, seed=3, step=2)
        theirs = Objective(schedule, levels).draw(6, seed=3, step=2)
        assert torch.equal(ours.level.lam, theirs.level.lam)
        assert torch.equal(ours.weight, theirs.weight)


def test_calibration_of_a_calibrated_one_and_of_one_too_sure():
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(50_000, 4, generator=g).double()
    p = logits.softmax(1)
    labels = torch.multinomial(p, 1, generator=g)[:, 0]
    right = calibration(p.log(), labels)
    assert right.ece < 0.01
    assert right.accuracy == pytest.approx(float(p.max(1).values.mean()), abs=0.01)
    assert right.loss == pytest.approx(float(torch.special.entr(p).sum(1).mean()), abs=0.01)
    sharp = calibration((2 * logits).log_softmax(1), labels)
    gap = float((2 * logits).softmax(1).max(1).values.mean()) - right.accuracy
    assert sharp.ece == pytest.approx(gap, abs=0.01)
    assert sharp.ece > 0.1
    assert sharp.accuracy == right.accuracy
    assert sharp.loss > right.loss
    with pytest.raises(InputError, match="labels"):
        calibration(p.log(), labels[:3])
