"""What the user types: the prompt, its drafts, and input typed before there is a prompt."""
