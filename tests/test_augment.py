"""Augmentation: each transformation against an exact answer, its labels, its randomness, and that it does not leak."""

import itertools
import math

import pytest
import torch

from tests.test_nets import inputs, relative, unet
from undiffuse import VP, Cond, Denoiser, EDMPrecond, InputError, Label, Level, V
from undiffuse.nets import UNet
from undiffuse.train import Objective, Plan, train
from undiffuse.train.augment import AUGMENTS, Flip, Geometric, labelled
from undiffuse.train.objective import LogNormal

X = torch.rand(5, 3, 9, 9, generator=torch.Generator().manual_seed(0)) * 2 - 1
INDEX = torch.arange(5)
MANY = torch.arange(40_000)
OFF = {"x_flip": False, "y_flip": False, "scale": 0.0, "rotation": 0.0, "anisotropy": 0.0, "translation": 0.0}
COLUMNS = {"x_flip": [0], "y_flip": [1], "scale": [2], "rotation": [3, 4], "anisotropy": [5, 6], "translation": [7, 8]}


def only(name, p=1.0):
    """The default pipeline with one transformation."""
    return Geometric(p, **{**OFF, name: getattr(Geometric(), name)})


def labels(b=1, **columns):
    """Labels (b, 9) with these columns, by name; a rotation by its angle."""
    made = torch.zeros(b, 9)
    for name, value in columns.items():
        values = [math.cos(value) - 1, math.sin(value)] if name == "rotation" else value
        made[:, COLUMNS[name]] = torch.as_tensor(values, dtype=torch.float32)
    return made


def blobs(side=129):
    """A smooth picture without symmetry, far from its edges: (1, 1, side, side)."""
    down, right = torch.meshgrid(*[torch.arange(side) - (side - 1) / 2] * 2, indexing="ij")
    return sum(
        a * torch.exp(-((right - x) ** 2 + (down - y) ** 2) / (2 * s**2))
        for a, x, y, s in ((1.0, 6, -4, 5), (-0.7, -6, 2, 4), (0.5, 2, 8, 6))
    )[None, None]


def centroid(x):
    """Where a positive picture's mass is, right and down of the centre, and its second moments (2, 2)."""
    h, w = x.shape[-2:]
    at = torch.stack(torch.meshgrid(torch.arange(h) - (h - 1) / 2, torch.arange(w) - (w - 1) / 2, indexing="ij"))
    at, mass = at.flip(0).double().flatten(1), x.double().flatten() / x.double().sum()
    middle = at @ mass
    return middle, (at - middle[:, None]) * mass @ (at - middle[:, None]).T


@pytest.mark.parametrize("kind", AUGMENTS)
def test_with_p_zero_nothing_happens(kind):
    augment = AUGMENTS[kind](**({} if kind == "none" else {"p": 0.0}))
    x, found = augment(X, 3, INDEX)
    assert torch.equal(x, X)
    assert torch.equal(found, torch.zeros(5, augment.dim))


@pytest.mark.parametrize("kind", AUGMENTS)
def test_rows_with_zero_labels_are_untouched_and_others_are_not(kind):
    x = X.repeat(40, 1, 1, 1)
    changed, found = AUGMENTS[kind]()(x, 3, torch.arange(200))
    moved, labelled = (changed != x).flatten(1).any(1), found.any(1)
    assert torch.equal(moved, labelled)
    assert bool(labelled.any()) == (kind != "none")
    assert not labelled.all()


@pytest.mark.parametrize("augment", [Flip(1.0), only("x_flip")], ids=["flip", "geometric"])
def test_mirrored_left_to_right(augment):
    x, found = augment(X, 0, INDEX)
    assert torch.equal(x, X.flip(-1))
    assert torch.equal(found, torch.eye(augment.dim)[:1].expand(5, -1))


def test_mirrored_upside_down():
    x, found = only("y_flip")(X, 0, INDEX)
    assert torch.equal(x, X.flip(-2))
    assert torch.equal(found, labels(5, y_flip=[1]))


@pytest.mark.parametrize("quarters", [-1, 1, 2, 3])
def test_a_quarter_turn_is_counter_clockwise(quarters):
    turned = Geometric().warp(X, labels(5, rotation=quarters * math.pi / 2))
    assert torch.allclose(turned, torch.rot90(X, quarters, (-2, -1)), atol=1e-4)


