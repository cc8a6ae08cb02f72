"""Text and messages on top of the engine's token ids. Rank 0 only; nothing of terminals."""
