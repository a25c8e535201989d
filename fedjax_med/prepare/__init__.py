"""Makes a run that is ready to start from a validated config and hospitals."""
