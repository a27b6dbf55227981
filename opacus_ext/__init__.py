"""The trust boundary: the only code that may see a private example."""
