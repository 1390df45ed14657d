"""The operations: typed specs that turn sites into edits. They know no model class.

Each module registers its spec; importing this package fills the registry.
"""

from surgery.operations import absolute_to_rope as absolute_to_rope
from surgery.operations import attention_dropout as attention_dropout
from surgery.operations import backend as backend
from surgery.operations import fuse_qkv as fuse_qkv
from surgery.operations import gqa as gqa
from surgery.operations import prune_heads as prune_heads
from surgery.operations import rehouse as rehouse
from surgery.operations import rope as rope
from surgery.operations.base import operation_fields, operation_names, parse_operations
from surgery.plan.operation import Operation

__all__ = ["Operation", "operation_fields", "operation_names", "parse_operations"]
