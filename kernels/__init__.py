"""Stateless operations on tensors: codecs, rotary embedding, attention with log-sum-exp."""
