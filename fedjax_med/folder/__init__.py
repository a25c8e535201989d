"""The files of a workdir: written whole, read and checked, locked."""
