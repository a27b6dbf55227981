"""Judging the same samples again adds to what an earlier evaluation of them found."""

import hashlib
from pathlib import Path

import numpy as np

from data.spec import DataSpec, Samples
from evaluation.page import DETAILS
from evaluation.report import Report
from utils.artefacts import RESULTS
from utils.errors import UserError
from utils.files import read_json


def facts_of(samples: Samples, spec: DataSpec) -> dict:
    """What results.json says of the samples: by which digest they are recognised, in whatever order, how many each
    class has, and with which real images they are compared (a random name of the prepared folder)."""
    pairs = zip(samples.images, samples.labels, strict=True)
    digests = sorted(
        hashlib.sha256(f"{label} {image.shape}".encode() + image.tobytes()).digest() for image, label in pairs
    )
    counts = np.bincount(samples.labels, minlength=spec.num_classes)
    digest = hashlib.sha256(b"".join(digests)).hexdigest()[:32]
    return {"samples_digest": digest, "samples_per_class": counts.tolist(), "data_identity": spec.identity}


def earlier_report(folder: Path, data_name: str, facts: dict) -> Report | None:
    """What the results in `folder` say of these samples: nothing if there are none yet, None if they are about other
    samples, another dataset, or real images that were prepared at another time. Values carry the settings with which
    they were found. UserError for a damaged file."""
    path = folder / RESULTS
    if not path.exists():
        return Report()
    results = read_json(path)
    try:
        known = (results["data"], results["samples_digest"], results["data_identity"])
        if known != (data_name, facts["samples_digest"], facts["data_identity"]):
            return None
        settings = {"evaluation": results["evaluation"]}
        info = {name: settings | known for name, known in results["metric_info"].items()}
        details = folder / DETAILS
        return Report(results["metrics"], info, {}, read_json(details) if details.exists() else {})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {error}); to judge the samples anew: python eval.py "
            f"--images <samples> --data_name {data_name} --out <another folder>"
        ) from error
