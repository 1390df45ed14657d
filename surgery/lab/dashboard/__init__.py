"""The W&B workspace, as code: what is logged (`names`) and how it is laid out (`workspace`)."""
