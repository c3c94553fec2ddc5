"""Pictures as files: read, fitted to what a model draws, written with their recipe."""
