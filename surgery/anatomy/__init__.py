"""Where a model's attention is: sites, found from its config and module tree, without weights."""

from surgery.anatomy.find import find_sites, text_config
from surgery.anatomy.site import Anatomy, Block, Norm, Projection, Site

__all__ = ["Anatomy", "Block", "Norm", "Projection", "Site", "find_sites", "text_config"]
