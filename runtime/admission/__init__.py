"""Which files of a bundle an engine library may read: exported here, or checked and tried before."""
