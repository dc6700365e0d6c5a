"""The functions that ``bdfast.patch.backdoorbench`` puts into BackdoorBench, each beside the usual loop.

The usual loops are those that ``BDFAST_REFERENCE=1`` runs: written for this project from the equations. Random images
and a PreAct-ResNet18 with random weights: what is timed depends on neither.
"""
