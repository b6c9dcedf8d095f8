"""The batched tree speculative-decoding engine. Imports torch and transformers only, never the web stack."""
