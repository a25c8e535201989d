"""Benchmarks against this simulator's own reference and against its peers; see README.md."""
