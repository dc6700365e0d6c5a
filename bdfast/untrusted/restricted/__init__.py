"""Reads a file of ``torch.save`` or ``pickle.dump`` without unpickling it.

It runs in a process of its own, on the standard library alone.
:mod:`.opcodes` interprets the pickle machine, :mod:`.inert` holds all that a pickle may name, :mod:`.container` finds
the parts of the file, :mod:`.describe` writes what was found as JSON and raw bytes, :mod:`.child` is the process.
Imports are relative: the process knows this folder and nothing else of bdfast.
"""
