"""What was tuned for a machine: sizes and thresholds, in one place, with what was measured."""

RECORD_BYTES = 2**30
"""Most memory for what layers hand on of a batch; larger batches are worked on in chunks."""
REUSED_BYTES = 2**25
"""Memory that a CPU can well use again and again: new pages take as long as what is computed in
them, and a loop over chunks of this size uses the same ones."""
LAYOUTS = 3
"""Copies of what sums are formed from: the model's, a weighted one, one for the products."""
PASSES_KEPT = 16
"""Most compiled functions of one model that are kept, for other calls with it."""
SHAPES_KEPT = 64
"""Most shapes of batches that passes are known for."""
