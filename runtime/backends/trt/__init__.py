"""The backends ``tensorrt`` and ``tensorrt-rtx``: two libraries with one API."""
