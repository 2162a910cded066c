"""Downloads URL lists into img2dataset shards."""
