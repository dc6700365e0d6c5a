"""Triton kernels of bdfast, one file an op; imported as ``bdfast.triton_kernels`` through the symlink in ``bdfast``.

A file exports its launchers, named after what they compute, and ``AOT_VARIANTS``: the kernels in the forms that users
meet, which the tests compile ahead of time for GPUs that the machine need not have.
"""
