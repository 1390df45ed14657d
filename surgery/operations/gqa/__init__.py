"""`gqa`: fewer KV heads, each shared by a group of query heads (arXiv:2305.13245).

options     how many, merged how, in which groups
operation   what that means for a plan
resolve     calibration, as a whole: counts within a budget, groups, coefficients
budget      counts per layer      layerwise   layer after layer
moments     bounded sums of one site's data; scales: its QK-norms as linear maps
solve       from these to a site's merge, by the closed forms in
  planes, keys, values, subspace, aligned
refine      gradient steps on it  wide        a merge in the shapes of its source
"""

from surgery.operations.gqa.operation import GQA

__all__ = ["GQA"]