@pytest.mark.parametrize(("right", "down"), [(1, 0), (0, 2), (-2, 3), (0.5, 0)])
@pytest.mark.parametrize(("h", "w"), [(8, 8), (8, 16), (5, 12)])
def test_a_translation_by_whole_pixels_goes_on_as_mirrored(h, w, right, down):
    """z such that 0.125 z of the side is that many pixels; the half pixel is the mean of the two for a ramp."""
    x = torch.rand(1, 2, h, w, generator=torch.Generator().manual_seed(1))
    if right == 0.5:
        x = torch.arange(float(w)).expand(1, 1, h, w)
    moved = Geometric().warp(x, labels(translation=[right / 0.125 / w, down / 0.125 / h]))
    if right == 0.5:
        assert torch.allclose(moved[..., 2:-2], x[..., 2:-2] - 0.5, atol=1e-4)
        return
    mirrored = torch.cat([x.flip(-1), x, x.flip(-1)], -1)
    mirrored = torch.cat([mirrored.flip(-2), mirrored, mirrored.flip(-2)], -2)
    assert torch.allclose(moved, mirrored[..., h - down : 2 * h - down, w - right : 2 * w - right], atol=1e-4)


def test_unit_scale_and_a_whole_turn_are_the_identity():
    for settings in (labels(5, scale=[1e-7]), labels(5, anisotropy=[0.0, 1e-7]), labels(5, rotation=2 * math.pi)):
        assert torch.allclose(Geometric().warp(X, settings), X, atol=1e-4)
        assert settings.any()


def test_flips_come_first():
    """R F, not F R: a turn after the mirror."""
    both = Geometric().warp(X, labels(5, x_flip=[1], rotation=math.pi / 2))
    assert torch.allclose(both, torch.rot90(X.flip(-1), 1, (-2, -1)), atol=1e-4)
    assert not torch.allclose(both, torch.rot90(X, 1, (-2, -1)).flip(-1), atol=0.1)


@pytest.mark.parametrize("z", [-1.5, 1.0, 2.0])
def test_scaling_multiplies_distances_by_a_power_of_two(z):
    """The second moments of a blob, its distance from the centre and its mass."""
    blob = torch.exp(-((torch.arange(65) - 40.0)[None] ** 2 + (torch.arange(65) - 30.0)[:, None] ** 2) / 18)[None, None]
    factor = 2 ** (0.2 * z)
    (before, spread), (after, wide) = (centroid(b) for b in (blob, Geometric().warp(blob, labels(scale=[z]))))
    assert torch.allclose(after, factor * before, atol=0.02)
    assert torch.allclose(wide, factor**2 * spread, rtol=0.01, atol=0.05)


@pytest.mark.parametrize("axis", [0.0, math.pi / 6, math.pi / 2, 2.5])
@pytest.mark.parametrize("z", [-1.0, 2.0])
def test_anisotropy_stretches_along_its_axis_and_shrinks_across(z, axis):
    """A round blob in the middle gets the covariance of an ellipse, with the same area; down counts against up."""
    at = torch.arange(65) - 32.0
    blob = torch.exp(-(at[None] ** 2 + at[:, None] ** 2) / (2 * 5.0**2))[None, None]
    stretched = Geometric().warp(blob, labels(anisotropy=[z * math.cos(2 * axis), z * math.sin(2 * axis)]))
    along = torch.tensor([math.cos(axis), -math.sin(axis)], dtype=torch.float64)
    across = torch.tensor([math.sin(axis), math.cos(axis)], dtype=torch.float64)
    spread = centroid(stretched)[1]
    assert float(along @ spread @ along) == pytest.approx(25 * 2 ** (0.4 * z), rel=0.01)
    assert float(across @ spread @ across) == pytest.approx(25 * 2 ** (-0.4 * z), rel=0.01)
    assert float(stretched.sum()) == pytest.approx(float(blob.sum()), rel=1e-3)


