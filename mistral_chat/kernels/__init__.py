"""Operations on tensors. Each has a plain torch reference in `reference.py`, its specification."""
