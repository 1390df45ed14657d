"""Tiny random models of every model type that transformers maps to a language or image head."""
