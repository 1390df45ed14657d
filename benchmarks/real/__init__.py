"""Every headline of the project on a language model that people use.

`python -m benchmarks.real`.
"""
