"""Where a model's attention is: sites, found from its config and module tree, without weights."""

from surgery.models.sites.find import find_sites, text_config
from surgery.models.sites.site import ROLES, Anatomy, Block, Norm, Packing, Projection, Site

__all__ = [
    "ROLES",
    "Anatomy",
    "Block",
    "Norm",
    "Packing",
    "Projection",
    "Site",
    "find_sites",
    "text_config",
]
