"""`report.html`: one file for the person who decides."""
