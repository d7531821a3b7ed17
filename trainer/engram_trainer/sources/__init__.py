"""Where data sets come from, one module for each kind; `engram_trainer.datasets` chooses among them."""
