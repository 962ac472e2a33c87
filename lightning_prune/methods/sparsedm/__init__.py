"""SparseDM: N:M sparse fine-tuning of diffusion models (Wang et al., arXiv 2404.10445)."""

from lightning_prune.methods.sparsedm.module import SparseDM

__all__ = ["SparseDM"]
