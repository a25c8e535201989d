"""Kinds of prediction: what a target is, how a prediction is scored, where a score is shown."""