def test_order_is_flip_scale_rotation_anisotropy_translation():
    """One after the other they are what they are at once, up to interpolation."""
    parts = {"x_flip": [1], "scale": [1.0], "rotation": 0.7, "anisotropy": [0.8, -0.5], "translation": [0.4, -0.6]}
    once, x = Geometric().warp(blobs(), labels(**parts)), blobs()
    for name, value in parts.items():
        x = Geometric().warp(x, labels(**{name: value}))
    assert relative(x, once) < 0.02
    x = blobs()
    for name, value in reversed(parts.items()):
        x = Geometric().warp(x, labels(**{name: value}))
    assert relative(x, once) > 0.2


@pytest.mark.parametrize("name", [*COLUMNS, "all"])
def test_labels_say_what_was_done_so_that_it_can_be_undone(name):
    """The inverse is written from the labels alone: the same transformations, inverted, in reverse order."""
    augment = Geometric(p=1.0) if name == "all" else only(name)
    x, found = augment(blobs().expand(16, -1, -1, -1), 11, torch.arange(16))
    assert float((x - blobs()).abs().amax((1, 2, 3)).min()) > 1e-3
    z = torch.zeros(16, 9)
    z[:, COLUMNS["translation"]] = -found[:, COLUMNS["translation"]]
    x = Geometric().warp(x, z)
    z = torch.zeros(16, 9)
    z[:, COLUMNS["anisotropy"]] = -found[:, COLUMNS["anisotropy"]]
    x = Geometric().warp(x, z)
    z = torch.zeros(16, 9)
    z[:, 2], z[:, 3], z[:, 4] = -found[:, 2], found[:, 3], -found[:, 4]
    x = Geometric().warp(x, z)
    z = torch.zeros(16, 9)
    z[:, :2] = found[:, :2]
    x = Geometric().warp(x, z)
    assert float((x - blobs())[..., 44:85, 44:85].abs().max()) < 0.05


@pytest.mark.parametrize("p", [0.12, 0.5, 1.0])
def test_each_transformation_is_done_with_its_probability_independently(p):
    found = Geometric(p).labels(5, MANY)
    done = torch.stack([found[:, columns].any(1) for columns in COLUMNS.values()]).double()
    sigma = math.sqrt(p * (1 - p) / len(MANY))
    assert float((done.mean(1) - p).abs().max()) <= 4.5 * sigma
    for a, b in itertools.combinations(done, 2):
        assert float((a * b).mean()) == pytest.approx(p**2, abs=4.5 * math.sqrt(p**2 * (1 - p**2) / len(MANY)))
    assert float(Flip(p)(torch.zeros(len(MANY), 1, 1, 1), 5, MANY)[1].mean()) == pytest.approx(p, abs=4.5 * sigma)


def test_strengths_are_normal_and_angles_uniform():
    found = Geometric(1.0, rotation=0.5).labels(6, MANY).double()
    root = math.sqrt(len(MANY))
    for column in (2, 7, 8):
        assert abs(float(found[:, column].mean())) < 4.5 / root
        assert float(found[:, column].var()) == pytest.approx(1, abs=4.5 * math.sqrt(2) / root)
    angle = torch.atan2(found[:, 4], found[:, 3] + 1)
    assert float(angle.abs().max()) <= math.pi / 2
    assert float(angle.var()) == pytest.approx(math.pi**2 / 12, abs=4.5 / root)
    assert float(found[:, 5].square().mean()) == pytest.approx(0.5, abs=4.5 / root)
    assert float(found[:, 5:7].square().sum(1).mean()) == pytest.approx(1, abs=4.5 * math.sqrt(2) / root)
    assert float(torch.corrcoef(found[:, 2:].T).fill_diagonal_(0).abs().max()) < 0.03


@pytest.mark.parametrize("name", COLUMNS)
def test_one_transformation_alone_leaves_the_labels_of_the_others_at_zero(name):
    found = only(name).labels(1, INDEX)
    assert found[:, COLUMNS[name]].any(1).all()
    found[:, COLUMNS[name]] = 0
    assert not found.any()


