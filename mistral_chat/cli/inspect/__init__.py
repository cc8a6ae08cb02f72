"""`mistral-chat inspect`: what a folder holds, and which GPUs it fits."""
