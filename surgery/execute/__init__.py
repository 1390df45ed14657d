"""Carrying out a plan. The arithmetic is in `surgery.transforms`; here it meets a model.

Each module of a step registers it; importing this package fills the registry.
"""

from surgery.execute import backend as backend
from surgery.execute import dropout as dropout
from surgery.execute import fuse as fuse
from surgery.execute import removal as removal
from surgery.execute import rotary as rotary
from surgery.execute import sharing as sharing
