"""What DGL trains on: images, mini-batches, data sets. Knows nothing of networks."""
