"""MoExtend in JAX: new modalities for pretrained mixture-of-experts models by adding experts."""

__version__ = "0.1.0"
