"""Looking at heads and at results: what the core never imports."""
