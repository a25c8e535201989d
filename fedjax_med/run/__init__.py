"""Trains a run in its workdir: rounds, log points, checkpoints, baselines, files."""
