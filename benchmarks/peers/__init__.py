"""The peers: their environments, and the checkpoint in the form of each."""
