"""Measurements of bdfast: the ops beside what users write without it, and whole defenses. See README.md."""
