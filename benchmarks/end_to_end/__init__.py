"""Whole defenses, timed and judged: a module each with its ``STAGE``, found by the GPU check by itself."""
