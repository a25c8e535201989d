"""The peers, one script each; they run under an interpreter that may lack this package's needs."""
