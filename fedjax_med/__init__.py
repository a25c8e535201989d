"""fedjax_med: federated training of one medical model across many hospitals, with exact privacy accounting."""

__version__ = "0.1.0"