@pytest.mark.parametrize("augment", [Flip(), Geometric(0.5)])
def test_a_sample_is_the_same_in_every_batch_and_depends_on_the_seed(augment):
    x = torch.rand(24, 3, 10, 7, generator=torch.Generator().manual_seed(4))
    index = torch.arange(100, 124)
    whole = augment(x, 9, index)
    for size in (1, 5):
        parts = [augment(x[k : k + size], 9, index[k : k + size]) for k in range(0, 24, size)]
        assert all(
            torch.equal(torch.cat(part), all_) for part, all_ in zip(zip(*parts, strict=True), whole, strict=True)
        )
    backwards = augment(x.flip(0), 9, index.flip(0))
    assert torch.equal(backwards[0].flip(0), whole[0])
    assert not torch.equal(augment(x, 10, index)[1], whole[1])
    assert not torch.equal(augment(x, 9, index + 24)[1], whole[1])


def test_channels_move_alike_and_precision_is_kept():
    x, found = Geometric(1.0)(X[:, :1].repeat(1, 3, 1, 1).double(), 2, INDEX)
    assert (x.dtype, found.dtype) == (torch.float64, torch.float32)
    assert torch.equal(x[:, 0], x[:, 1])
    assert torch.equal(x[:, 0], x[:, 2])


def test_dropping_a_condition_keeps_the_augmentation():
    cond = Cond(vector=torch.ones(3, 2), augment=torch.arange(6.0).reshape(3, 2) + 1)
    dropped = cond.drop(torch.tensor([True, False, True]))
    assert dropped.vector.any(1).tolist() == [False, True, False]
    assert torch.equal(dropped.augment, cond.augment)
    assert torch.equal(cond.null().augment, cond.augment)
    assert torch.equal(Cond.cat([cond, cond[:1]])[3:].augment, cond.augment[:1])
    assert len(Cond(augment=cond.augment)) == 3


@pytest.mark.parametrize("cond", [None, Label(3)(INDEX % 3)])
def test_the_condition_of_an_augmented_batch(cond):
    told = labelled(cond, torch.ones(5, 9))
    assert torch.equal(told.augment, torch.ones(5, 9))
    assert told.vector is (None if cond is None else cond.vector)
    assert labelled(cond, torch.zeros(5, 0)) is cond


@pytest.mark.parametrize("vector", [0, 3])
def test_a_network_that_is_told_nothing_takes_data_as_they_are(vector):
    net, (x, t) = unet(vector=vector, augment=9), inputs(2, 2, 6, 6)
    told = Geometric(1.0).labels(0, INDEX[:2])
    cond = Label(3)([0, 1]) if vector else Cond()
    without = net(x, t, cond)
    assert torch.equal(net(x, t, Cond(vector=cond.vector, augment=torch.zeros(2, 9))), without)
    assert torch.equal(net(x, t), net(x, t, Cond(augment=torch.zeros(2, 9))))
    for column in range(9):
        one = torch.eye(9)[column].expand(2, -1)
        assert relative(net(x, t, Cond(vector=cond.vector, augment=one)), without) > 1e-2
    assert relative(net(x, t, Cond(vector=cond.vector, augment=told)), without) > 1e-2


def test_augmentation_adds_in_the_embedding():
    net, t = unet(vector=3, augment=2), torch.tensor([0.7])
    emb = net.embed(t, Cond(vector=torch.tensor([[0.0, 1, 0]]), augment=torch.tensor([[2.0, -1.0]])))
    raw = (
        net.embed.time(t)
        + net.embed.vector.weight[:, 1]
        + 2 * net.embed.augment.weight[:, 0]
        - net.embed.augment.weight[:, 1]
    )
    assert torch.allclose(emb, torch.nn.functional.silu(raw), atol=1e-6)


def test_a_network_without_augmentation_has_the_same_weights_as_ever():
    torch.manual_seed(0)
    plain = UNet(1, width=16).state_dict()
    torch.manual_seed(0)
    assert all(torch.equal(v, plain[k]) for k, v in UNet(1, width=16, augment=0).state_dict().items())
    assert not any("augment" in name for name in plain)


@pytest.mark.parametrize(
    ("net", "label", "why"),
    [
        (UNet(1, width=16), torch.zeros(2, 9), r"without augmentation labels \(augment=0\)"),
        (UNet(1, width=16, augment=9), torch.zeros(2, 8), r"augment of shape \(2, 8\): expected \(2, 9\)"),
    ],
)
def test_labels_that_the_network_cannot_read_are_refused(net, label, why):
    with pytest.raises(InputError, match=why):
        net(torch.zeros(2, 1, 4, 4), torch.zeros(2), Cond(augment=label))


