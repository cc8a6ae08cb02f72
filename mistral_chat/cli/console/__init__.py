"""What commands share at a terminal: printing, progress, locks, texts."""
