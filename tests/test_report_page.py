"""report.html: complete, self-contained, without a private image, and shown by a real browser without a complaint."""

import base64
import html
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from tiny_runs import arguments, call, strict_json

import run as run_program
from data.spec import DataSpec, Samples
from evaluation.page import data_uri, write_page
from evaluation.report import Report
from pipeline.revealed import SHOWN

SPEC = DataSpec("toy", 8, 1, 3, 30, ("cat", "<dog>", "bird"))
CARD = """# Privacy card

The samples are **(1, 1e-05)-private** & more.

- one
- two

| a | b |
|---|---|
| 1 | 2 |
"""


def samples(seed: int, count: int, channels: int = 1) -> Samples:
    """Images of the classes 0 and 1; class 2 has none."""
    images = np.random.default_rng(seed).integers(0, 256, (count, channels, 8, 8), dtype=np.uint8)
    return Samples(images, np.arange(count, dtype=np.int64) % 2)


def report(**changes) -> Report:
    accuracy = {
        "better": "higher",
        "n_real": 9,
        "n_fake": 20,
        "interval_95": [40.0, 60.0],
        "epoch": 3,
        "num_epochs": 5,
    }
    fid = {"better": "lower", "n_real": 30, "n_fake": 20, "real_floor": 0.125, "private": "training images"}
    values = {
        "metrics": {"accuracy/cnn/syn_val": 50.0, "fid/x": 2.5},
        "metric_info": {"accuracy/cnn/syn_val": accuracy, "fid/x": fid},
        "missing": {"cmmd/clip": "install <it>"},
        "details": {
            "accuracy/cnn/syn_val": {
                "per_class": [75.0, None, 0.0],
                "confusion": [[3, 1, 0], [0, 0, 0], [2, 3, 0]],
            }
        },
    }
    return Report(**values | changes)


RESULTS = {
    "images": None, "preset": "quick", "preset_tier": 10, "borrowed": True, "seed": 3, "judged": "2026-01-01 12:00",
    "git": None, "overrides": ["train.x=<1>"], "public_data": {"name": "letters", "images": 1240, "classes": 62},
    "evaluation": {"classifiers": ["a"], "recipe": "paper", "mode": "syn", "extractor": "clip", "seed": 7,
                   "metrics": ["accuracy"]},
}  # fmt: skip


RED, NO_PROOF, NEIGHBOURS = (
    "<p class='red' id='contains-training-images'>",
    " no-proof'>",
    "<h2 id='neighbours'>",
)


def words_of(text: str) -> set[str]:
    return {word.strip(",;:") for word in text.split()}


def element(text: str, mark: str) -> str:
    """What is between the tag with `mark` in it and the next end of a paragraph."""
    return text[text.index(mark) :].partition("</p>")[0]


