"""Graph passes: one a file, put in order by `pipeline`."""
