"""This file is the package of selection: which exemplars a task keeps (`ranking`), and at which quality (`quality`)."""
