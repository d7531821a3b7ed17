"""This file is the package of the routes: one file per resource, thin; rules live in `buffers`, `ingest`, `replay`."""
