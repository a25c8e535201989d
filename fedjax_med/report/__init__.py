"""Pages and figures made from the files of runs and sweeps."""
