"""Robust aggregation: rules that a few hostile clients cannot move far, and what comes before."""
