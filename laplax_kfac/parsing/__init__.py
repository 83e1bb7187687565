"""The layer parser: from a model's jaxpr to its layers.

In goes a model, its parameters and one example; out comes a `program.Program`, the traced jaxpr
with every parameter in exactly one `layer.Layer`.
"""
