"""Other projects' files and functions."""
