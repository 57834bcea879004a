"""What DGL trains on: images, mini-batches, data sets. Independent of networks."""
