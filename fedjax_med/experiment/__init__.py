"""Host side of a run: build, train loop, checkpoints, progress, report."""
