"""Classify images with the classifier that a run released: python scripts/predict.py --exp_path RUN --images FOLDER

Writes one line per image: file, class, probability. Folders, zip and tar archives and npz files are read. Images of
another size are cropped to the central square and resized. What the classifier learnt about private images is bounded
by the epsilon of its run; the images that it classifies are not protected by it.
"""

import argparse
import csv
import io
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.arguments import Parser, one_of
from utils.artefacts import CLASSIFIER
from utils.errors import UserError
from utils.files import write_text
from utils.places import weights_root
from utils.private_files import only_for_owner
from utils.program import program, run_process
from utils.text import at_most

BATCH = 256  # images in memory at a time


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--exp_path", type=Path, required=True, metavar="RUN", help="the run, or its classifier.pth"
    )
    parser.add_argument("--images", type=Path, required=True, metavar="PATH", help="folder, zip, tar or npz")
    parser.add_argument(
        "--out", type=Path, default=Path("predictions.csv"), metavar="FILE", help="default: predictions.csv"
    )
    parser.add_argument("--device", type=one_of(("cpu", "cuda")), default="cpu", help="cpu (default) or cuda")
    return parser.parse_args(argv)


@program
def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    path = arguments.exp_path / CLASSIFIER if arguments.exp_path.is_dir() else arguments.exp_path
    if arguments.exp_path.is_dir() and not path.exists():
        raise UserError(f"--exp_path: {arguments.exp_path} released no classifier (it has no {CLASSIFIER})")
    if arguments.out.exists():
        raise UserError(f"--out: {arguments.out} exists; give another file")
    import torch

    from models.released.classifier import read_classifier

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda, but torch sees no GPU; use cpu")
    read = read_classifier(path, weights_root(None), arguments.device)
    print(describe(path, read.origin))
    rows, notes = predictions(read, arguments.images, arguments.device)
    for note in notes:
        print(note)
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("file", "class", "probability"), *rows])
    with only_for_owner():  # file names and classes are facts about the user's images
        write_text(arguments.out, table.getvalue())
    counts = Counter(name for _, name, _ in rows)
    found = ", ".join(f"{name}: {counts[name]:,}" for name in read.class_names if counts[name])
    print(f"{len(rows):,} images; {found}")
    print(f"predictions: {arguments.out}")
    return 0


def predictions(read, images: Path, device: str) -> tuple[list[tuple[str, str, str]], list[str]]:
    """(file, class, probability) of every image, and notes about what was converted or left out."""
    import numpy as np
    import torch

    from data.convert import conversion_notes
    from data.readers.layouts import open_unlabelled
    from models.released.classifier import logits_of
    from utils.progress import progress

    part, names, notes = open_unlabelled(images)
    if len(part) == 0:
        raise UserError(f"--images: {images} holds no image")
    rows, forms, batch, places = {}, Counter(), [], []
    for place, item in progress(part.items(), "classify", total=len(part), unit="image"):
        pixels, form = part.convert(item, read.resolution, read.channels)
        forms[form] += 1
        batch.append(pixels)
        places.append(place)
        if len(batch) == BATCH or len(rows) + len(batch) == len(part):
            logits = logits_of(read.classifier, np.stack(batch), device)
            shares = torch.from_numpy(logits).double().softmax(1)
            for row, share in zip(places, shares, strict=True):
                chosen = int(share.argmax())
                rows[row] = (names[row], read.class_names[chosen], f"{float(share[chosen]):.4f}")
            batch, places = [], []
    notes += [f"{images.name}: {note}" for note in conversion_notes(forms, read.resolution, read.channels)]
    return [rows[row] for row in range(len(names))], notes


def describe(path: Path, origin: dict) -> str:
    """One line about where the classifier comes from."""
    budget = origin["budget"]
    claim = f"({at_most(origin['spent'])}, {at_most(budget['delta'])})-differentially private"
    if origin["not_computed"]:
        claim = "its epsilon could not be computed"
    if not origin["private"] or origin["noise_seeded"]:
        claim = "NOT private"
    public = origin["num_public"]
    exception = f", except {public:,} images that were declared public" if public else ""
    return f"{path}: {origin['method']} on {origin['data']}, {claim}{exception}"


if __name__ == "__main__":
    run_process(main)
