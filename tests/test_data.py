"""Data sets: the digits, splits, array files and what is refused."""

import numpy as np
import pytest
import torch

from undiffuse import InputError
from undiffuse.data import BUILT_IN, Data, load_data


def numbered(n=50):
    """Data whose sample k holds the value k, labelled by k modulo 7."""
    return Data(torch.arange(n).float()[:, None, None].expand(n, 2, 3), torch.arange(n) % 7, "numbered")


def images(n=6):
    """Random bytes (n, 1, 4, 5)."""
    return np.random.default_rng(0).integers(0, 256, (n, 1, 4, 5), dtype=np.uint8)


def test_digits_are_the_uci_digits_in_range():
    from sklearn.datasets import load_digits

    data, raw = load_data("digits"), load_digits()
    assert (data.x.shape, data.x.dtype, data.labels.dtype) == ((1797, 1, 8, 8), torch.float32, torch.int64)
    assert (float(data.x.min()), float(data.x.max()), data.classes, len(data)) == (-1, 1, 10, 1797)
    assert torch.equal((data.x.flatten(1) + 1) * 8, torch.from_numpy(raw.data).float())
    assert data.labels.tolist() == raw.target.tolist()
    assert int(data.labels.bincount().min()) > 170


def test_split_is_disjoint_and_complete_and_keeps_labels():
    train, held_out = numbered().split(15)
    ids = [part.x[:, 0, 0].long() for part in (train, held_out)]
    assert [len(part) for part in (train, held_out)] == [35, 15]
    assert sorted(torch.cat(ids).tolist()) == list(range(50))
    for part, rows in zip((train, held_out), ids, strict=True):
        assert torch.equal(part.labels, rows % 7)
    assert (train.name, held_out.name) == ("numbered (train)", "numbered (held out)")


def test_split_depends_on_the_seed_alone():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    first = numbered().split(15)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    for a, b, c in zip(first, numbered().split(15), numbered().split(15, seed=1), strict=True):
        assert torch.equal(a.x, b.x)
        assert not torch.equal(a.x, c.x)
    smaller, larger = (set(numbered().split(n)[1].x[:, 0, 0].tolist()) for n in (10, 20))
    assert smaller < larger


def test_split_draws_every_sample_equally_often():
    counts = sum(numbered(10).split(3, seed=s)[1].x[:, 0, 0].long().bincount(minlength=10) for s in range(1000))
    assert int((counts - 300).abs().max()) < 60


def test_split_without_labels_has_none():
    assert all(part.labels is None and part.classes == 0 for part in Data(torch.zeros(5, 1, 2)).split(2))


@pytest.mark.parametrize("held_out", [0, 1, -1, 49, 50, 51])
def test_impossible_splits_are_refused(held_out):
    with pytest.raises(InputError, match=f"cannot hold out {held_out} of 50"):
        numbered().split(held_out)


