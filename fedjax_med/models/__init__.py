"""Flax networks behind Model(init, apply), and the operations they are lowered to."""
