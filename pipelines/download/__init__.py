"""URL lists to img2dataset shards."""
