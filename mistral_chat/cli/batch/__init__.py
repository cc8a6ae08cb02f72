"""`mistral-chat batch`: many prompts, a JSON line each."""
