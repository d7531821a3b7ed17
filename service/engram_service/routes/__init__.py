"""The HTTP routes, one module per resource; the rules are in `buffers`, `ingest` and `replay`."""
