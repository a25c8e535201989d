"""Clipping, sampling, noise and accounting: the mechanism and its ε from one object."""
