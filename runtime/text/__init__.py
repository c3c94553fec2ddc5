"""Prompts as text: syntax, tokens, chunks, words of one's own."""
