"""The W&B workspace as code: the names of what is logged, and the layout of the panels."""
