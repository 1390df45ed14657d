"""What KV heads that merge become, from bounded statistics: closed forms on plain tensors.

Heads of the source are known by number; a group is a list of source KV heads. Everything is
computed in float64 and knows no module, no file and no data.
"""
