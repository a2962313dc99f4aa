"""Asynchronous, off-policy-corrected PRISM alignment and RLVR for vision-language models on Ray."""

__version__ = "0.1.0"
