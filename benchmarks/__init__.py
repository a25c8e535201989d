"""Benchmarks, each a script that prints one JSON object with --json."""
