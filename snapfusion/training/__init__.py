"""Training of networks on batches by an objective, without Ray."""
