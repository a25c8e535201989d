"""Federated algorithms as tuples of pure functions."""
