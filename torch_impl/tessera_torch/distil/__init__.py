"""Distillation: losses and the frozen teacher."""
