"""Attention surgery, declared: plan, operate, watch, heal, export."""
