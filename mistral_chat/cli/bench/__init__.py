"""`mistral-chat bench`: how fast a model is, beside the machine's limits and competitors."""
