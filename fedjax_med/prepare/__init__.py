"""From a validated config to a run that is ready to start."""
