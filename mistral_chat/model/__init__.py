"""The sharded model: shapes, slices, weights, cache, forward pass. No ranks, no process groups."""
