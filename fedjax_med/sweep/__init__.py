"""Many runs of one configuration: points, groups that share a program, chunks, tables."""
