"""Judging the same samples again adds to what an earlier evaluation of them found."""

from pathlib import Path

import numpy as np

from data.spec import DataSpec, Samples
from evaluation.features import content_hash
from evaluation.page import DETAILS
from evaluation.report import Report
from utils.run_dir import RESULTS, read_json


def facts_of(samples: Samples, spec: DataSpec) -> dict:
    """What results.json says of the samples: by which digest they are recognised, and how many each class has."""
    digest = content_hash(samples.images, content_hash(samples.labels, "labels"))
    counts = np.bincount(samples.labels, minlength=spec.num_classes)
    return {"samples_digest": digest, "samples_per_class": counts.tolist()}


def earlier_report(folder: Path, data_name: str, facts: dict) -> Report | None:
    """What the results in `folder` say of these samples: nothing if there are none yet, None if they are about other
    samples or another dataset. Values carry the settings with which they were found."""
    path = folder / RESULTS
    if not path.exists():
        return Report()
    results = read_json(path)
    if (results["data"], results.get("samples_digest")) != (data_name, facts["samples_digest"]):
        return None
    settings = {"evaluation": results["evaluation"]}
    info = {name: settings | known for name, known in results["metric_info"].items()}
    details = folder / DETAILS
    return Report(
        results["metrics"], info, results["missing"], read_json(details) if details.exists() else {}
    )
