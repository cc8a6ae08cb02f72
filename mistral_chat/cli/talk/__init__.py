"""The chat at a terminal, and one answer."""
