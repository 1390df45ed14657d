"""`fuse_qkv`: query, key and value projections as one matrix product."""

from surgery.operations.fuse_qkv.operation import FuseQKV

__all__ = ["FuseQKV"]
