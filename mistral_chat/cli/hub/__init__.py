"""Models that are not in a folder yet: the hub, its cache, and the embedded model."""
