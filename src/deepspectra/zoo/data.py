"""The papers' data sets, read from files the user has, and scikit-learn's digits, which need no file.

Nothing is downloaded. The folder of the files is the argument `root` or the environment variable
``DEEPSPECTRA_DATA``. Files are data, not programs: the pickles of CIFAR are read by an unpickler that builds
arrays, byte strings, lists and dictionaries only.

Sizes in comments: N examples, C channels, H × W pixels.
"""

from __future__ import annotations

import gzip
import math
import os
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from deepspectra.argument_checks import check_choice, check_count
from deepspectra.errors import DataError, FileError, OptionError

SAMPLE_SIZES = (
    *(10, 13, 19, 26, 37, 51, 71, 98, 136, 189, 263, 365, 506, 702, 974),
    *(1351, 1874, 2599, 3605, 5000),
)
"""Examples a class in the papers' sweeps: ⌊logspace(10, 5000, 20)⌋."""

CIFAR100_SAMPLE_SIZES = (
    *(10, 12, 15, 18, 22, 27, 34, 42, 51, 63, 78, 96, 118, 145, 178, 219, 269),
    *(331, 406, 500),
)
"""Examples a class in the papers' sweeps of CIFAR-100: ⌊logspace(10, 500, 20)⌋."""

ROOT_VARIABLE = "DEEPSPECTRA_DATA"
DAMAGED = (  # how reading a damaged file may fail
    *(OSError, EOFError, LookupError, TypeError, ValueError, AttributeError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
)

Images = npt.NDArray[np.uint8]  # (N, H, W, C)
Labels = npt.NDArray[np.int64]  # (N,)


@dataclass(frozen=True, eq=False)
class LabelledData(Dataset[tuple[Tensor, Tensor]]):
    """Images and their classes in memory; a map-style `Dataset` of (input, target) pairs.

    Attributes:
        inputs: (N, C, H, W) float32.
        targets: (N,) int64, in 0 … number of classes − 1.
        class_names: what each class is, in the order of the targets.
        name: the data set.
        split: "train" or "test".
    """

    inputs: Tensor
    targets: Tensor
    class_names: tuple[str, ...]
    name: str
    split: str

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) of one image."""
        return tuple(self.inputs.shape[1:])

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def of_classes(self, num: int) -> LabelledData:
        """The images of the first `num` classes.

        Raises:
            OptionError: fewer than two, or more than there are.
        """
        check_count(f"the number of classes of {self.name}", num, 2, self.num_classes)
        kept = self.targets < num
        name = self.name if num == self.num_classes else f"{self.name}, {num} classes"
        return replace(
            self,
            inputs=self.inputs[kept],
            targets=self.targets[kept],
            class_names=self.class_names[:num],
            name=name,
        )

    def relabelled(self, seed: int) -> LabelledData:
        """The same images with labels drawn at random, each class equally likely."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, self.num_classes, (len(self),), generator=generator)
        return replace(self, targets=labels, name=f"{self.name}, random labels")


class _Source(NamedTuple):
    """What is known of a data set besides its files."""

    mean: tuple[float, ...]  # of pixels in [0, 1], one a channel
    std: tuple[float, ...]
    class_names: tuple[str, ...]


