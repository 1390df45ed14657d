"""Find the attention blocks of a model (sites) from its config and modules, without weights."""

from surgery.models.sites.find import find_sites, get_text_config
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
    "get_text_config",
]
