"""Classifiers that are trained on samples and tested on real images: one file per architecture, recipes, training."""
