"""One module an op, each with its ``SUITE``."""