@pytest.mark.parametrize("kind", [Flip, Geometric])
@pytest.mark.parametrize("shape", [(2, 8), (2, 1, 8), (2, 1, 4, 4, 4)])
def test_other_data_than_pictures_are_refused(kind, shape):
    with pytest.raises(InputError, match=r"only pictures.*augment=none"):
        kind()(torch.zeros(shape), 0, torch.arange(2))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Flip(1.1), "augment.p must be"),
        (lambda: Geometric(-0.1), "augment.p must be"),
        (lambda: Geometric(math.nan), "augment.p must be"),
        (lambda: Geometric(scale=-1.0), "augment.scale"),
        (lambda: Geometric(anisotropy=1.5), "augment.anisotropy"),
        (lambda: Geometric(translation=math.inf), "augment.translation"),
        (lambda: Geometric(rotation=2.0), "augment.rotation"),
        (lambda: UNet(1, width=16, augment=-1), "augment=-1"),
    ],
)
def test_impossible_settings_are_refused(make, why):
    with pytest.raises(InputError, match=why):
        make()


class Spy(torch.nn.Module):
    """Notes the pictures and labels that it is given; with hardly any noise, those are the data."""

    def __init__(self):
        super().__init__()
        self.w, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def forward(self, x, time, cond):
        self.seen += [(p, k, v) for p, k, v in zip(x, cond.augment, cond.vector, strict=True)]
        return self.w * x


def test_the_loop_gives_augmented_data_and_their_labels_whatever_is_dropped():
    spy, data = Spy(), torch.tensor([[1.0, 0.0, -1.0]]).repeat(40, 1, 1, 1)
    plan = Plan(steps=10, batch=40, cond_dropout=0.5)
    objective = Objective(VP(), LogNormal(-20.0, 0.01))
    list(train(Denoiser(spy, V()), data, objective, plan, cond=Label(2)(torch.ones(40).long()), augment=Flip(0.5)))
    pictures, told, vectors = (torch.stack(part) for part in zip(*spy.seen, strict=True))
    assert torch.allclose(pictures[:, 0, 0, 0], 1 - 2 * told[:, 0], atol=1e-4)
    for flipped in (0, 1):
        kept = vectors[told[:, 0] == flipped].any(1).double()
        assert float(kept.mean()) == pytest.approx(0.5, abs=4.5 * 0.5 / math.sqrt(len(kept)))
    assert 150 < float(told.sum()) < 250


def answers(told):
    """The least-noise-independent answer of a tiny network trained on one picture, mirrored half of the time: its
    distance from the picture and from the mirrored one, in units of theirs, at pure noise."""
    torch.manual_seed(0)
    picture = torch.where(torch.arange(8) < 3, 0.5, -0.5).expand(1, 1, 8, 8)
    model = Denoiser(UNet(1, width=16, mults=(1,), patch=2, augment=1), EDMPrecond())
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    level = Level.at(torch.linspace(-4, 2, 16, dtype=torch.float64)).reshape(-1, 1, 1, 1)
    for step in range(1, 151):
        index = torch.arange((step - 1) * 16, step * 16)
        x0, labels = Flip(0.5)(picture.repeat(16, 1, 1, 1), 0, index)
        cond = Cond(augment=labels) if told else None
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        (model(level.diffuse(x0, eps), level, cond) - x0).square().mean().backward()
        optimiser.step()
    noise = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1000))
    with torch.no_grad():
        x0 = model.eval()(noise, Level.at(-3.0))
    away = (picture - picture.flip(-1)).norm()
    return [float((x0 - p).flatten(1).norm(dim=1).mean() / away) for p in (picture, picture.flip(-1))]


def test_augmentation_that_the_network_is_told_of_does_not_leak():
    """Without a label the network answers the picture; one that was never told answers the mean of both."""
    near, far = answers(True)
    assert near < 0.2
    assert far > 0.8
    near, far = answers(False)
    assert near == pytest.approx(far, abs=0.2)
    assert near > 0.3
