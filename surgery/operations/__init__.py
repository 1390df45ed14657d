"""The operations: typed specs that turn sites into edits. They know no model class.

Each module registers its spec; importing this package fills the registry.
"""

from surgery.operations import gqa as gqa
from surgery.operations.base import operation_fields, operation_names, parse_operations
from surgery.plan.operation import Operation

__all__ = ["Operation", "operation_fields", "operation_names", "parse_operations"]
