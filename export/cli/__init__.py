"""``sd-export``."""
