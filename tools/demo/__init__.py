"""Trains the demo target: corpus mix, tokenizer, model, model card."""
