"""Allowance for rounding in a bound that privacy rests on."""

# By how much of it the norm of a unit's clipped gradient may exceed the clip norm, whatever the
# numbers: ``models.gradients`` keeps to it, and ``privacy.mechanism`` accounts for it.
NORM_SLACK = 1e-3
# Under this clip norm squares of a gradient's numbers vanish in float32, and the norm with them.
MIN_CLIP_NORM = 1e-12
# Over this one noise of some multiples of it leaves float32.
MAX_CLIP_NORM = 1e30
