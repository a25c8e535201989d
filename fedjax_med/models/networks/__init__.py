"""The networks, and the blocks that they are built from."""
