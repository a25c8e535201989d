"""Attacks on the promises of a run: bounds on ε from below, membership, checks of execution."""
