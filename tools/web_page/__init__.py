"""Pages that are one file and ask nobody for anything: frame, tables, sound and figures, for `evaluate` and `inspect-shards`."""
