"""Attacks on what a run promises: bounds on ε from below, membership, checks of execution."""
