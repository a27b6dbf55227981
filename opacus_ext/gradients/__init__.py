"""Fast, exact per-example gradients. per_example.py is the interface; nothing here draws noise or books anything."""
