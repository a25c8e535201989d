"""Kinds of prediction: targets, losses, metrics, and the places where metrics are shown."""
