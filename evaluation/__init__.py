"""Evaluation of labelled images: accuracy of classifiers that are trained on them, and fidelity to real images."""
