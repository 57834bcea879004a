"""After a run: figures, predictions, costs, exports."""
