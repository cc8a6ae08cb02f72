"""Runs a sharded model: ranks, process groups, steps, sampling. Token ids only, never text."""
