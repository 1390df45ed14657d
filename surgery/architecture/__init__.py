"""Asking an architecture's own code: what a config means to it, what it holds, what it can do.

Nothing here is listed by family. Models are built from patched configs on the meta device, modules
are built and compared, sources are read; what an architecture says of itself is taken as it is.
"""
