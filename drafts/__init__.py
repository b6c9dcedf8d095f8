"""Draft heads: architecture, checkpoint reading and writing, the demo pair."""
