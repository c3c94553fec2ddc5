"""The loop and all that surrounds it: what a request becomes on its way to pictures."""
