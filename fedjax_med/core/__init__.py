"""Building blocks without domain knowledge: errors, random keys, configuration, text."""
