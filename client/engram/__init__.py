"""This file is the public face of the library (names follow)."""
