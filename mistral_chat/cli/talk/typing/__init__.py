"""What a person types: the prompt, its drafts, and what comes before it is there."""
