"""Names of the files in a run's folder."""

CONFIG = "config.yaml"  # written first: a folder without it is no run
PRIVACY = "privacy.json"  # the account of what was asked of private images
DIVERGED = "diverged.json"  # private training failed: why, and what it has spent
SAMPLES, GRID = "gen/gen.npz", "gen/sample.png"
CLASSIFIER = "gen/classifier.pth"  # of methods that release one
PRODUCTS = (SAMPLES, GRID, CLASSIFIER)  # what epsilon covers
CARD = "privacy_card.md"  # what PRIVACY says, in words
RESULTS = "results.json"  # written last: its presence means "done"
ENVIRONMENT = "environment.json"
PROVENANCE, STDOUT, TIMING = "provenance.txt", "stdout.txt", "timing.json"