_DIGITS = tuple("0123456789")
_CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""
_SOURCES = {
    # mean and standard deviation of the training split
    "digits": _Source((0.3051,), (0.3762,), _DIGITS),
    "mnist": _Source((0.1307,), (0.3081,), _DIGITS),
    "fashion": _Source(
        (0.5,),
        (0.5,),
        (
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
    ),
    "cifar10": _Source(
        (125.3 / 255, 123.0 / 255, 113.9 / 255),
        (63.0 / 255, 62.1 / 255, 66.7 / 255),
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
    "cifar100": _Source(
        (129.3 / 255, 124.1 / 255, 112.4 / 255),
        (68.2 / 255, 65.4 / 255, 70.4 / 255),
        tuple(_CIFAR100_CLASSES.split()),
    ),
}
DATA_NAMES = tuple(_SOURCES)


def load(
    name: str,
    *,
    root: str | Path | None = None,
    split: str = "train",
    per_class: int | None = None,
    size: int | None = None,
    preprocess: bool = True,
    seed: int = 0,
) -> LabelledData:
    """A data set, or a balanced part of it, ready for a network; no augmentation.

    Files, below `root` (gzipped or not for the first two):

    ========  =====================================================================================
    digits    none: 8 × 8 images that come with scikit-learn; every fifth of a class is the test split
    mnist     ``train-images-idx3-ubyte`` and its three siblings, in ``mnist``, ``MNIST/raw`` or `root`
    fashion   the same names, in ``fashion``, ``FashionMNIST/raw`` or `root`
    cifar10   ``cifar-10-batches-py`` (the Python version), else ``cifar10_subset.npz``
    cifar100  ``cifar-100-python``, else ``cifar100_subset.npz``
    ========  =====================================================================================

    The npz files hold ``train_x`` (N, 32, 32, 3) uint8, ``train_y`` (N,), ``test_x`` and ``test_y``: a part
    of the data set, for which the whole is too large to move.

    Args:
        name: one of `DATA_NAMES`.
        root: folder of the files; by default the environment variable ``DEEPSPECTRA_DATA``.
        split: "train" or "test".
        per_class: examples a class, drawn without replacement; by default all there are. The draw of a
            smaller number under the same seed is part of that of a larger one.
        size: side of the images, which are padded with black to it, evenly on all sides. The papers pad
            MNIST and Fashion-MNIST to 32 for the convolutional networks. By default no padding.
        preprocess: subtract the mean and divide by the standard deviation that the papers use, per channel
            (digits: those of the training split); otherwise pixels are in [0, 1].
        seed: seed of the draw.

    Returns:
        The data, in the order of the files.

    Raises:
        OptionError: an argument is outside its range.
        FileError: no folder was given, a file is missing, truncated or of another format.
        DataError: a class has fewer than `per_class` examples, or a file's labels are out of range.

    Source: Papyan, JMLR 2020 and the code of Papyan 2019.
    """
    check_choice("data", name, DATA_NAMES)
    check_choice("split", split, ("train", "test"))
    if per_class is not None:
        check_count("per_class", per_class)
    images, labels = _read(name, split, root)
    source = _SOURCES[name]
    num_classes = len(source.class_names)
    if not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(f"The {split} labels of {name} are not all in 0 … {num_classes - 1}.")
    if per_class is not None:
        chosen = _choose(torch.from_numpy(labels), num_classes, per_class, seed, f"{name} ({split})").numpy()
        images, labels = images[chosen], labels[chosen]
    inputs = _pad(torch.from_numpy(images), size, name).permute(0, 3, 1, 2)  # (N, C, H, W)
    inputs = inputs.to(torch.float32, memory_format=torch.contiguous_format)
    inputs /= 16 if name == "digits" else 255
    if preprocess:
        inputs -= torch.tensor(source.mean).view(-1, 1, 1)
        inputs /= torch.tensor(source.std).view(-1, 1, 1)
    return LabelledData(inputs, torch.from_numpy(labels), source.class_names, name, split)


def _pad(images: Tensor, size: int | None, name: str) -> Tensor:
    """Images (N, H, W, C) with a black border."""
    height, width = images.shape[1:3]
    if size is None or (height, width) == (size, size):
        return images
    if size < max(height, width):
        raise OptionError(
            f"size is {size}, but the images of {name} are {height} × {width}; they are only padded, so give "
            "a larger size or None."
        )
    top, left = (size - height) // 2, (size - width) // 2
    padded = images.new_zeros(len(images), size, size, images.shape[3])
    padded[:, top : top + height, left : left + width] = images
    return padded


def _choose(targets: Tensor, num_classes: int, per_class: int, seed: int, what: str) -> Tensor:
    """Ascending indices of `per_class` examples of each class."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for c in range(num_classes):
        members = (targets == c).nonzero().squeeze(1)
        if len(members) < per_class:
            raise DataError(
                f"Class {c} of {what} has {len(members)} examples, fewer than per_class={per_class}; "
                f"give a per_class of at most {int(targets.bincount(minlength=num_classes).min())}."
            )
        chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    return torch.cat(chosen).sort().values


def _read(name: str, split: str, root: str | Path | None) -> tuple[Images, Labels]:
    if name == "digits":
        return _read_digits(split)
    given = root if root is not None else os.environ.get(ROOT_VARIABLE)
    if not given:
        raise FileError(
            f"The files of {name} are not known: pass root= (--data-root on the command line) or set the "
            f"environment variable {ROOT_VARIABLE} to the folder that holds them."
        )
    folder = Path(given)
    if not folder.is_dir():
        raise FileError(f"The data folder {folder} does not exist; pass the folder that holds {name}.")
    if name in {"mnist", "fashion"}:
        return _read_mnist(folder, name, split)
    return _read_cifar(folder, name, split)


def _read_digits(split: str) -> tuple[Images, Labels]:
    from sklearn.datasets import load_digits  # noqa: PLC0415  (scikit-learn's import takes a while)

    pixels, targets = load_digits(return_X_y=True)  # (1797, 64) in 0 … 16
    labels = targets.astype(np.int64)
    rank = np.zeros_like(labels)  # position among the examples of the same class
    for c in range(10):
        rank[labels == c] = np.arange(np.count_nonzero(labels == c))
    kept = (rank % 5 == 4) == (split == "test")
    return pixels.reshape(-1, 8, 8, 1)[kept].astype(np.uint8), labels[kept]


# IDX, the format of MNIST: two zero bytes, the type (8: unsigned byte), the number of dimensions, each
# dimension as a big-endian 32-bit number, then the values.


def _read_mnist(root: Path, name: str, split: str) -> tuple[Images, Labels]:
    folders = {"mnist": ("mnist", "MNIST/raw", "."), "fashion": ("fashion", "FashionMNIST/raw", ".")}[name]
    stem = "train" if split == "train" else "t10k"
    images = _read_idx(_find(root, folders, f"{stem}-images-idx3-ubyte", name), num_dims=3)
    path = _find(root, folders, f"{stem}-labels-idx1-ubyte", name)
    labels = _read_idx(path, num_dims=1)
    if len(images) != len(labels):
        raise FileError(f"{path} has {len(labels)} labels for {len(images)} images; get the pair again.")
    return images[..., None], labels.astype(np.int64)


def _find(root: Path, folders: tuple[str, ...], stem: str, name: str) -> Path:
    for folder in folders:
        for suffix in ("", ".gz"):
            path = root / folder / (stem + suffix)
            if path.is_file():
                return path
    raise FileError(
        f"{name} needs {stem} or {stem}.gz in {root / folders[0]} (or {root / folders[1]}, or {root}); "
        "put it there or pass another root."
    )


def _read_idx(path: Path, num_dims: int) -> Images:
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except DAMAGED as error:
        raise FileError(f"{path} cannot be read, it may be truncated ({error}); get it again.") from error
    header = 4 + 4 * num_dims
    if len(raw) < header or raw[:4] != bytes((0, 0, 8, num_dims)):
        raise FileError(
            f"{path} starts with {raw[:4].hex() or 'nothing'}, not with {bytes((0, 0, 8, num_dims)).hex()}, "
            f"the magic number of an IDX file of {num_dims}-dimensional bytes; get it again."
        )
    shape = struct.unpack(f">{num_dims}I", raw[4:header])
    expected = header + math.prod(shape)
    if len(raw) != expected:
        raise FileError(f"{path} holds {len(raw)} bytes where its header says {expected}; get it again.")
    return np.frombuffer(bytearray(raw), np.uint8, offset=header).reshape(shape)


def _read_cifar(root: Path, name: str, split: str) -> tuple[Images, Labels]:
    folder = root / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    subset = root / f"{name}_subset.npz"
    if folder.is_dir():
        names = [split]
        if name == "cifar10":
            names = [f"data_batch_{k}" for k in range(1, 6)] if split == "train" else ["test_batch"]
        batches = [_read_batch(folder / batch, name) for batch in names]
        return np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])
    if subset.is_file():
        return _read_npz(subset, name, split)
    raise FileError(f"{name} needs the folder {folder} or the file {subset}; put one there or pass another root.")


def _read_batch(path: Path, name: str) -> tuple[Images, Labels]:
    try:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
        pixels = np.asarray(batch[b"data"])
        labels = np.asarray(batch[b"labels" if name == "cifar10" else b"fine_labels"], dtype=np.int64)
    except FileNotFoundError as error:
        raise FileError(f"{name} needs {path}, which does not exist; put it there.") from error
    except DAMAGED as error:
        raise FileError(
            f"{path} is no batch of {name}: {error or type(error).__name__}; get the Python version again."
        ) from error
    _check(path, name, pixels, labels, 3072)
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


class _ArrayUnpickler(pickle.Unpickler):
    """Builds NumPy arrays besides the types that need no import, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """The few callables that a pickled array of bytes names."""
        if module in {"numpy.core.multiarray", "numpy._core.multiarray"} and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("_codecs", "encode"):
            return _encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")


def _encode(text: str, encoding: str) -> bytes:
    """How older pickle protocols of Python 3 spell bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding}, which is not one of bytes")
    return text.encode(encoding)


def _read_npz(path: Path, name: str, split: str) -> tuple[Images, Labels]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays[f"{split}_x"], arrays[f"{split}_y"]
    except DAMAGED as error:
        raise FileError(
            f"{path} cannot be read ({error}); it must be an npz file with the arrays {split}_x and {split}_y."
        ) from error
    _check(path, name, images, labels, 32, 32, 3)
    return images, labels.astype(np.int64)


def _check(path: Path, name: str, images: npt.NDArray[Any], labels: npt.NDArray[Any], *shape: int) -> None:
    """Raise FileError unless there is an image of bytes of this shape for every label."""
    if images.dtype != np.uint8 or images.shape != (*labels.shape, *shape) or labels.ndim != 1:
        raise FileError(
            f"{path} holds {images.dtype} pixels of shape {images.shape} for labels of shape {labels.shape}; "
            f"of {name} expected uint8 of shape (number of labels, {', '.join(map(str, shape))})."
        )
