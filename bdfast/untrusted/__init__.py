"""Pickles from strangers, read without running anything in them.

:mod:`.sandbox` is what the rest of bdfast calls: it starts a process that reads, and checks what that one leaves.
:mod:`.restricted` is the process.
"""

from bdfast.untrusted.sandbox import Artefact, ArtefactError, Limits, RawImage, read_artefact

__all__ = ["Artefact", "ArtefactError", "Limits", "RawImage", "read_artefact"]
