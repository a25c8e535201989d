"""From image files or phantoms to hospitals: sources, splits, partitions."""
