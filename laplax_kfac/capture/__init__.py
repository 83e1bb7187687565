"""Capture: one forward pass and R pullbacks over a program and a batch.

In go a parsed model, a batch and the vectors to pull back; out come, for every layer, its inputs
and the cotangents at its outputs.
"""
