"""Studies: what was asked, how it was measured, and the tables of what came out."""
