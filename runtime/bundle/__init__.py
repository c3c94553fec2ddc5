"""A bundle on disk: manifest, families of models, engines, and what is known of its files."""
