"""The record: how to rebuild a checkpoint whose config cannot describe its structure.

It is in the checkpoint's config.json, under transformers' own plug-in point for other structures:
`quantization_config`. To import `surgery` registers the reader.
"""