def test_uint8_maps_to_the_unit_range(tmp_path):
    every = np.arange(256, dtype=np.uint8).reshape(2, 1, 128)
    np.save(tmp_path / "bytes.npy", every)
    x = load_data(str(tmp_path / "bytes.npy")).x.flatten()
    assert (float(x[0]), float(x[255])) == (-1, 1)
    assert torch.allclose(x, torch.linspace(-1, 1, 256), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_are_taken_as_they_are(tmp_path, dtype):
    x = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(dtype)
    np.save(tmp_path / "floats.npy", x)
    data = load_data(str(tmp_path / "floats.npy"))
    assert data.x.dtype == torch.float32
    assert np.array_equal(data.x.numpy(), x.astype(np.float32))
    assert (data.labels, data.classes, data.name) == (None, 0, "floats")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_npz_holds_samples_and_labels(tmp_path, save, dtype):
    save(tmp_path / "set.npz", x=images(), labels=np.array([0, 3, 1, 1, 2, 0], dtype), other=np.zeros(9))
    data = load_data(str(tmp_path / "set.npz"))
    assert torch.allclose((data.x + 1) * 127.5, torch.from_numpy(images()).float(), atol=1e-4)
    assert (data.labels.tolist(), data.labels.dtype, data.classes) == ([0, 3, 1, 1, 2, 0], torch.int64, 4)
    save(tmp_path / "bare.npz", x=images())
    assert load_data(str(tmp_path / "bare.npz")).labels is None


def test_memory_order_does_not_matter(tmp_path):
    np.save(tmp_path / "f.npy", np.asfortranarray(images()))
    np.save(tmp_path / "c.npy", images())
    assert torch.equal(load_data(str(tmp_path / "f.npy")).x, load_data(str(tmp_path / "c.npy")).x)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_pickled_arrays_are_refused_and_never_run(tmp_path, suffix):
    path, mark = tmp_path / f"evil.{suffix}", tmp_path / "executed"
    array = np.array([[[Payload(mark)]]] * 3, dtype=object)
    if suffix == "npy":
        np.save(path, array, allow_pickle=True)
    else:
        np.savez(path, x=array)
    with pytest.raises(InputError, match="pickled arrays are refused"):
        load_data(str(path))
    assert not mark.exists()
    np.load(path, allow_pickle=True)["x" if suffix == "npz" else ...]
    assert mark.exists()


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_truncated_files_are_refused_wherever_they_end(tmp_path, suffix):
    path = tmp_path / f"whole.{suffix}"
    np.save(path, images()) if suffix == "npy" else np.savez_compressed(path, x=images(), labels=np.arange(6))
    whole = path.read_bytes()
    assert len(load_data(str(path))) == 6
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=f"whole.{suffix} is not a readable array file"):
            load_data(str(path))


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused_wherever_the_damage_is(tmp_path, suffix):
    path, raised = tmp_path / f"whole.{suffix}", set()
    np.save(path, images(2)) if suffix == "npy" else np.savez_compressed(path, x=images(2))
    whole = path.read_bytes()
    for i in range(len(whole)):
        for change in (255, 1 << i % 8):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ change]) + whole[i + 1 :])
            try:
                load_data(str(path))
            except Exception as error:
                raised.add(type(error))
    assert raised == {InputError}


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(np.full((4, 1, 2), "a")),
        pytest.param(np.zeros((4, 1, 2), "M8[s]")),
        pytest.param(np.ones((4, 1, 2), complex)),
        pytest.param(np.full((4, 1, 2), 1e300)),
        pytest.param(np.zeros((4, 1, 0))),
        pytest.param(np.full((4, 1, 2), 200)),
    ],
)
@pytest.mark.filterwarnings("ignore:Casting complex")
def test_arrays_of_other_kinds_are_refused(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(InputError):
        load_data(str(tmp_path / "x.npy"))


def test_byte_order_does_not_matter(tmp_path):
    x = np.random.default_rng(0).normal(size=(4, 2, 3)).astype("<f4")
    np.save(tmp_path / "big.npy", x.astype(">f4"))
    assert np.array_equal(load_data(str(tmp_path / "big.npy")).x.numpy(), x)


@pytest.mark.parametrize(
    "suffix",
    [
        pytest.param("npy"),
        pytest.param("npz"),
    ],
)
def test_files_named_as_the_other_kind_are_refused_or_read(tmp_path, suffix):
    with open(tmp_path / f"x.{suffix}", "wb") as file:
        np.savez(file, x=images()) if suffix == "npy" else np.save(file, images())
    try:
        assert len(load_data(str(tmp_path / f"x.{suffix}"))) == 6
    except InputError as error:
        assert f"x.{suffix}" in str(error)  # noqa: PT017


def test_archives_without_x_and_missing_files_are_refused(tmp_path):
    np.savez(tmp_path / "set.npz", y=images())
    with pytest.raises(InputError, match=r"set.npz has no array named 'x'"):
        load_data(str(tmp_path / "set.npz"))
    with pytest.raises(InputError, match=r"absent.npy does not exist"):
        load_data(str(tmp_path / "absent.npy"))
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(InputError, match=r"folder.npz does not exist"):
        load_data(str(tmp_path / "folder.npz"))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("digit", "unknown data set 'digit': did you mean 'digits'"),
        ("Digits", "did you mean 'digits'"),
        ("pictures.zip", r"built in: digits, .*; or give a folder of pictures, or .npy, .npz"),
        ("", "built in: digits"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, why):
    with pytest.raises(InputError, match=why):
        load_data(name)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name == "digits" or name.startswith("toy-")])
def test_every_built_in_set_loads_by_name(name):
    data = load_data(name)
    assert data.name == name
    assert 0.5 < float(data.x.abs().max()) < 1.1
    assert torch.equal(data.x, load_data(name).x)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_sample_that_is_not_finite_is_named(tmp_path, value):
    x = torch.zeros(9, 1, 3, 3)
    x[4, 0, 2, 1], x[7] = value, value
    with pytest.raises(InputError, match="faces: 2 samples have NaN or infinite values, the first is 4"):
        Data(x, name="faces")
    np.save(tmp_path / "faces.npy", x.numpy())
    with pytest.raises(InputError, match="faces: 2 samples have NaN or infinite values, the first is 4"):
        load_data(str(tmp_path / "faces.npy"))


@pytest.mark.parametrize("shape", [(5,), (5, 3), (1, 1, 4), (0, 1, 4)])
def test_samples_of_wrong_shape_are_refused(shape):
    with pytest.raises(InputError, match=rf"shape \({', '.join(map(str, shape))}.*expected \(n, channels, side"):
        Data(torch.zeros(shape))


@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(3, dtype=torch.long),
        torch.zeros(4, 1, dtype=torch.long),
        torch.zeros(4),
        torch.tensor([0, 1, -1, 2]),
        torch.tensor(1),
        pytest.param(torch.zeros(4, dtype=torch.complex64)),
        pytest.param(torch.zeros(4, dtype=torch.bool)),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels):
    with pytest.raises(InputError, match="labels must be 4 whole numbers >= 0"):
        Data(torch.zeros(4, 1, 2), labels)


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(np.array(["cat", "dog", "cat"])),
        pytest.param(np.array([0, 1, 2], np.uint64)),
    ],
)
def test_labels_in_files_are_read_or_refused(tmp_path, labels):
    np.savez(tmp_path / "set.npz", x=images(3), labels=labels)
    try:
        assert load_data(str(tmp_path / "set.npz")).labels.tolist() == [0, 1, 2]
    except InputError as error:
        assert "labels" in str(error)  # noqa: PT017


def test_labels_may_be_a_list():
    data = Data(torch.zeros(3, 1, 2), [0, 5, 2])
    assert (data.labels.tolist(), data.labels.dtype, data.classes) == ([0, 5, 2], torch.int64, 6)
