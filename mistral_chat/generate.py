"""`from mistral_chat.generate import generate`, as in mistral-inference."""

from mistral_chat.engine.generate import generate

__all__ = ["generate"]
