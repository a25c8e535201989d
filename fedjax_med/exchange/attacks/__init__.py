"""Attacks on the aggregation of updates: what hostile clients send instead of their update."""
