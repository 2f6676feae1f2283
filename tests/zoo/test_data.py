"""The data sets: parsers on files written here, balanced draws, preprocessing; the real files where given."""

from __future__ import annotations

import gzip
import os
import pickle
import struct

import numpy as np
import pytest
import torch

from deepspectra import zoo
from deepspectra.errors import DataError, FileError, OptionError
from deepspectra.zoo import CIFAR100_SAMPLE_SIZES, DATA_NAMES, SAMPLE_SIZES, load

needs_data = pytest.mark.skipif(
    not os.environ.get("DEEPSPECTRA_DATA"),
    reason="DEEPSPECTRA_DATA does not name a folder with the data sets",
)


# --- files


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)


@pytest.fixture
def labels():
    return np.tile(np.arange(10, dtype=np.uint8), 2)


def write_mnist(folder, images, labels, *, stem="train", compress=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in ((f"{stem}-images-idx3-ubyte", images), (f"{stem}-labels-idx1-ubyte", labels)):
        raw = idx(array)
        (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(raw) if compress else raw)


def cifar_batch(num, *, seed=0, num_classes=10, key=b"labels"):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (num, 3072), dtype=np.uint8)
    return {b"data": pixels, key: [int(c) for c in np.arange(num) % num_classes]}


def write_pickle(path, batch, protocol=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(batch, protocol=protocol))


@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "mnist"), ("mnist", "MNIST/raw"), ("mnist", "."), ("fashion", "fashion"), ("fashion", ".")],
)
@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_are_read_wherever_they_may_lie(tmp_path, images, labels, name, folder, compress):
    write_mnist(tmp_path / folder, images, labels, compress=compress)
    data = load(name, root=tmp_path, preprocess=False)
    assert data.inputs.shape == (20, 1, 28, 28)
    assert data.inputs.dtype == torch.float32
    assert data.targets.dtype == torch.int64
    np.testing.assert_array_equal((data.inputs[:, 0] * 255).round().numpy(), images)
    np.testing.assert_array_equal(data.targets.numpy(), labels)
    assert (data.num_classes, data.input_shape, data.name, data.split) == (10, (1, 28, 28), name, "train")


def test_the_test_split_is_the_other_pair_of_files(tmp_path, images, labels):
    write_mnist(tmp_path, images, labels)
    with pytest.raises(FileError, match="t10k-images-idx3-ubyte"):
        load("mnist", root=tmp_path, split="test")
    write_mnist(tmp_path, images[:10], labels[:10], stem="t10k")
    assert len(load("mnist", root=tmp_path, split="test")) == 10


@pytest.mark.parametrize("compress", [False, True])
def test_a_truncated_idx_file_is_named(tmp_path, images, labels, compress):
    write_mnist(tmp_path, images, labels, compress=compress)
    path = tmp_path / ("train-images-idx3-ubyte" + ".gz" * compress)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileError, match=path.name):
        load("mnist", root=tmp_path)


@pytest.mark.parametrize("raw", [b"", b"\x00\x00\x08\x03", idx(np.zeros(20, np.uint8)), b"\x00\x00\x0d\x03" * 9])
def test_a_wrong_magic_number_is_told(tmp_path, images, labels, raw):
    write_mnist(tmp_path, images, labels)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(raw)
    with pytest.raises(FileError, match="00000803"):
        load("mnist", root=tmp_path)


def test_images_and_labels_must_be_as_many(tmp_path, images, labels):
    write_mnist(tmp_path, images, labels[:19])
    with pytest.raises(FileError, match="19 labels for 20 images"):
        load("mnist", root=tmp_path)


