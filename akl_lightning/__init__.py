"""Knowledge distillation of language models with the adaptive Kullback-Leibler divergence, for PyTorch Lightning."""

__version__ = "0.1.0"
