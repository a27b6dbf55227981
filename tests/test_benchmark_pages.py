"""The pages that scripts/benchmarks generates equal what their results files give: no number is edited by hand."""

from pathlib import Path

from tiny_runs import ROOT, strict_json

from scripts.benchmarks import (
    bench_eval,
    bench_gs_wgan,
    compare_ideas,
    kernel_methods,
    synthesis_or_classifier,
)
from scripts.benchmarks.dpsgd.report import write_page

DOCS, RESULTS = ROOT / "docs", ROOT / "docs/results"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_pages_of_the_comparisons():
    for name, data in (("comparison.md", "digits_8"), ("comparison_mnist_28.md", "mnist_28")):
        rows = strict_json(RESULTS / f"comparison_{data}.json")
        assert compare_ideas.as_markdown(rows, data) == page(name)


def test_page_of_the_kernel_methods():
    rows = strict_json(RESULTS / "kernel_methods.json")
    cells = {(row["method"], row["data"], row["epsilon"]): row for row in rows}
    assert kernel_methods.as_markdown(cells) == page("kernel_methods.md")


def test_page_of_classifiers():
    rows = strict_json(RESULTS / "synthesis_or_classifier.json") + synthesis_or_classifier.synthesis_rows()
    assert synthesis_or_classifier.page(rows) == page("synthesis_or_classifier.md")


def test_page_of_the_evaluator():
    assert bench_eval.as_markdown(strict_json(RESULTS / "bench_eval.json")) == page("bench_eval.md")


def test_page_of_the_critics():
    files = ("cpu", "cuda_quick", "cuda_published")
    results = [strict_json(RESULTS / f"bench_gs_wgan_{name}.json") for name in files]
    assert bench_gs_wgan.as_markdown(results) == page("bench_gs_wgan.md")


def test_page_of_dpsgd(tmp_path):
    write_page(tmp_path / "page.md", RESULTS)
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == page("bench_dpsgd.md")


def test_every_file_of_caveats_is_on_a_page():
    """A typo in a file name must not drop a caveat."""
    folder: Path = compare_ideas.CAVEATS
    pages = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    assert set(pages) == {
        "comparison_digits_8", "comparison_mnist_28", "kernel_methods", "synthesis_or_classifier"
    }  # fmt: skip
    names = ("comparison", "comparison_mnist_28", "kernel_methods", "synthesis_or_classifier")
    written = "".join(page(f"{name}.md") for name in names)
    assert all(text.strip() in written for text in pages.values())
