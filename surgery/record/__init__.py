"""The record: what a checkpoint whose config cannot say its structure is rebuilt from.

It stands in the checkpoint's config.json under transformers' own plug-in point for other
structures, `quantization_config`; importing `surgery` registers who reads it.
"""
