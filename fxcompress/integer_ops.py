"""The integer dialect: one table. Each row gives schema, meaning, fake kernel and reference.

Layouts: activations (N, C, *spatial) uint8 codes (or (..., C) for ``linear``), weights int8, accumulators int32 with
zero meaning real 0. ``padding`` always lists (before, after) per spatial dimension, first dimension first.
"""
