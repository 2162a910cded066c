"""From batches and an objective to trained weights, without Ray."""
