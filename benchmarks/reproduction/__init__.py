"""The papers' tables: what they published, and how each cell is made again."""
