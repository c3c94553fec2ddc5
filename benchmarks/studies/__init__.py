"""Single questions, each answered by a command of its own."""
