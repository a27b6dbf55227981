"""Judge labelled images: classifiers trained on them, and fidelity against the real images."""
