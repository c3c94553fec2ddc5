"""A checkpoint, read and checked: its classes, fields, tokenizer, scheduler and weights."""
