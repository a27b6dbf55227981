"""One small file per metric; evaluation.registry imports them all, so heavy imports go inside functions."""
