"""Hospitals made from image files or phantoms: sources, splits, partitions."""
