"""The operations. Each module (or folder) here is one; `surgery.plan.registry` finds them.

They ask an architecture's own code what it can do, and know no model class by name.
"""
