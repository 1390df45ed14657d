"""Where a model's attention is: sites, found from its config and module tree, without weights."""

from surgery.anatomy.find import find_sites
from surgery.anatomy.site import Anatomy, Norm, Projection, Site, Unreadable

__all__ = ["Anatomy", "Norm", "Projection", "Site", "Unreadable", "find_sites"]
