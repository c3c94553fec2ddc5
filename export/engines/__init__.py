"""Bundle to engines: compiled in a process of their own, and compared."""
