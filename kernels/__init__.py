"""Triton kernels, one file per op, installed as memattn.kernels. They know tiles and launches, not modules or autograd.

Each file: the mathematics with its symbols and shapes, the kernels, then launchers that allocate and return tensors.
Configurations are pinned per architecture in _tuned/*.json and never searched for at run time.
"""
