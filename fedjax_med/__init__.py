"""One medical model trained across many hospitals, with exact privacy accounting."""

__version__ = "0.3.0.dev0"
