"""Two tokenizers side by side: the bytes of their tokens, positions that mean the same, classes of tokens."""
