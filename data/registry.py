"""The table of published datasets: which are embedded, where to download the others, and the quirks of their files."""

import string
from dataclasses import dataclass
from pathlib import Path

from data.download import RemoteFile
from utils.registry import Registry

# name -> function that returns (train, test) without any file
EMBEDDED_SENSITIVE = Registry("embedded dataset", {"digits_8": "data.digits:load_digits_8"})
EMBEDDED_NUM_TRAIN = {"digits_8": 1437}
# name -> function of (resolution, per_class, seed) that returns PublicData without any file
EMBEDDED_PUBLIC = Registry("embedded public dataset", {"glyphs": "data.glyphs:render"})


@dataclass(frozen=True)
class SourceQuirks:
    """How the files of a published set deviate from the plain layouts of data/readers."""

    only_members: str = ""  # read only the files whose names contain this
    nested_classes: bool = False  # a class is the whole folder path below the first level, not its first part
    first_label: int = 0  # label of class 0 in the files
    transposed: bool = False  # images are stored with rows and columns swapped
    one_class: bool = False  # a single class folder is enough


NO_QUIRKS = SourceQuirks()


@dataclass(frozen=True)
class Facts:
    """What a published set has by definition."""

    resolution: int  # pixels
    channels: int
    class_names: tuple[str, ...] | None  # None: those that the files state


@dataclass(frozen=True)
class KnownSet:
    """How to get and read one published dataset."""

    name: str
    public: bool
    facts: Facts | None = (
        None  # None for a sensitive set: configs/data states them, and the caller passes them
    )
    downloads: tuple[RemoteFile, ...] = ()
    advice: str = ""  # how to get a set that cannot be downloaded
    split_off_test: tuple[int, int] | None = None  # (test, all): random share, for files without a test part
    quirks: SourceQuirks = NO_QUIRKS


def _idx_files(mirrors: tuple[str, ...], md5s: tuple[str, str, str, str]) -> tuple[RemoteFile, ...]:
    names = [
        f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    ]
    return tuple(
        RemoteFile(name, tuple(mirror + name for mirror in mirrors), md5)
        for name, md5 in zip(names, md5s, strict=True)
    )


def _one_file(md5: str, name: str, *urls: str) -> tuple[RemoteFile, ...]:
    return (RemoteFile(name, urls, md5),)


_CELEBA_ADVICE = (
    "CelebA is on Google Drive, which is not downloaded automatically: get img_align_celeba (folder or zip), "
    "list_attr_celeba.txt and list_eval_partition.txt from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html "
    "into one folder and pass it as --source"
)
_CAMELYON_ADVICE = (
    "Camelyon17 patches come from WILDS (https://wilds.stanford.edu): arrange them as train/<class>/* and "
    "test/<class>/*, a folder or a zip, and pass it as --source"
)
_IMAGENET_ADVICE = (
    "ImageNet needs an account at https://image-net.org: pass its folder of train/<synset>/*, a tar of that, or "
    "ILSVRC2012_img_train.tar as --source"
)
# The digests and first mirrors are those of torchvision.datasets, which a test compares.
_MNIST_FILES = _idx_files(
    (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "http://yann.lecun.com/exdb/mnist/",
    ),
    (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
)
_FASHION_MNIST_FILES = _idx_files(
    (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    ),
    (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
)
_CIFAR10_FILES = _one_file(
    "c58f30108f718f92721af3b95e74349a",
    "cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
_CIFAR100_FILES = _one_file(
    "eb9058c3a382ffc7106e4002c42a8d85",
    "cifar-100-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
)
_EUROSAT_FILES = _one_file(
    "f46e308c4d50d4bf32fedad2d3d62f3b",
    "EuroSAT_RGB.zip",
    "https://zenodo.org/records/7711810/files/EuroSAT_RGB.zip?download=1",
    "https://zenodo.org/record/7711810/files/EuroSAT_RGB.zip",
)
_EMNIST_FILES = _one_file(
    "58c8d27c78d21e728a6bc7b3cc06412e",
    "gzip.zip",
    "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip",
    "http://www.itl.nist.gov/iaui/vip/cs_links/EMNIST/gzip.zip",
)
_PLACES_FILES = _one_file(
    "53ca1c756c3d1e7809517cc47c5561c5",
    "train_256_places365standard.tar",
    "http://data.csail.mit.edu/places/places365/train_256_places365standard.tar",
)
_EMNIST_QUIRKS = SourceQuirks(only_members="emnist-letters", first_label=1, transposed=True)

_SETS = (
    KnownSet("mnist_28", False, downloads=_MNIST_FILES),
    KnownSet("fmnist_28", False, downloads=_FASHION_MNIST_FILES),
    KnownSet("cifar10_32", False, downloads=_CIFAR10_FILES),
    KnownSet("cifar100_32", False, downloads=_CIFAR100_FILES),
    KnownSet("eurosat_32", False, downloads=_EUROSAT_FILES, split_off_test=(4_000, 27_000)),
    KnownSet("celeba_male_32", False, advice=_CELEBA_ADVICE),
    KnownSet("celeba_male_64", False, advice=_CELEBA_ADVICE),
    KnownSet("celeba_male_128", False, advice=_CELEBA_ADVICE),
    KnownSet("camelyon_32", False, advice=_CAMELYON_ADVICE),
    KnownSet("imagenet", True, Facts(32, 3, None), advice=_IMAGENET_ADVICE),
    KnownSet(
        "places365",
        True,
        Facts(32, 3, None),
        downloads=_PLACES_FILES,
        quirks=SourceQuirks(nested_classes=True),
    ),
    KnownSet(
        "emnist",
        True,
        Facts(28, 1, tuple(string.ascii_lowercase)),
        downloads=_EMNIST_FILES,
        quirks=_EMNIST_QUIRKS,
    ),
    KnownSet(
        "kazakh_letters",
        True,
        Facts(28, 1, None),
        advice="pass an npz with x, y and classes as --source",
    ),
    KnownSet(
        "tiny_imagenet",
        True,
        Facts(32, 3, None),
        advice="pass a folder or tar of train/<synset>/* as --source",
    ),
)
_BY_NAME = {known.name: known for known in _SETS}


def known_names() -> tuple[str, ...]:
    """Every dataset that can be prepared by name."""
    return tuple(_BY_NAME)


def canonical_name(name: str) -> str:
    """The spelling of the table for a name in any case; other names as they are."""
    by_folded = {known.casefold(): known for known in (*known_names(), *EMBEDDED_SENSITIVE, *EMBEDDED_PUBLIC)}
    return by_folded.get(name.casefold(), name)


def known_set(name: str) -> KnownSet | None:
    """The entry of a published dataset; None for any other name, which is the user's own set."""
    return _BY_NAME.get(name)


def prepare_command(name: str, data_root: Path) -> str:
    """The command that prepares the set `name`."""
    known = known_set(name)
    source = "" if known is not None and known.downloads else " --source <path>"
    return f"python scripts/prepare_data.py --data_name {name} --data_root {data_root}{source}"
