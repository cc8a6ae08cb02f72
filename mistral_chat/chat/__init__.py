"""Text and messages on top of the engine's token ids. Rank 0 only; knows nothing of terminals."""
