"""Compression of updates: one file for each kind, each a pure pair of encode and decode."""