class Checker(HTMLParser):
    """Fails on tags that do not close in order, and collects images and addresses."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.images, self.addresses = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes) -> None:
        found = dict(attributes)
        self.addresses += [found[name] for name in ("src", "href") if name in found]
        self.images += [found] if tag == "img" else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def page(folder, **options) -> str:
    given = {
        "report": report(),
        "samples": samples(0, 20),
        "train": samples(1, 30),
        "spec": SPEC,
        "card": CARD,
        "gallery": None,
        "results": RESULTS,
    }
    given |= options
    write_page(folder, **{"title": "a <title>", **given})
    return (folder / "report.html").read_text()


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_the_page_holds_everything_and_needs_nothing_else(tmp_path):
    text = page(tmp_path)
    checker = Checker(text)
    assert all(address.startswith("data:") for address in checker.addresses)
    assert not re.search(r"https?://|url\(|@import|<script", text)
    about = dict(re.findall(r"<tr><td>([a-z ]+)</td><td class='note'>(.*?)</td></tr>", text))
    assert {"letters", "1,240", "62"} <= words_of(about["public images"])
    assert about["settings given"] == "train.x=&lt;1&gt;"
    assert {"quick", "10", "3"} <= words_of(about["training"])
    assert {"paper", "eval.mode=syn"} <= words_of(about["classifiers"])
    assert (
        f"<h1>{html.escape('a <title>')}</h1>" in text
        and f"<b>cmmd/clip</b>: {html.escape('install <it>')}" in text
    )
    assert "&lt;dog&gt;" in text and "<dog>" not in text
    row = re.search(r"<tr><td>fid/x \*</td>.*?</tr>", text)[0]
    assert "<b>2.5</b>" in row and "lower" in row and ">0.125<" in row
    assert "95 % interval 40.00 to 60.00" in text and "epoch 3 of 5" in text
    per_class = re.findall(r"<td class='n'>([^<]*)</td><td><span class='bar'", text)
    assert per_class[::2] == ["75.0 %", "0.0 %"] and "%" not in per_class[1]
    assert "bird" in element(text, "id='absent-classes'") and NO_PROOF in text
    assert strict_json(tmp_path / "details.json") == report().details
    assert not (tmp_path / "private").exists()


def test_the_references_of_accuracy_are_in_its_row(tmp_path):
    """On the page and on the terminal; columns that nothing fills are left out."""
    found = report()
    found.metric_info["accuracy/cnn/syn_val"].update(majority_class=37.5, ceiling=91.25)
    for name, value, majority in (("balanced_accuracy", 48.125, 33.0), ("auroc", 0.625, 0.5)):
        found.metrics[f"{name}/cnn/syn_val"] = value
        facts = {"better": "higher", "n_real": 9, "n_fake": 20, "majority_class": majority, "ceiling": 0.99}
        found.metric_info[f"{name}/cnn/syn_val"] = facts
    text = page(tmp_path, report=found)
    Checker(text)
    row = re.search(r"<tr><td>accuracy/cnn/syn_val</td>.*?</tr>", text)[0]
    cells = re.findall(r"<td class='n'>(.*?)</td>", row)
    assert cells == ["<b>50</b>", "37.5", "48.12", "0.625", "91.25", "9", "20"]
    assert re.search(r"real images 5\d\.\d\d to 99\.\d\d", row), "8 of 9 test images: a wide interval"
    assert ">auroc/cnn" not in text
    lines = found.table().splitlines()
    row = next(line for line in lines if line.startswith("accuracy/cnn/syn_val"))
    assert row.split()[1:] == ["50.00", "higher", "37.50", "91.25", "48.12", "0.625", "9", "20"]
    assert not any(line.startswith("auroc") for line in lines)
    titles = [title for title in ("majority class", "real images", "balanced", "AUROC") if title in lines[0]]
    assert len(titles) == 4 and all(title in text for title in titles)
    bare = Report({"x": 1.0}, {"x": {"better": "lower", "n_real": 0, "n_fake": 5}}).table()
    assert bare.splitlines()[0].split() == ["metric", "value", "better", "#", "samples"]


def test_a_sister_value_of_another_evaluation_has_a_row_of_its_own(tmp_path):
    found, name = report(), "auroc/cnn/syn_val"
    found.metrics[name] = 0.625
    found.metric_info[name] = {
        "better": "higher",
        "n_real": 9,
        "n_fake": 20,
        "evaluation": {"recipe": "paper"},
    }
    assert f">{name}<" in page(tmp_path, report=found)
    assert any(line.startswith(name) for line in found.table().splitlines())


def test_warnings_come_before_the_table(tmp_path):
    text = page(tmp_path, report=report(warnings=["9 samples of <x> are copies"]))
    before = text.partition("<h2>Metrics")[0]
    assert html.escape("9 samples of <x> are copies") in element(before, "sample-warning'")
    assert "sample-warning" not in page(tmp_path)


def test_the_grid_shows_the_samples_class_by_class(tmp_path):
    shown = samples(0, 20)
    images = Checker(page(tmp_path, samples=shown)).images
    assert [image["alt"] for image in images] == ["samples of cat", "samples of <dog>"]
    strip = pixels(images[1]["src"])
    expected = shown.images[shown.labels == 1]
    for column in range(10):
        assert np.array_equal(strip[:, 9 * column : 9 * column + 8], expected[column, 0])


def test_colour_samples_keep_their_channels(tmp_path):
    shown, spec = samples(0, 4, channels=3), DataSpec("toy", 8, 3, 2, 30, ("a", "b"))
    images = Checker(page(tmp_path, samples=shown, spec=spec, report=Report())).images
    assert np.array_equal(pixels(images[0]["src"])[:, :8], shown.images[0].transpose(1, 2, 0))


def test_a_matrix_of_many_classes_is_a_picture(tmp_path):
    spec = DataSpec("toy", 8, 1, 30, 30, tuple(map(str, range(30))))
    confusion = np.zeros((30, 30), int)
    confusion[3, 5] = 4
    details = {"accuracy/cnn/syn_val": {"per_class": [None] * 30, "confusion": confusion.tolist()}}
    image = Checker(page(tmp_path, spec=spec, report=report(details=details))).images[-1]
    found = pixels(image["src"])
    assert found.shape == (30, 30) and found[3, 5] == 0 and (np.delete(found.ravel(), 95) == 255).all()


def shows_training_image(text: str, train: Samples) -> bool:
    strips = [pixels(image["src"]) for image in Checker(text).images]
    parts = [strip[:, 9 * k : 9 * k + 8] for strip in strips for k in range((strip.shape[1] + 1) // 9)]
    return any(np.array_equal(part, image[0]) for part in parts for image in train.images)


def test_training_images_are_in_the_private_gallery_alone(tmp_path):
    train, shown = samples(1, 30), samples(0, 20)
    found = report(nearest={4: [7, 2]})
    text = page(tmp_path, train=train, samples=shown, report=found, gallery="private")
    gallery = (tmp_path / "private" / "nearest.html").read_text()
    Checker(gallery)
    assert NO_PROOF in gallery and RED in gallery
    sample, neighbours = (pixels(image["src"]) for image in Checker(gallery).images)
    assert np.array_equal(sample, shown.images[4, 0])
    assert np.array_equal(
        neighbours, np.hstack([train.images[7, 0], np.full((8, 1), 255), train.images[2, 0]])
    )
    assert data_uri(neighbours) not in text and RED not in text
    assert "private/nearest.html" in text
    assert shows_training_image(gallery, train) and not shows_training_image(text, train)


def test_a_gallery_in_the_report_has_a_red_warning(tmp_path):
    train = samples(1, 30)
    text = page(tmp_path, train=train, report=report(nearest={4: [7, 2]}), gallery="report")
    assert shows_training_image(text, train) and not (tmp_path / "private").exists()
    assert text.index(RED) < text.index("<h2")
    section = text[text.index(NEIGHBOURS) :]
    assert NO_PROOF in section and "<table class='gallery'>" in section


def test_memorisation_is_next_to_the_gallery(tmp_path):
    values = {"authpct/x": 31.5, "nn_ratio/x": 0.7}
    info = {name: {"better": "higher", "n_real": 30, "n_fake": 20, "real_floor": 0.9} for name in values}
    text = page(tmp_path, report=report(metrics=values, metric_info=info))
    section = text[text.index(NEIGHBOURS) : text.index("<h2 id='privacy'")]
    for value in values.values():
        assert re.search(rf"<b>{value}</b></td><td class='n'>0\.9<", section)
    assert "fld_gap" in section and "eval.gallery=private" in section and "private/nearest.html" in section


def test_the_page_holds_the_whole_card(tmp_path):
    text = page(tmp_path)
    found = html.unescape(re.search(r"<pre class='card'>(.*?)</pre>", text, re.DOTALL)[1])
    assert found == CARD.replace("**", "")
    assert "&amp;" in text[text.index("<pre") :]
    assert "<pre" not in page(tmp_path, card=None)


def test_names_from_users_are_escaped_everywhere(tmp_path):
    """Class names and file names end up in text and in attributes."""
    name = "</td><script>x('y')\"</script>"
    spec = DataSpec("toy", 8, 1, 3, 30, (name, "a' onload='x", "bird"))
    given = {"title": name, "card": name, "results": RESULTS | {"overrides": [name]}}
    values = {"missing": {name: name}, "warnings": [name], "nearest": {4: [7, 2]}}
    text = page(tmp_path, spec=spec, report=report(**values), gallery="private", **given)
    gallery = (tmp_path / "private" / "nearest.html").read_text()
    for written in (text, gallery):
        checker = Checker(written)
        assert "<script" not in written and "onload" not in {key for found in checker.images for key in found}
    assert [image["alt"] for image in Checker(text).images] == [
        f"samples of {name}",
        "samples of a' onload='x",
    ]


# ------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    more = ["eval.mode=val", "sensitive_data.num_val=137", "eval.oracles=true", "eval.gallery=private"]
    outcome = call(run_program.main, arguments("Noise", tmp_path_factory.mktemp("run"), *more))
    assert outcome.code == 0, outcome.err
    return outcome.folder


def test_a_run_has_a_page_with_its_card(run_folder):
    text = (run_folder / "report.html").read_text()
    Checker(text)
    assert {"Noise", "digits_8", "10"} <= words_of(re.search("<h1>(.*?)</h1>", text)[1])
    assert (run_folder / "privacy_card.md").read_text().replace("**", "") == html.unescape(
        re.search(r"<pre class='card'>(.*?)</pre>", text, re.DOTALL)[1]
    )
    assert len(Checker((run_folder / "private" / "nearest.html").read_text()).images) == 40


def test_oracles_of_a_run_are_marked_and_listed_as_revealed(run_folder):
    results, privacy = (strict_json(run_folder / f"{name}.json") for name in ("results", "privacy"))
    for selection in ("noisy_val", "syn_val", "last_epoch", "best_val", "best_test"):
        info = results["metric_info"][f"accuracy/mean/{selection}"]
        assert ("private" in info) == selection.startswith("best")
    assert any("eval.oracles" in reason for reason in privacy["revealed"])
    assert any("eval.ceiling" in reason for reason in privacy["revealed"])
    assert results["metric_info"]["accuracy/small_cnn/noisy_val"]["ceiling"] > 95
    assert results["selection_epsilon"] == pytest.approx(1.0)
    assert not any("report.html" in reason for reason in privacy["revealed"])


def test_a_run_warns_that_its_report_shows_training_images(tmp_path):
    more = ["eval.gallery=report", "eval.metrics=[authpct]"]
    folder = call(run_program.main, arguments("Noise", tmp_path, *more)).folder
    assert RED in (folder / "report.html").read_text()
    assert SHOWN in strict_json(folder / "privacy.json")["revealed"]
    assert call(run_program.main, arguments("Noise", tmp_path, "eval.gallery=yes")).refusal


def test_without_oracles_nothing_of_the_validation_images_is_revealed(tmp_path):
    more = ["eval.mode=val", "sensitive_data.num_val=137", "eval.metrics=[accuracy]", "eval.ceiling=none"]
    folder = call(run_program.main, arguments("Noise", tmp_path, *more)).folder
    assert not any("eval.ceiling" in reason for reason in strict_json(folder / "privacy.json")["revealed"])
    assert not [
        reason for reason in strict_json(folder / "privacy.json")["revealed"] if "validation" in reason
    ]
    assert not [name for name in strict_json(folder / "results.json")["metrics"] if "best" in name]
    assert (folder / "report.html").exists() and not (folder / "private").exists()


# ------------------------------------------------------------------------------------------------- a browser

PROBE = """<script>
const broken = [...document.images].filter(image => !(image.complete && image.naturalWidth > 0)).length;
document.title = `${document.images.length} images, ${broken} broken`;
</script></body>"""


def browse(text: str, folder) -> tuple[str, str]:
    """What a headless browser makes of a page: its title after PROBE has run, and its log.

    Every request goes to a proxy that is not there, so nothing that is not in the page can be shown.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no chromium; apt-get install chromium")
    page_file = folder / "probed.html"
    page_file.write_text(text.replace("</body>", PROBE))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--proxy-server=127.0.0.1:9",
    ]
    done = subprocess.run(
        [browser, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom", page_file.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return re.search("<title>(.*?)</title>", done.stdout)[1], done.stderr


def test_a_browser_shows_all_images_without_network_or_errors(run_folder, tmp_path):
    text = (run_folder / "report.html").read_text()
    title, log = browse(text, tmp_path)
    assert title == f"{len(Checker(text).images)} images, 0 broken"
    assert "CONSOLE" not in log


def test_the_browser_would_see_an_image_from_elsewhere_and_an_error(tmp_path):
    foreign = (
        "<html><body><img src='http://example.invalid/x.png'><script>undefinedName()</script></body></html>"
    )
    title, log = browse(foreign, tmp_path)
    assert title == "1 images, 1 broken" and "CONSOLE" in log
