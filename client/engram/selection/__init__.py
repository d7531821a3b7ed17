"""Selection: which images of a class are worth keeping (`ranking`), and at which quality (`quality`)."""