def test_labels_out_of_range_are_refused(tmp_path, images, labels):
    write_mnist(tmp_path, images, labels + 1)
    with pytest.raises(DataError, match="0 … 9"):
        load("mnist", root=tmp_path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar_pickles_are_read_channel_first(tmp_path, protocol):
    batches = [cifar_batch(10, seed=k) for k in range(1, 6)]
    for k, batch in enumerate(batches, start=1):
        write_pickle(tmp_path / "cifar-10-batches-py" / f"data_batch_{k}", batch, protocol)
    data = load("cifar10", root=tmp_path, preprocess=False)
    expected = np.concatenate([batch[b"data"] for batch in batches]).reshape(50, 3, 32, 32)
    np.testing.assert_array_equal((data.inputs * 255).round().numpy(), expected)
    assert data.targets.tolist() == list(range(10)) * 5
    with pytest.raises(FileError, match="test_batch"):
        load("cifar10", root=tmp_path, split="test")


def test_cifar_100_takes_the_fine_labels(tmp_path):
    batch = cifar_batch(100, num_classes=100, key=b"fine_labels") | {b"coarse_labels": [0] * 100}
    write_pickle(tmp_path / "cifar-100-python" / "test", batch)
    data = load("cifar100", root=tmp_path, split="test")
    assert data.targets.tolist() == list(range(100))
    assert (data.class_names[0], data.class_names[99]) == ("apple", "worm")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("broken-out",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batch = cifar_batch(100, num_classes=100, key=b"fine_labels") | {b"data": Evil()}
    write_pickle(tmp_path / "cifar-100-python" / "train", batch)
    with pytest.raises(FileError, match="mkdir"):
        load("cifar100", root=tmp_path)
    assert not (tmp_path / "broken-out").exists()


@pytest.mark.parametrize("keep", [0, 10, 500])
def test_a_truncated_pickle_is_named(tmp_path, keep):
    path = tmp_path / "cifar-100-python" / "train"
    write_pickle(path, cifar_batch(100, num_classes=100, key=b"fine_labels"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileError, match="no batch of cifar100"):
        load("cifar100", root=tmp_path)


@pytest.mark.parametrize("batch", [{}, [1], {b"data": np.zeros((2, 9), np.uint8), b"fine_labels": [0, 1]}])
def test_a_pickle_of_something_else_is_refused(tmp_path, batch):
    write_pickle(tmp_path / "cifar-100-python" / "train", batch)
    with pytest.raises(FileError, match="cifar100"):
        load("cifar100", root=tmp_path)


def write_npz(path, num=10, **change):
    rng = np.random.default_rng(0)
    arrays = {
        "train_x": rng.integers(0, 256, (num, 32, 32, 3), dtype=np.uint8),
        "train_y": np.arange(num) % 10,
    }
    np.savez(path, **{key: array for key, array in (arrays | change).items() if array is not None})
    return arrays


def test_npz_arrays_are_read_channel_first(tmp_path):
    arrays = write_npz(tmp_path / "cifar10_subset.npz")
    data = load("cifar10", root=tmp_path, preprocess=False)
    np.testing.assert_array_equal((data.inputs * 255).round().numpy(), arrays["train_x"].transpose(0, 3, 1, 2))
    assert data.inputs.is_contiguous()


def test_bad_npz_files_are_refused(tmp_path):
    path = tmp_path / "cifar10_subset.npz"
    write_npz(path, train_x=np.zeros((10, 28, 28, 3), np.uint8))
    with pytest.raises(FileError, match=r"expected uint8"):
        load("cifar10", root=tmp_path)
    write_npz(path, train_y=None)
    with pytest.raises(FileError, match="train_y"):
        load("cifar10", root=tmp_path)
    write_npz(path, train_y=np.array([Evil()] * 10))
    with pytest.raises(FileError, match="cannot be read"):
        load("cifar10", root=tmp_path)
    write_npz(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(FileError, match="cannot be read"):
        load("cifar10", root=tmp_path)


def test_missing_files_say_where_they_are_expected(tmp_path, monkeypatch):
    with pytest.raises(FileError, match=r"train-images-idx3-ubyte\.gz in .*fashion"):
        load("fashion", root=tmp_path)
    with pytest.raises(FileError, match=r"cifar-10-batches-py.*cifar10_subset\.npz"):
        load("cifar10", root=tmp_path)
    with pytest.raises(FileError, match="does not exist"):
        load("mnist", root=tmp_path / "nowhere")
    monkeypatch.delenv("DEEPSPECTRA_DATA", raising=False)
    with pytest.raises(FileError, match=r"pass root=.*DEEPSPECTRA_DATA"):
        load("mnist")


def test_the_environment_names_the_folder(tmp_path, monkeypatch, images, labels):
    write_mnist(tmp_path, images, labels)
    monkeypatch.setenv("DEEPSPECTRA_DATA", str(tmp_path))
    assert len(load("mnist")) == 20


# --- preprocessing


def test_padding_is_black_before_the_mean_is_subtracted(tmp_path, images, labels):
    write_mnist(tmp_path, images, labels)
    plain, padded = load("mnist", root=tmp_path), load("mnist", root=tmp_path, size=32)
    assert padded.inputs.shape == (20, 1, 32, 32)
    torch.testing.assert_close(padded.inputs[:, :, 2:30, 2:30], plain.inputs)
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:30, 2:30] = False
    black = torch.tensor(-0.1307 / 0.3081)
    torch.testing.assert_close(padded.inputs[:, 0, border], black.expand(20, 32 * 32 - 28 * 28))
    expected = (torch.from_numpy(images)[:, None].double() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(plain.inputs.double(), expected, rtol=1e-5, atol=1e-5)


def test_colours_are_standardised_each_by_its_own(tmp_path):
    arrays = write_npz(tmp_path / "cifar10_subset.npz")
    mean, std = np.array([125.3, 123.0, 113.9]), np.array([63.0, 62.1, 66.7])
    expected = ((arrays["train_x"] - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(load("cifar10", root=tmp_path).inputs.numpy(), expected, atol=1e-5)


def test_the_digits_are_split_by_class_and_standardised():
    train, test = load("digits"), load("digits", split="test")
    assert len(train) + len(test) == 1797
    assert (test.targets.bincount() / (train.targets.bincount() + test.targets.bincount())).sub(
        0.2
    ).abs().max() < 0.01
    assert train.input_shape == (1, 8, 8)
    assert train.inputs.mean().item() == pytest.approx(0, abs=1e-3)
    assert train.inputs.std().item() == pytest.approx(1, abs=1e-3)
    assert {tuple(x.flatten().tolist()) for x in train.inputs}.isdisjoint(
        tuple(x.flatten().tolist()) for x in test.inputs
    )
    x, y = train[3]
    assert x.shape == (1, 8, 8)
    assert y == train.targets[3]


# --- balanced draws


def test_a_draw_is_balanced_seeded_and_nested():
    whole = load("digits")
    everything = {tuple(x.flatten().tolist()): int(y) for x, y in zip(whole.inputs, whole.targets, strict=True)}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    small, large = load("digits", per_class=13), load("digits", per_class=26)
    assert torch.equal(torch.get_rng_state(), before)
    assert small.targets.bincount().tolist() == [13] * 10
    rows_small = {tuple(x.flatten().tolist()): int(y) for x, y in zip(small.inputs, small.targets, strict=True)}
    rows_large = {tuple(x.flatten().tolist()): int(y) for x, y in zip(large.inputs, large.targets, strict=True)}
    assert len(rows_small) == 130  # none twice
    assert rows_small.items() <= rows_large.items() <= everything.items()
    assert torch.equal(load("digits", per_class=13).inputs, small.inputs)
    assert not torch.equal(load("digits", per_class=13, seed=1).inputs, small.inputs)


def test_a_class_with_too_few_examples_is_told():
    with pytest.raises(DataError, match=r"Class 0 of digits \(train\) has 143 .* at most 140"):
        load("digits", per_class=144)


def test_the_sample_sizes_are_the_papers():
    for sizes, largest in ((SAMPLE_SIZES, 5000), (CIFAR100_SAMPLE_SIZES, 500)):
        assert sizes == tuple(int(n + 1e-9) for n in np.geomspace(10, largest, 20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "svhn"}, "one of " + ", ".join(map(repr, DATA_NAMES))),
        ({"split": "val"}, "one of 'train', 'test'"),
        ({"per_class": 0}, "at least 1"),
        ({"size": 7}, "larger size"),
    ],
)
def test_misuse_says_what_to_do(change, message):
    with pytest.raises(OptionError, match=message):
        load(**({"name": "digits"} | change))


# --- the real files


@needs_data
@pytest.mark.parametrize(("name", "smallest"), [("mnist", 5421), ("fashion", 6000)])
def test_the_real_idx_files_are_whole(name, smallest):
    data = load(name)
    assert data.inputs.shape == (60_000, 1, 28, 28)
    assert data.targets.bincount().min() == smallest
    if name == "mnist":  # .1307 and .3081 are the mean and deviation of these very pixels
        assert data.inputs.mean().item() == pytest.approx(0, abs=1e-3)
        assert data.inputs.std().item() == pytest.approx(1, abs=1e-3)
    assert len(load(name, split="test")) == 10_000


@needs_data
@pytest.mark.parametrize(("name", "num_classes"), [("cifar10", 10), ("cifar100", 100)])
def test_the_real_colour_images_are_standardised(name, num_classes):
    data = load(name, per_class=60)
    assert data.inputs.shape == (60 * num_classes, 3, 32, 32)
    torch.testing.assert_close(data.inputs.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=0.1)
    torch.testing.assert_close(data.inputs.std(dim=(0, 2, 3)), torch.ones(3), rtol=0, atol=0.1)


# --- other labels, fewer classes


def test_random_labels_are_drawn_once() -> None:
    data = zoo.load("digits", per_class=20)
    one, again, other = data.relabelled(0), data.relabelled(0), data.relabelled(1)
    assert torch.equal(one.targets, again.targets)
    assert not torch.equal(one.targets, other.targets)
    assert one.inputs is data.inputs
    assert one.name == "digits, random labels"
    assert float((one.targets == data.targets).double().mean()) < 0.25
    assert set(one.targets.tolist()) == set(range(10))


def test_the_first_classes_of_a_data_set() -> None:
    data = zoo.load("digits", per_class=5)
    some = data.of_classes(3)
    assert some.targets.unique().tolist() == [0, 1, 2]
    assert torch.equal(some.inputs, data.inputs[data.targets < 3])
    assert some.class_names == ("0", "1", "2")
    assert (some.name, data.of_classes(10).name) == ("digits, 3 classes", "digits")
    for num in (1, 11):
        with pytest.raises(OptionError, match="at least 2 and at most 10"):
            data.of_classes(num)
