"""Structured pruning: score the units of a network, choose which go, cut them out.

    ChannelGroups(gm)  ->  criteria (score per unit)  ->  budgets (which go)  ->  cut (mask or shrink)  ->  statistics

The parts are functions of a float graph, so that they can be taken one step at a time; ``passes/prune_channels.py`` is the pass
that takes them all, ``prune`` the call. ``fine_tune`` trains what it returns; ``prune_gradually`` does both in turn.
"""
