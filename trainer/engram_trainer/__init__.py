"""Continual learners that keep their replay memory in Engram.

`engram-train` on the command line, `engram_trainer.loop.run` from Python. Needs the extra `engram[trainer]`.
"""
