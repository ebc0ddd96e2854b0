"""Instruction data: where pairs come from, how they become prompts, how they are dealt to devices."""
