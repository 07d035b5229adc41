"""Aligning two networks: which units may change places, which permutation brings them closest, and what the path between
them is like. `align.py` is the method; the other files are its parts.
"""
