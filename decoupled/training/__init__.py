"""A run: epochs, precision, checkpoints, the command line."""
