"""Programs that ``sd-bench`` starts, each holding one subject: sdrt itself, or a peer in its own environment.

They are scripts: started by their path, they find `worker` beside them, and those of peers import nothing of
sdrt. The interpreter puts this folder first on its path, so no file here may have the name of a library.
"""
