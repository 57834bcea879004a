"""Tools for finished runs: figures, predictions, costs, exports."""
