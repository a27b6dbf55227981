"""The table of known datasets: which are embedded, where the others are fetched, and what is odd about their files."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data.download import RemoteFile
from utils.config_files import CONFIG_FOLDER
from utils.registry import Registry

# name -> function that returns (train, test) without any file
EMBEDDED_SENSITIVE = Registry("embedded dataset", {"digits_8": "data.digits:load_digits_8"})
EMBEDDED_NUM_TRAIN = {"digits_8": 1437}
# name -> function of (resolution, per_class, seed) that returns PublicData without any file
EMBEDDED_PUBLIC = Registry("embedded public dataset", {"glyphs": "data.glyphs:render"})


@dataclass(frozen=True)
class SourceQuirks:
    """How the files of a known set deviate from the plain layouts of data/sources.py."""

    only_members: str = ""  # use only files whose name contains this
    nested_classes: bool = False  # a class is the whole folder path below the first level, not its first part
    first_label: int = 0  # the label that the files give to class 0
    transposed: bool = False  # images are stored with rows and columns swapped
    one_class: bool = False  # a single class folder is enough


NO_QUIRKS = SourceQuirks()


@dataclass(frozen=True)
class KnownSet:
    """What preparation needs to know about one dataset. Numbers of sensitive sets come from configs/data."""

    name: str
    public: bool
    resolution: int
    channels: int
    class_names: tuple[str, ...] | None  # None: those that the files give
    downloads: tuple[RemoteFile, ...] = ()
    advice: str = ""  # where to get a set that cannot be fetched automatically
    split_off_test: tuple[int, int] | None = (
        None  # (test, all): share that is drawn at random where files have no split
    )
    quirks: SourceQuirks = NO_QUIRKS


def _idx_files(mirrors: tuple[str, ...], md5s: tuple[str, str, str, str]) -> tuple[RemoteFile, ...]:
    names = [
        f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    ]
    return tuple(
        RemoteFile(name, tuple(mirror + name for mirror in mirrors), md5)
        for name, md5 in zip(names, md5s, strict=True)
    )


_CELEBA = dict(
    advice="CelebA is on Google Drive, which is not fetched automatically: get img_align_celeba (folder or zip), "
    "list_attr_celeba.txt and list_eval_partition.txt from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html "
    "into one folder and pass it as --source",
)
_SENSITIVE: dict[str, dict] = {
    "mnist_28": dict(
        downloads=_idx_files(
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
    ),
    "fmnist_28": dict(
        downloads=_idx_files(
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
    ),
    "cifar10_32": dict(
        downloads=(
            RemoteFile(
                "cifar-10-python.tar.gz",
                ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
                "c58f30108f718f92721af3b95e74349a",
            ),
        )
    ),
    "cifar100_32": dict(
        downloads=(
            RemoteFile(
                "cifar-100-python.tar.gz",
                ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",),
                "eb9058c3a382ffc7106e4002c42a8d85",
            ),
        )
    ),
    "eurosat_32": dict(
        downloads=(
            RemoteFile(
                "EuroSAT_RGB.zip",
                (
                    "https://zenodo.org/records/7711810/files/EuroSAT_RGB.zip?download=1",
                    "https://zenodo.org/record/7711810/files/EuroSAT_RGB.zip",
                ),
                "f46e308c4d50d4bf32fedad2d3d62f3b",
            ),
        ),
        split_off_test=(4_000, 27_000),
    ),
    "celeba_male_32": _CELEBA,
    "celeba_male_64": _CELEBA,
    "celeba_male_128": _CELEBA,
    "camelyon_32": dict(
        advice="Camelyon17 patches come from WILDS (https://wilds.stanford.edu): arrange them as "
        "train/<class>/* and test/<class>/*, a folder or a zip, and pass it as --source",
    ),
}

_IMAGENET_ADVICE = (
    "ImageNet needs an account at https://image-net.org: pass its folder of train/<synset>/*, a tar of that, or "
    "ILSVRC2012_img_train.tar as --source"
)
_PUBLIC: dict[str, KnownSet] = {
    known.name: known
    for known in (
        KnownSet("imagenet", True, 32, 3, None, advice=_IMAGENET_ADVICE),
        KnownSet(
            "places365",
            True,
            32,
            3,
            None,
            downloads=(
                RemoteFile(
                    "train_256_places365standard.tar",
                    ("http://data.csail.mit.edu/places/places365/train_256_places365standard.tar",),
                    "53ca1c756c3d1e7809517cc47c5561c5",
                ),
            ),
            quirks=SourceQuirks(nested_classes=True),
        ),
        KnownSet(
            "emnist",
            True,
            28,
            1,
            tuple("abcdefghijklmnopqrstuvwxyz"),
            downloads=(
                RemoteFile(
                    "gzip.zip",
                    (
                        "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip",
                        "http://www.itl.nist.gov/iaui/vip/cs_links/EMNIST/gzip.zip",
                    ),
                    "58c8d27c78d21e728a6bc7b3cc06412e",
                ),
            ),
            quirks=SourceQuirks(only_members="emnist-letters", first_label=1, transposed=True),
        ),
        KnownSet("kazakh_letters", True, 28, 1, None, advice="pass an npz with x, y and classes as --source"),
        KnownSet(
            "tiny_imagenet", True, 32, 3, None, advice="pass a folder or tar of train/<synset>/* as --source"
        ),
    )
}


def known_names() -> tuple[str, ...]:
    """Every dataset that can be prepared by name."""
    return (*_SENSITIVE, *_PUBLIC)


def canonical_name(name: str) -> str:
    """The spelling of the table for a name in any case; other names as they are."""
    by_folded = {known.casefold(): known for known in (*known_names(), *EMBEDDED_SENSITIVE, *EMBEDDED_PUBLIC)}
    return by_folded.get(name.casefold(), name)


@cache
def known_set(name: str) -> KnownSet | None:
    """The entry of a dataset; None for a name that is not in the table, which is somebody's own set."""
    if name in _PUBLIC:
        return _PUBLIC[name]
    if name not in _SENSITIVE:
        return None
    from omegaconf import OmegaConf

    facts = OmegaConf.load(CONFIG_FOLDER / "data" / f"{name}.yaml")
    return KnownSet(
        name, False, facts.resolution, facts.num_channels, tuple(facts.class_names), **_SENSITIVE[name]
    )


def prepare_command(name: str, data_root: Path) -> str:
    """The command that makes the prepared data of `name`."""
    known = known_set(name)
    source = "" if known is not None and known.downloads else " --source <path>"
    return f"python scripts/prepare_data.py --data_name {name} --data_root {data_root}{source}"
