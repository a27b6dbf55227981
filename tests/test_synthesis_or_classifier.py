"""The page that compares released classifiers with classifiers that are trained on samples."""

from scripts.benchmarks.synthesis_or_classifier import merged, page, row_of

RESULTS = {
    "method": "DP-Linear", "data": "toys", "epsilon": 1.0, "spent_epsilon": 0.99, "seed": 0, "num_records": 60,
    "git": "abc", "timing": {"train": 2.0, "evaluate": 3.0},
    "metric_info": {"accuracy/small_cnn/syn_val": {"ceiling": 99.0}},
    "overrides": ["seed=0", "train.fit=sgd", "eval.metrics=[accuracy]"],
    "metrics": {"accuracy/released/last_epoch": 91.0, "accuracy/small_cnn/syn_val": 80.0},
}  # fmt: skip


def test_a_row_names_what_changes_the_run():
    row = row_of(RESULTS)
    assert row["settings"] == "train.fit=sgd" and row["seconds"] == 5.0
    assert (row["released"], row["trained"], row["ceiling"]) == (91.0, 80.0, 99.0)


def test_a_run_again_replaces_its_row_and_others_stay():
    rows = merged([row_of(RESULTS), row_of(RESULTS | {"seed": 1})], [row_of(RESULTS | {"git": "new"})])
    assert [(row["seed"], row["git"]) for row in rows] == [(0, "new"), (1, "abc")]


def test_the_best_is_first_and_the_ceiling_last():
    other = {
        "method": "PE",
        "settings": "",
        "data": "toys",
        "epsilon": 1.0,
        "seed": 0,
        "seconds": 1.0,
        "trained": 95.0,
    }
    text = page([row_of(RESULTS), row_of(RESULTS | {"seed": 1}), other])
    lines = [line for line in text.splitlines() if line.startswith("| ") and "method" not in line]
    assert [line.split(" | ")[0] for line in lines] == ["| PE", "| DP-Linear", "| *ceiling*"]
    assert "91.0 ± 0.0" in lines[1] and "99.0" in lines[2]


def test_one_lucky_seed_does_not_put_a_method_first():
    steady = [row_of(RESULTS | {"seed": seed, "method": "steady"}) for seed in range(2)]
    lucky = [
        row | {"method": "lucky", "released": value} for row, value in zip(steady, (93.0, 70.0), strict=True)
    ]
    text = page([*lucky, *steady])
    assert text.index("| steady") < text.index("| lucky")
