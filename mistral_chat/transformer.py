"""`from mistral_chat.transformer import Transformer, TransformerArgs`, as in mistral-inference."""

from mistral_chat.engine.generate import Transformer, TransformerArgs

__all__ = ["Transformer", "TransformerArgs"]
