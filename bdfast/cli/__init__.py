"""The ``bdfast`` command.

==============  ======================================================================================
subcommand      what it does
==============  ======================================================================================
``doctor``      which backend runs each op here and why, and whether its numbers are right
``demo``        the main job from start to finish, on scikit-learn's digits
``attack``      poisons a data set and trains a victim on it
``defend``      runs a defense on a checkpoint
``score``       scores every training sample by how suspicious it looks
``evaluate``    accuracy and attack success of a checkpoint
``convert``     a foreign checkpoint or record as safetensors and JSON
``bb``          a defense with the arguments of BackdoorBench's scripts
``bench``       times the ops here, beside plain PyTorch
==============  ======================================================================================

Exit codes: 0 done, 1 a finding (of ``doctor`` and ``bench``), 2 failed, 130 interrupted. Results go to standard output,
progress and errors to standard error.
"""

from __future__ import annotations

from bdfast.cli.program import main

__all__ = ["main"]
